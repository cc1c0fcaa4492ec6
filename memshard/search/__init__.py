"""Primer's evolution of decoder programs: `dna` makes them, `evolve` trains and selects them."""
