"""Search of decoder programs: how many candidates one core proposes and checks in a second, and
what becomes of them.

    OMP_NUM_THREADS=1 memshard bench candidates

`children` are mutations of the start alone; `descendants` are mutations of any candidate so far, as
in a search that goes on. Times are CPU seconds.
"""

import argparse
import random
import time
from collections import Counter
from typing import Any

import torch

from memshard.search.dna.compile import Compiled, Rejected, Shape, compile_dna
from memshard.search.dna.golden import golden
from memshard.search.dna.mutate import mutate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--start", default="transformer", help="program to mutate")
    parser.add_argument("--count", type=int, default=500, help="mutations of a seed (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each kind (default 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Propose and check candidates, seed by seed."""
    torch.set_num_threads(1)
    # The size of the paper's search: some 35 million parameters, of which the embedding
    # is almost half.
    shape = Shape(vocab=32_000, length=64, parameters=(32_000_000, 38_000_000))
    return {
        f"{kind}, seed {seed}": measure(args.start, args.count, kind == "descendants", seed, shape)
        for kind in ("children", "descendants")
        for seed in range(args.seeds)
    }


def show(result: dict[str, Any]) -> None:
    """Print a line for each seed."""
    for title, row in result.items():
        outcomes = ", ".join(f"{status} {number}" for status, number in row["statuses"].items())
        mutation, check = row["mutation_s"], row["check_s"]
        print(
            f"{title:<20}{1 / (mutation + check):6.0f} a second and core   "
            f"mutation {mutation * 1e3:.1f} ms, check {check * 1e3:.1f} ms   {outcomes}"
        )


def measure(start: str, count: int, lineage: bool, seed: int, shape: Shape) -> dict[str, Any]:
    """Return CPU seconds of a mutation and of a check, and how often each status came up."""
    draws, parents, statuses = random.Random(seed), [golden(start)], Counter[str]()
    assert isinstance(compile_dna(parents[0], shape), Compiled)  # sets up what the first one needs
    mutating = checking = 0.0
    for _ in range(count):
        begun = time.process_time()
        child, _ = mutate(draws.choice(parents), draws)
        proposed = time.process_time()
        outcome = compile_dna(child, shape)
        mutating, checking = (
            mutating + proposed - begun,
            checking + time.process_time() - proposed,
        )
        statuses[outcome.status if isinstance(outcome, Rejected) else "candidate"] += 1
        if lineage and isinstance(outcome, Compiled):
            parents.append(child)
    return {
        "mutation_s": mutating / count,
        "check_s": checking / count,
        "statuses": dict(statuses.most_common()),
    }
