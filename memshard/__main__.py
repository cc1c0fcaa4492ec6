"""Run the command line as `python -m memshard`."""

import sys

from memshard.launch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
