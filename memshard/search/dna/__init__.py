"""Decoder programs as data: their form, mutations and compilation to models (So et al. 2021)."""
