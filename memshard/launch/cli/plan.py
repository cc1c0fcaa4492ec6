"""memshard plan: what a recipe costs on given ranks, before anything is allocated."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import Subparsers
from memshard.launch.cli.train import arrangement, spread

if TYPE_CHECKING:
    from memshard.trainer.config.recipe import Recipe
    from memshard.trainer.estimate import Estimate, RankBytes

CARDS = {
    "v100-16g": (15.8, "fp16"),
    "v100-32g": (31.7, "fp16"),
    "a100-40g": (39.4, "bf16"),
    "a100-80g": (79.1, "bf16"),
    "h100-80g": (79.1, "bf16"),
    "h200-141g": (139.8, "bf16"),
}
"""GiB that the driver leaves, and what precision auto means."""

USABLE = 0.92
"""Share of a card that a run can fill: the CUDA context, NCCL's buffers and fragmentation take the rest."""

ASSUMED_VOCABULARY = 32_768


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plan", help="what a recipe costs: bytes per rank, traffic, operations; allocates nothing")
    parser.add_argument("recipe", metavar="RECIPE", help="a bundled name, a YAML file or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.layers=12")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument("--device", choices=[*CARDS, "cpu"], default="cpu", help="of every rank; cpu is this machine, shared by all ranks")
    parser.add_argument("--vocab", type=int, metavar="N", help="vocabulary where neither recipe nor data set says it")
    parser.add_argument(
        "--duplicates", type=float, metavar="X",
        help="reads of a row by a rank in a micro-batch (default: as a run folder has measured it, else as if reads were spread evenly)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with usage_errors():
        from memshard.trainer.config.load import load_recipe
        from memshard.trainer.estimate import estimate, remedies

        recipe = load_recipe(args.recipe, args.overrides)
        if args.device == "cpu":
            # There the device's memory is the host's.
            recipe = replace(recipe, tables=replace(recipe.tables, place="device"), train=replace(recipe.train, offload=False))
        vocab_size, source = _vocabulary(recipe, args.vocab)
        precision: str = recipe.train.precision
        if precision == "auto":
            precision = CARDS[args.device][1] if args.device in CARDS else "fp32"
        half = precision != "fp32"
        duplicates = args.duplicates or _measured_duplicates(args.recipe)
        if duplicates is not None and duplicates < 1:
            raise ValueError(f"--duplicates is {duplicates}; it must be at least 1")
        cost = estimate(recipe, args.world, vocab_size, half, duplicates)
    available = _available(args.device, args.world)
    fits = cost.bytes.total <= available
    found = [] if fits else remedies(recipe, args.world, vocab_size, half, available)
    if args.device == "cpu":
        # More ranks on one machine do not give it more memory.
        found = [remedy for remedy in found if "ranks" not in remedy and "host" not in remedy]
    if not args.json:
        print(_report(args, recipe, cost, vocab_size, source, precision, available, found))
    return {
        "recipe": args.recipe,
        "device": args.device,
        "vocab_size": vocab_size,
        "vocab_source": source,
        "precision": precision,
        **asdict(cost),
        "bytes": {**asdict(cost.bytes), "total": cost.bytes.total},
        "host": {**asdict(cost.host), "total": cost.host.total},
        "available": available,
        "fits": fits,
        "remedies": found,
    }


def _vocabulary(recipe: "Recipe", given: int | None) -> tuple[int, str]:
    """The vocabulary's size and who says it."""
    from memshard.data_pipeline.format.index import INDEX_FILE, load_index

    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size, "model.vocab_size"
    if (Path(recipe.data.path) / INDEX_FILE).exists():
        return load_index(recipe.data.path).vocab_size, "tokenizer of data.path"
    if given is not None:
        if given < 1:
            raise ValueError(f"--vocab is {given}; it must be at least 1")
        return given, "--vocab"
    return ASSUMED_VOCABULARY, f"assumed: no data set at {recipe.data.path} yet; say it with --vocab"


def _measured_duplicates(recipe: str) -> float | None:
    """What a run last measured, if `recipe` is a run folder of several ranks."""
    from memshard.trainer.metrics import METRICS_FILE, read_metrics

    file = Path(recipe) / METRICS_FILE
    lines = read_metrics(file) if file.exists() else []
    found = [value for line in lines for key, value in line.items() if key.endswith("/micro_batch_duplicates")]
    return found[-1] if found else None


def _available(device: str, world: int) -> float:
    """Bytes a rank can use."""
    import torch

    from memshard.trainer.available_memory import available_memory

    if device == "cpu":
        return available_memory(torch.device("cpu"), ranks_here=world)
    return CARDS[device][0] * 2**30 * USABLE


def _report(
    args: argparse.Namespace,
    recipe: "Recipe",
    cost: "Estimate",
    vocab_size: int,
    source: str,
    precision: str,
    available: float,
    remedies: list[str],
) -> str:
    memory, parameters, need = recipe.model.memory, cost.parameters, cost.bytes
    ranks = "1 rank" if cost.ranks == 1 else f"{cost.ranks} ranks"
    slots = f"{parameters.tables} x {memory.slots:,} slots" if parameters.tables else "no memory layer"
    batches = "1 micro-batch" if cost.micro_batches == 1 else f"{cost.micro_batches} micro-batches"
    lines = [
        f"{args.recipe} on {ranks}, {args.device}, {precision}",
        "",
        f"vocabulary      {vocab_size:,} ({source})",
        f"parameters      dense {_short(parameters.dense)}, table {_short(parameters.table)} ({slots})",
        f"step            {cost.tokens_per_step:,} tokens; a rank takes {batches} of {cost.micro_batch} x {recipe.data.length}",
        f"operations      {_short(cost.flops_per_token)}FLOP a token, {_short(cost.flops_per_token * cost.tokens_per_step)}FLOP a step",
    ]
    if cost.ranks > 1:
        tokens = cost.micro_batch * cost.micro_batches * recipe.data.length
        looked_up = tokens / (1 if cost.layout.layout == "tensor" else cost.tensor_ranks)
        if cost.tensor_ranks > 1:
            lines.append(f"tensor          {arrangement(cost)}; {_short(parameters.split)} of the dense parameters are split")
        if parameters.tables:
            lines.append(f"tables          {spread(cost)}")
        tensor = f"; {_gb(cost.tensor_traffic * tokens)} for activations" if cost.tensor_ranks > 1 else ""
        replicas = f"; {_gb(cost.replica_traffic)} for row gradients between copies" if cost.replica_traffic else ""
        lines.append(
            f"a rank sends    {cost.lookup_traffic / 1e3:,.1f} KB a token for lookups, {_gb(cost.lookup_traffic * looked_up)} a step; "
            f"{_gb(cost.gradient_traffic)} a step for dense gradients{tensor}{replicas}"
        )
    notes = {
        "dense weights": "fp32" if precision == "fp32" else f"{precision} and fp32",
        "dense gradients": "fp32",
        "dense moments": "AdamW, fp32",
        "table rows": f"{cost.table_part[0]:,} x {cost.table_part[1]:,} of {memory.slots:,} rows, {recipe.tables.dtype}",
        "table moments": "fp32, and an fp32 copy of the values" if recipe.tables.state_bytes > 8 else "fp32",
        "activations": f"of {cost.micro_batch} sequences",
        "reads": "kept for the row update",
        "workspace": "of backward or row update",
    }

    def sizes(of: "RankBytes") -> list[str]:
        named = ((name, getattr(of, name.replace(" ", "_")), note) for name, note in notes.items())
        return [f"  {name:<16}{_gb(size):>11}   {note}" for name, size, note in named if size]

    if cost.host.total:
        lines += ["", "bytes of a rank in host memory", *sizes(cost.host), f"  {'total':<16}{_gb(cost.host.total):>11}"]
    lines += ["", "bytes on a rank", *sizes(need)]
    share = need.total / available
    verdict = f"fits: {share:.0%} of" if share <= 1 else f"does not fit: {share:.0%} of"
    usable = "are free a rank on this machine" if args.device == "cpu" else f"are usable on a {args.device}"
    lines.append(f"  {'total':<16}{_gb(need.total):>11}   {verdict} the {_gb(available)} that {usable}")
    if share > 1:
        advice = ", or ".join(remedies) or "no single change of ranks, train.micro_batch or model.memory.keys is enough: combine them"
        lines.append(f"what to change: {advice}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _short(number: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "
