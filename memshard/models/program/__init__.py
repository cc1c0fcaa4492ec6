"""Blocks that run a program of primitives, as Primer's search finds them."""
