"""The `memshard` command, also as `python -m memshard`."""

import sys


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        # Here and not at the top: Ctrl-C comes during imports as well.
        from memshard.launch.cli.main import main as run
    except KeyboardInterrupt:
        print("memshard: stopped: interrupted", file=sys.stderr)
        return 75
    return run()


if __name__ == "__main__":
    sys.exit(main())
