import sys

from memshard.launch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
