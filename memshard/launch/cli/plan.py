"""`memshard plan`: what a recipe costs on some ranks, before anything is allocated."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import UsageError, usage_errors
from memshard.launch.cli.parser import Subparsers, real, whole
from memshard.launch.cli.plan_report import report
from memshard.trainer.cost.devices import CARDS, SHORT_NAMES

if TYPE_CHECKING:
    from memshard.trainer.config.recipe import Recipe

ASSUMED_VOCABULARY = 32_768
SECTIONS = ("memory", "ngram")
"""Of the settings of a model, those that describe tables."""
EXPLAINED = "wide"
"""The recipe whose step GPU work is held to."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser(
        "plan", help="what a recipe costs: bytes per rank, traffic, operations; allocates nothing"
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="a bundled name, a YAML file or a run folder; may be left out with --explain, which "
        f"then takes {EXPLAINED}",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as model.layers=12"
    )
    parser.add_argument("--world", type=whole(), default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument(
        "--device",
        choices=(*CARDS, *SHORT_NAMES, "cpu"),
        default="cpu",
        help="of every rank; cpu is this machine, shared by all ranks",
    )
    parser.add_argument(
        "--node",
        type=whole(),
        default=8,
        metavar="N",
        help="ranks on a node, for the time of exchanges (default 8)",
    )
    parser.add_argument(
        "--vocab",
        type=whole(),
        metavar="N",
        help="vocabulary where neither recipe nor data set says it",
    )
    parser.add_argument(
        "--duplicates",
        type=real(1),
        metavar="X",
        help="reads of a row by a rank in a micro-batch (default: as a run folder has measured "
        "it, else as if reads were spread evenly)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="a step on an H200 part by part, with the memory and without: counted operations and "
        "bytes, and the rates by which they become seconds",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what the recipe takes, and what would fit better."""
    args.device = SHORT_NAMES.get(args.device, args.device)
    if args.recipe is None:
        if not args.explain:
            raise UsageError("name a recipe (see memshard plan --help)")
        args.recipe = EXPLAINED
    with usage_errors():
        from memshard.trainer.config.load import load_recipe
        from memshard.trainer.cost.alternatives import (
            Site,
            largest_batch,
            remedies,
            suggestion,
            variants,
        )
        from memshard.trainer.cost.dry_run import dry_run
        from memshard.trainer.cost.estimate import estimate
        from memshard.trainer.cost.step_time import step_time
        from memshard.trainer.cost.this_machine import device_named

        recipe = load_recipe(args.recipe, args.overrides)
        if args.device == "cpu":
            # There the device's memory is the host's.
            recipe = replace(
                recipe,
                tables=replace(recipe.tables, place="device"),
                train=replace(recipe.train, offload=False),
            )
        vocab_size, source = _vocabulary(recipe, args.vocab)
        duplicates = (
            dict.fromkeys(SECTIONS, args.duplicates)
            if args.duplicates
            else _measured_duplicates(args.recipe)
        )
        device = device_named(args.device, args.world)
        precision = device.half if recipe.train.precision == "auto" else recipe.train.precision
        half = precision != "fp32"
        cost = estimate(recipe, args.world, vocab_size, half, duplicates)
        seconds = step_time(recipe, cost, device, precision, args.node)
        parts = dry_run(recipe, args.world, vocab_size)
        explained = None
        if args.explain:
            from memshard.launch.cli.plan_explained import explanation
            from memshard.trainer.cost.counted.rates import rates_of
            from memshard.trainer.cost.counted.step import explain, suggest

            rates, repeated = rates_of(args.device), duplicates.get("memory")
            explained = explain(recipe, vocab_size, precision, rates, repeated)
            suggested = suggest(recipe, explained, precision, rates, repeated)
    site = Site(device, args.world, vocab_size, precision, args.node)
    # Host memory is not compared: how much of it a node has is not known here.
    fits = cost.bytes.total <= device.memory
    result = {
        "recipe": args.recipe,
        "device": args.device,
        "vocab_size": vocab_size,
        "vocab_source": source,
        "precision": precision,
        **asdict(cost),
        "bytes": {**asdict(cost.bytes), "total": cost.bytes.total},
        "host": {**asdict(cost.host), "total": cost.host.total},
        "available": device.memory,
        "fits": fits,
        "remedies": [] if fits else remedies(recipe, site),
        "seconds": {**asdict(seconds), "total": seconds.total},
        "variants": [asdict(variant) for variant in variants(recipe, site)],
        "largest_batch": largest_batch(recipe, site),
        "suggestion": suggestion(recipe, site),
        "dry_run": [asdict(part) for part in parts],
    }
    if explained is not None:
        result["explained"] = {
            **asdict(explained),
            "ratio": explained.ratio,
            "suggested_ratio": suggested.ratio if suggested else None,
        }
    if not args.json:
        print(report(args, recipe, cost, result))
        if explained is not None:
            print(f"\n{explanation(explained, suggested, rates)}")
    return result


def _vocabulary(recipe: "Recipe", given: int | None) -> tuple[int, str]:
    """Return the vocabulary's size and where it is from."""
    from memshard.data_pipeline.format.index import INDEX_FILE, load_index

    # The recipe first, then the data; --vocab only where both are silent.
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size, "model.vocab_size"
    # As a Path, so that a folder called pipe:COMMAND is no command.
    if (data := Path(recipe.data.path) / INDEX_FILE).exists():
        return load_index(data.parent).vocab_size, "tokenizer of data.path"
    if given is not None:
        return given, "--vocab"
    return (
        ASSUMED_VOCABULARY,
        f"assumed: no data set at {recipe.data.path} yet; say it with --vocab",
    )


def _measured_duplicates(recipe: str) -> dict[str, float]:
    """Return what a run last measured, by section, if `recipe` is the folder of a run on several
    ranks.
    """
    from memshard.trainer.watch.metrics import METRICS_FILE, numbers, read_metrics

    file = Path(recipe) / METRICS_FILE
    lines = read_metrics(file) if file.exists() else []
    # The newest: how often rows are read again changes as the model learns.
    return {
        section: value
        for line in lines
        for key in line
        if key.endswith("/micro_batch_duplicates")
        for section in SECTIONS
        # Such as blocks.1.memory.values/micro_batch_duplicates.
        if section in key.replace("_", ".").split(".")
        for _, value in numbers([line], key)
    }
