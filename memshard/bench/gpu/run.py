"""All that is to be known of a GPU, in minutes and in one file.

    memshard bench gpu --minutes 8 --out runs/gpu

Stages run one after the other, each in a process of its own and within its share of the time; what
one leaves goes to those after it. Every result is in DIR/gpu.json at once, so a crash, a hang or
the end of the time loses one stage. `--only STAGE` runs some again and keeps the others' results.
docs/gpu.md says how to run it on a machine without pip. `--device cpu` rehearses it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from memshard.bench.gpu.catalogue import NEEDS_GPU, STAGES, Stage
from memshard.bench.gpu.outcome import RESULT, RUNNING, wrong
from memshard.bench.gpu.processes import results_of
from memshard.experiments.common import compact_json
from memshard.io import atomic_write

_LOG = "log.txt"
_LEAST = {"cuda": 12.0, "cpu": 60.0}
"""Seconds that every stage may take, however short the time: torch alone takes some to load. A
rehearsal is to go through everything; on two idle cores it takes two minutes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out",
        dest="folder",
        type=Path,
        metavar="DIR",
        default=Path("runs/gpu"),
        help="for the results (default runs/gpu)",
    )
    parser.add_argument("--minutes", type=int, default=8, help="for all stages (default 8)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses, at sizes that fit it (default cuda)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="token shards for the headline (default: Python's standard library as bytes)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help=f"only these; others keep their results. All: {', '.join(STAGES)}",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages and return the content of gpu.json. ValueError without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu rehearses on the CPU")
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / RESULT
    result: dict[str, Any] = {"device": args.device, "stages": {}}
    if args.only and path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["device"] != args.device:
            raise ValueError(f"{path} is of {result['device']}: choose another --out")
    stages = [stage for name, stage in STAGES.items() if name in (args.only or STAGES)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        options = {
            "on": args.device,
            "out": args.folder.absolute(),
            "scratch": Path(scratch),
            "data": args.data and args.data.absolute(),
        }
        run_stages(stages, options, 60 * args.minutes, path, result, _LEAST[args.device])
    return result


def run_stages(
    stages: list[Stage],
    options: dict[str, Any],
    seconds: float,
    path: Path,
    result: dict[str, Any],
    least: float,
) -> None:
    """Run the stages within some seconds, and write `result` to `path` after every result.

    options: of `Bench`, but `seconds`. least: seconds that every stage may take.
    """
    end = time.monotonic() + seconds
    for number, stage in enumerate(stages):
        share = stage.weight / sum(other.weight for other in stages[number:])
        limit = max(least, share * (end - time.monotonic()))
        entry: dict[str, Any] = {"outcome": RUNNING, "limit": round(limit, 1), "results": {}}
        result["stages"][stage.name] = entry
        if stage.gpu_only and options["on"] != "cuda":
            entry |= {"outcome": NEEDS_GPU, "problem": "", "seconds": 0.0}
        else:
            for name, value in results_of(stage, options, limit, path.parent / _LOG):
                if name:
                    entry["results"][name] = value
                else:
                    entry |= value
                _write(result, path)
        _write(result, path)
        problem = f": {entry['problem'].splitlines()[0]}" if entry["problem"] else ""
        line = f"{stage.name:<12}{entry['seconds']:6.1f} s  {entry['outcome']}{problem}"
        print(line, file=sys.stderr, flush=True)  # what --json prints is the result


def _write(result: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as partial:
        compact_json.write(result, partial)


def show(result: dict[str, Any]) -> None:
    """Print what is wrong."""
    problems = wrong(result)
    print(f"{len(problems)} results are not as they should be" if problems else "all is well")
    for line in problems:
        print(f"!!  {line}")
