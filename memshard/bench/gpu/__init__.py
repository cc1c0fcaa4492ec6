"""`memshard bench gpu`: all that is to be known of a GPU, in minutes and in one file."""
