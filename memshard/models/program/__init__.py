"""Blocks that run a program of primitives, such as Primer's search finds."""
