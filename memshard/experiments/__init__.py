"""The papers' experiments behind `memshard reproduce`, a folder for each paper."""
