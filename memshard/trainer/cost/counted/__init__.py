"""A step's time on a GPU, from counted operations and bytes: `memshard plan --explain`."""
