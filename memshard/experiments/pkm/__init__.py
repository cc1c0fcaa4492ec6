"""Product-key memories (Lample et al. 2019): what a memory gains, where, and at what price."""
