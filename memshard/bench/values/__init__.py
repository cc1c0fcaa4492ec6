"""The value table and whole memory layers beside their peers, on a CPU and on a GPU."""
