"""Fast weights (Schlag et al. 2021): linear attention as a memory, updated by the delta rule."""
