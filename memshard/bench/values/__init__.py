"""The value table and whole memory layers against their peers, on a CPU and on a GPU."""
