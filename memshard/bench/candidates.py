"""Search of decoder programs: how many candidates one core draws and checks in a second, and what
becomes of them.

    OMP_NUM_THREADS=1 python -m memshard.bench.candidates

`children` are mutations of the start alone; `descendants` are mutations of any candidate so far, as
in a search that goes on. CPU seconds.
"""

import argparse
import random
import time
from collections import Counter

import torch

from memshard.search.dna.compile import Compiled, Rejected, Shape, compile_dna
from memshard.search.dna.golden import golden
from memshard.search.dna.mutate import mutate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", default="transformer")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # The size of the paper's search: some 35 million parameters, of which the embedding is almost
    # half.
    shape = Shape(vocab=32_000, length=64, parameters=(32_000_000, 38_000_000))
    for title, lineage in (("children", False), ("descendants", True)):
        for run in range(args.runs):
            report(f"{title}, seed {run}", *measure(args.start, args.count, lineage, run, shape))


def measure(
    start: str, count: int, lineage: bool, seed: int, shape: Shape
) -> tuple[float, float, Counter[str]]:
    """CPU seconds of a mutation and of a check, and the statuses of all candidates."""
    draws, parents, statuses = random.Random(seed), [golden(start)], Counter[str]()
    assert isinstance(compile_dna(parents[0], shape), Compiled)  # sets up what the first one needs
    mutating = checking = 0.0
    for _ in range(count):
        begun = time.process_time()
        child, _ = mutate(draws.choice(parents), draws)
        drawn = time.process_time()
        found = compile_dna(child, shape)
        mutating, checking = mutating + drawn - begun, checking + time.process_time() - drawn
        statuses[found.status if isinstance(found, Rejected) else "candidate"] += 1
        if lineage and isinstance(found, Compiled):
            parents.append(child)
    return mutating / count, checking / count, statuses


def report(title: str, mutating: float, checking: float, statuses: Counter[str]) -> None:
    """One line."""
    outcomes = ", ".join(f"{status} {number}" for status, number in statuses.most_common())
    times = f"mutation {mutating * 1e3:.1f} ms, check {checking * 1e3:.1f} ms"
    print(f"{title:<20}{1 / (mutating + checking):6.0f} a second and core   {times}   {outcomes}")


if __name__ == "__main__":
    main()
