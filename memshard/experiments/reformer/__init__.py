"""Reformer (Kitaev et al. 2020): attention by locality-sensitive hashing on long sequences."""
