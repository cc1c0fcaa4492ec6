"""The orders of training sequences (data.order): which tokens sample n of an epoch has."""
