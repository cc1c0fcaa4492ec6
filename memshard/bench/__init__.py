"""Side-by-side measurements behind `memshard bench`."""
