"""The stages of `memshard bench gpu`, one a file."""
