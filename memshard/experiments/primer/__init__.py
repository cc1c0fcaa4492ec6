"""Primer (So et al. 2021): which parts of the searched architecture lower the loss."""
