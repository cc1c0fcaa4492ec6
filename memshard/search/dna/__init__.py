"""Decoder programs as data: what they are, how they change, and how they become models (So et al.
2021).
"""
