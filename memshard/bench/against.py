"""Processor time of training steps of this checkout against another one's, in turns.

git worktree add ../before v0.1.0
OMP_NUM_THREADS=1 memshard bench against ../before data/quickstart
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import process_time

_WARM_UP = 3
_NO_MEMORY = "model.memory.layers=[]"
_STEPS = {
    "table": (1, ()),
    "quickstart": (1, ("train.batch=4",)),
    "host": (1, ("train.batch=4", "tables.place=host")),
    "rows-unique": (2, ("train.batch=4", "parallel.layout=rows-unique")),
    "no-memory": (1, ("train.batch=4", _NO_MEMORY)),
    "delta": (1, ("train.batch=4", "data.length=512", "model.mixer.kind=delta", _NO_MEMORY)),
    "lsh": (1, ("train.batch=2", "data.length=2048", "model.mixer.kind=lsh", _NO_MEMORY)),
}
"""Ranks and changes of recipe `quickstart`; none is a table of 65,536 x 1,024 values alone, whose
rows 256 tokens read 128 times each.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="the other checkout's folder")
    parser.add_argument("data", type=Path, metavar="DIR", help="data folder to train on")
    parser.add_argument(
        "--only", nargs="+", choices=_STEPS, default=list(_STEPS), help="leave the others out"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds whose median counts (default 5)"
    )
    parser.add_argument("--steps", type=int, default=7, help="steps of a round (default 7)")


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step of both checkouts, medians over rounds of medians over steps,
    and the median, lowest and highest ratio of this one's to the other's in a round.
    """
    this = Path(__file__).parents[2]
    if not (args.other / "memshard").is_dir():
        raise ValueError(f"{args.other} is no checkout: it has no folder memshard")
    result = {}
    for name in args.only:
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(args.rounds):
            # In turns, and neither always first.
            pairs = [(this, ours), (args.other, theirs)]
            for checkout, times in pairs if number % 2 else reversed(pairs):
                times.append(_step_time(checkout, name, args.data, args.steps))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        result[name] = {
            "this_ms": median(ours) * 1e3,
            "other_ms": median(theirs) * 1e3,
            "ratio": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return result


def show(result: dict[str, dict[str, float]]) -> None:
    """Print a line for each kind of step."""
    print(f"{'':<24}{'this, ms':>10}{'other, ms':>11}   this / other")
    for name, row in result.items():
        print(
            f"{name:<24}{row['this_ms']:>10.1f}{row['other_ms']:>11.1f}   "
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        )


def _step_time(checkout: Path, name: str, data: Path, steps: int) -> float:
    """Return the seconds of a step, in a process that imports the checkout's memshard."""
    ranks, _ = _STEPS[name]
    # Safe path: this file's folder must not be searched before the checkout.
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if ranks > 1 else ()),
            __file__,
            name,
            str(data.resolve()),
            str(steps),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{name} fails in {checkout}: {done.stderr[-2000:]}")
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _of_a_table(steps: int) -> list[float]:
    import torch

    from memshard.models.memory.table import ValueTable
    from memshard.trainer.optim.rows.adam import RowAdam

    torch.manual_seed(0)
    table = ValueTable(1 << 16, 1024)
    table.hide()
    optimizer = RowAdam([table])
    times = []
    for _ in range(steps):
        rows = (torch.rand(256, 128) * 16).exp2().long().clamp(max=(1 << 16) - 1)
        weights, upstream = torch.rand(256, 128, requires_grad=True), torch.randn(256, 1024)
        begun = process_time()
        table.weighted_sum(rows, weights).backward(upstream)
        optimizer.step()
        times.append(process_time() - begun)
    return times


def _of_a_run(overrides: tuple[str, ...], data: str, steps: int) -> list[float]:
    import torch.distributed as dist

    from memshard.trainer.config.load import load_recipe
    from memshard.trainer.set_up import set_up
    from memshard.trainer.step import train_step

    recipe = load_recipe("quickstart", (f"data.path={data}", *overrides))
    times = []
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(recipe, Path(folder), "cpu")
        for _ in range(steps):
            begun = process_time()
            train_step(run)
            times.append(process_time() - begun)
        run.stop_reading()
    if dist.is_initialized():
        dist.destroy_process_group()
    return times


if __name__ == "__main__":
    _, overrides = _STEPS[sys.argv[1]]
    steps = _WARM_UP + int(sys.argv[3])
    times = _of_a_run(overrides, sys.argv[2], steps) if overrides else _of_a_table(steps)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(median(times[_WARM_UP:])))
