"""Sizes of the small dense models that benchmarks of training share."""

import argparse

_SIZES = {
    "layers": (4, "blocks"),
    "dim": (256, "width"),
    "heads": (4, "attention heads"),
    "length": (256, "tokens of a sequence"),
    "batch": (8, "sequences of a step, over all ranks"),
}


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add --layers, --dim, --heads, --length and --batch."""
    for name, (default, meaning) in _SIZES.items():
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{meaning} (default {default:,})",
        )


def positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least 1")
    return number


def not_negative(text: str) -> int:
    """Return a number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"is {number}; it must be at least 0")
    return number
