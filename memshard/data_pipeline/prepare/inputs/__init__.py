"""The inputs of a data folder: which files, and how each kind of file becomes documents."""

from memshard.data_pipeline.prepare.inputs.files import Sources, find_files

__all__ = ["Sources", "find_files"]
