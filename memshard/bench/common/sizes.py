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
            type=int,
            default=default,
            metavar="N",
            help=f"{meaning} (default {default:,})",
        )
