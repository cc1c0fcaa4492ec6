"""The text that `memshard plan` prints."""

import argparse
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.cost_text import describe_ranks, describe_tables
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

if TYPE_CHECKING:
    from memshard.trainer.config.recipe import Recipe
    from memshard.trainer.cost.estimate import Estimate, RankBytes


def report(
    args: argparse.Namespace, recipe: "Recipe", cost: "Estimate", result: dict[str, Any]
) -> str:
    """Return the plan as text. result: what --json prints."""
    ranks = "1 rank" if cost.ranks == 1 else f"{cost.ranks} ranks"
    lines = [f"{args.recipe} on {ranks}, {args.device}, {result['precision']}", ""]
    lines += _work(recipe, cost, result)
    if cost.ranks > 1:
        lines += _sent(recipe, cost)
    lines += ["", *_bytes(recipe, cost, result), "", *_time(cost, result), "", *_variants(result)]
    lines += ["", _suggested(cost, result)]
    if cost.ranks > 1 and result["dry_run"]:
        # The last rank: where sizes do not divide, its part is the odd one.
        part = result["dry_run"][-1]
        lines.append(
            f"dry run as rank 0 and rank {part['rank']} of {cost.ranks}: sizes divide; "
            f"rank {part['rank']} stores {_short(part['dense'])} dense and {_short(part['table'])} "
            "table parameters"
        )
    if recipe.train.batch * cost.tensor_ranks < cost.ranks:
        lines.append(
            f"train.batch is {recipe.train.batch}: some of the {cost.ranks} ranks have nothing to "
            "train on"
        )
    return "\n".join(lines)


def _work(recipe: "Recipe", cost: "Estimate", result: dict[str, Any]) -> list[str]:
    """Return lines on what is trained and what a step computes."""
    tables = " and ".join(
        f"{table.group.tables} x {'up to ' * (len(set(table.group.slots)) > 1)}"
        f"{max(table.group.slots):,} {'slots' if table.group.summed else 'rows'}"
        for table in cost.tables.values()
    )
    batches = "1 micro-batch" if cost.micro_batches == 1 else f"{cost.micro_batches} micro-batches"
    return [
        f"vocabulary      {result['vocab_size']:,} ({result['vocab_source']})",
        f"parameters      dense {_short(cost.parameters.dense)}, "
        f"table {_short(cost.parameters.table)} ({tables or 'no memory layer'})",
        f"step            {cost.tokens_per_step:,} tokens; a rank takes {batches} of "
        f"{cost.micro_batch} x {recipe.data.length}",
        f"operations      {_short(cost.flops_per_token)}FLOP a token, "
        f"{_short(cost.flops_per_token * cost.tokens_per_step)}FLOP a step",
    ]


def _sent(recipe: "Recipe", cost: "Estimate") -> list[str]:
    """Return lines on how ranks are arranged and what one of them sends."""
    lines = []
    tokens = cost.micro_batch * cost.micro_batches * recipe.data.length
    sent = (
        f"{cost.lookup_traffic / 1e3:,.1f} KB a token for lookups, "
        f"{_gb(cost.lookup_traffic * tokens / cost.lookup_ranks)} a step; "
        f"{_gb(cost.gradient_traffic)} a step for dense gradients"
    )
    if cost.tensor_ranks > 1:
        lines.append(
            f"tensor          {describe_ranks(cost)}; {_short(cost.parameters.split)} of the dense "
            "parameters are split"
        )
        sent += f"; {_gb(cost.tensor_traffic * tokens)} for activations"
    lines += [f"tables          {text}" for text in describe_tables(cost)]
    if cost.replica_traffic:
        sent += f"; {_gb(cost.replica_traffic)} for row gradients between copies"
    return [*lines, f"a rank sends    {sent}"]


def _bytes(recipe: "Recipe", cost: "Estimate", result: dict[str, Any]) -> list[str]:
    """Return lines on what a rank needs, whether that fits, and what to change."""
    lines = []
    if cost.host.total:
        lines += [
            "bytes of a rank in host memory",
            *_sizes(recipe, cost, cost.host, result["precision"]),
            f"  {'total':<16}{_gb(cost.host.total):>11}",
            "",
        ]
    lines += ["bytes on a rank", *_sizes(recipe, cost, cost.bytes, result["precision"])]
    device, available = result["device"], result["available"]
    share = cost.bytes.total / available
    verdict = f"fits: {share:.0%} of" if share <= 1 else f"does not fit: {share:.0%} of"
    usable = "are free a rank on this machine" if device == "cpu" else f"are usable on a {device}"
    lines.append(
        f"  {'total':<16}{_gb(cost.bytes.total):>11}   {verdict} the {_gb(available)} that {usable}"
    )
    if share > 1:
        advice = (
            ", or ".join(result["remedies"])
            or "no single change of ranks, batch, checkpointing or table is enough"
        )
        lines.append(f"what to change: {advice}")
    return lines


def _sizes(recipe: "Recipe", cost: "Estimate", sizes: "RankBytes", precision: str) -> list[str]:
    """Return a line for each field that is not zero, with a note."""
    parts = " and ".join(
        f"{rows:,} x {columns:,} of {max(table.group.slots):,} rows"
        for table in cost.tables.values()
        for rows, columns in [table.part]
    )
    notes = {
        "dense weights": "fp32" if precision == "fp32" else f"{precision} and fp32",
        "dense gradients": "fp32",
        "dense moments": f"{DENSE_KINDS[recipe.optimizer.kind].title}, fp32",
        "table rows": f"{parts}, {recipe.tables.dtype}",
        "table moments": "fp32, and an fp32 copy of the values"
        # More than two fp32 moments: then a master copy is kept beside 16-bit values.
        if recipe.tables.state_bytes > 8
        else "fp32",
        "activations": f"of {cost.micro_batch} sequences",
        "reads": "kept for the row update",
        "workspace": "of backward or row update",
    }
    # Fields of `RankBytes` are named as they are printed.
    named = ((name, getattr(sizes, name.replace(" ", "_")), note) for name, note in notes.items())
    return [f"  {name:<16}{_gb(size):>11}   {note}" for name, size, note in named if size]


def _time(cost: "Estimate", result: dict[str, Any]) -> list[str]:
    """Return lines on how long a step should take, and the largest batch."""
    seconds = result["seconds"]
    parts = ("products", "tables", "update", "network")
    spent = ", ".join(f"{name} {seconds[name]:.2g}" for name in parts if seconds[name])
    return [
        f"a step should take about {seconds['total']:.2g} s ({spent}): "
        f"{cost.tokens_per_step / seconds['total']:,.0f} tokens/s",
        f"largest batch that fits with micro-batches of {cost.micro_batch} or fewer: "
        f"{result['largest_batch']:,}",
    ]


def _variants(result: dict[str, Any]) -> list[str]:
    """Return lines that compare the ways to keep activations."""
    return [
        f"{'kept for backward':<26}{'bytes':>11}{'step':>9}   largest micro-batch of this batch",
        *(
            f"  {variant['name']:<24}{_gb(variant['bytes']):>11}{variant['seconds']:>7.2g} s   "
            f"{variant['largest'] or 'none fits'}"
            for variant in result["variants"]
        ),
    ]


def _suggested(cost: "Estimate", result: dict[str, Any]) -> str:
    where = f"on {cost.ranks} x {result['device']}"
    if result["suggestion"] is None:
        keys = " or ".join(table.group.size_key for table in cost.tables.values()) or "model"
        return f"suggested {where}: nothing fits; more ranks, a smaller {keys} or reversible blocks"
    settings, seconds = result["suggestion"]
    if not settings:
        return f"suggested {where}: as it is"
    return (
        f"suggested {where}: {' '.join(f'{key}={value}' for key, value in settings.items())} "
        f"(about {seconds:.2g} s a step)"
    )


def _gb(size: float) -> str:
    # GB from 0.1 on, so that two decimals still say something.
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _short(number: float) -> str:
    """Write 1,234,567 as 1.23 M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "
