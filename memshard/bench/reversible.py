"""Memory and time of a forward and backward pass: plain, checkpointed and reversible blocks.

    OMP_NUM_THREADS=1 python -m memshard.bench.reversible

Memory is the most that a pass holds beyond parameters and their gradients: on a GPU as torch counts
it, on CPU the growth of a fresh process. Times (on CPU: of the processor) are medians of
interleaved rounds, ratios are taken within a round. Torch's checkpointing stops at the last tensor
that backward needs, so that a block's last matrix product, a third of them all, is not repeated;
rebuilding an input needs it. "full, to the end" is checkpointing that repeats it, too, as other
trainers have it. Writes reversible.json where --out says.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from memshard.bench.spread import shown, spread
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer

KINDS: dict[str, tuple[Any, Any]] = {
    "plain": ("pre", "none"),
    "selective": ("pre", "selective"),
    "full": ("pre", "full"),
    "full, to the end": ("pre", "full"),
    "reversible": ("reversible", "none"),
}


FULL = ("full", "full, to the end")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12, 48])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--memory-every",
        type=int,
        default=0,
        help="a product-key memory in every n-th layer (default none)",
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--time-layers", type=int, default=12, help="layers of the model that is timed (default 12)"
    )
    parser.add_argument("--out", type=Path, help="folder for reversible.json")
    args = parser.parse_args()

    print(
        f"dim {args.dim}, {args.batch} x {args.length} tokens, {args.precision}, {args.device}, "
        f"torch {torch.__version__}"
    )
    # Without it freed memory stays with the process, and its growth says little.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    result: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(args).items()}}
    result["megabytes"] = {
        layers: {kind: memory(args, kind, layers) for kind in KINDS} for layers in args.layers
    }
    print("peak MB     " + "".join(f"{kind:>18}" for kind in KINDS))
    for layers, row in result["megabytes"].items():
        print(f"{layers:4} layers " + "".join(f"{value:18,.1f}" for value in row.values()))
    result["seconds"] = times(args)
    for kind, seconds in result["seconds"].items():
        compared = {
            other: [own / full for own, full in zip(seconds, result["seconds"][other], strict=True)]
            for other in FULL
        }
        ratios = ", ".join(
            f"{shown(spread(values), 1, '.3f')} x {other}" for other, values in compared.items()
        )
        print(f"{kind:18}{shown(spread(seconds), 1e-3, '.1f'):>26} ms: {ratios}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "reversible.json").write_text(json.dumps(result, indent=1) + "\n")


class Pass:
    """A model and a batch, ready to run."""

    def __init__(self, args: argparse.Namespace, kind: str, layers: int) -> None:
        residual, checkpointing = KINDS[kind]
        places = (
            tuple(range(args.memory_every - 1, layers, args.memory_every))
            if args.memory_every
            else ()
        )
        config = ModelConfig(
            vocab_size=256,
            max_length=args.length,
            layers=layers,
            dim=args.dim,
            mixer=MixerConfig(heads=args.heads),
            memory=MemoryConfig(layers=places, keys=128),
            residual=residual,
            dropout=args.dropout,
        )
        torch.manual_seed(0)
        self.model = Transformer(config).to(args.device).train()
        self.model.configure(Recompute(checkpointing))
        externalize_tables(self.model)
        for parameter in self.model.parameters():
            # Not zeros_like: the system would give the memory only when backward writes to it.
            parameter.grad = torch.empty_like(parameter).zero_()
        self.tokens = torch.randint(256, (args.batch, args.length), device=args.device)
        positions = torch.arange(args.length, device=args.device).expand(args.batch, -1)
        self.ctx = Context(
            positions, random=RandomKey(0, 0, torch.arange(args.batch, device=args.device))
        )
        dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
        self.arithmetic = (
            nullcontext if dtype is None else partial(torch.autocast, args.device, dtype)
        )
        self.device, self.early_stop = args.device, kind != "full, to the end"

    def run(self) -> float:
        """Seconds of a forward and backward pass."""
        begun = self.now()
        with self.arithmetic(), set_checkpoint_early_stop(self.early_stop):
            loss: Tensor = token_losses(self.model(self.tokens, self.ctx)[0], self.tokens).mean()
        loss.backward()
        elapsed = self.now() - begun
        for _, table in find_tables(self.model):
            table.drop_reads()
        return elapsed

    def now(self) -> float:
        """The time when all that was asked for is done."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def memory(args: argparse.Namespace, kind: str, layers: int) -> float:
    """Peak megabytes of a pass."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (args, kind, layers))


def _peak(args: argparse.Namespace, kind: str, layers: int) -> float:
    torch.set_num_threads(1)
    measured = Pass(args, kind, layers)
    if args.device != "cpu":
        measured.run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measured.run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # A small pass first, for what torch sets up once.
    small = Pass(argparse.Namespace(**{**vars(args), "batch": 1, "length": 8, "dim": 32}), kind, 1)
    small.run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured.run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def times(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of all kinds' passes, round by round."""
    passes = {kind: Pass(args, kind, args.time_layers) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds + 1):
        for kind, measured in passes.items():
            elapsed = measured.run()
            if number:  # the first is a warm-up
                seconds[kind].append(elapsed)
    return seconds


if __name__ == "__main__":
    main()
