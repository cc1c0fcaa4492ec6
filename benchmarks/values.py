"""The value table and whole memory layers against their peers: the same as `memshard bench values`, with the same options.

    python benchmarks/values.py --quick
"""

import sys

from memshard.launch.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "values", *sys.argv[1:]]))
