"""Decoder programs as data: their form, their mutations, and how they become models (So et al.
2021).
"""
