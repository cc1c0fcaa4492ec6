"""The `memshard` command, also as `python -m memshard`."""

import os
import sys


def main() -> int:
    """Run the command line and return the exit code."""
    # Python looks in the folder that it is started in before all others, which may be a stranger's:
    # workers would run its pickle.py. After `python -m memshard` this process has done so itself.
    if sys.modules["__main__"].__spec__ is None:
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        # Here and not at the top: Ctrl-C comes during imports as well.
        from memshard.launch.cli.main import main as run
    except KeyboardInterrupt:
        print("memshard: stopped: interrupted", file=sys.stderr)
        return 75
    return run()


if __name__ == "__main__":
    sys.exit(main())
