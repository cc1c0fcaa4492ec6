"""Memory and time of a forward and backward pass: plain, checkpointed and reversible blocks.

    OMP_NUM_THREADS=1 memshard bench reversible

Memory is the most that a pass takes beyond parameters and their gradients: on a GPU as torch counts
it, on CPU the growth of a fresh process. Times (on CPU: of the processor) are medians of
interleaved rounds, ratios are taken within a round. Torch's checkpointing stops at the last tensor
that backward needs, so that a block's last matrix product, a third of them all, is not repeated;
rebuilding an input needs it. "full, to the end" is checkpointing that repeats it as well, as other
trainers have it.
"""

import argparse
import resource
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from memshard.bench.common.peak_memory import freed_at_once, in_new_process
from memshard.experiments.common.clock import interleave, now
from memshard.experiments.common.repeated import median_range, ratios
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
    # The same model as "full"; only `set_checkpoint_early_stop` differs.
    "full, to the end": ("pre", "full"),
    "reversible": ("reversible", "none"),
}
_OPTIONS = ("dim", "heads", "length", "batch", "memory_every", "dropout", "precision", "device")
FULL = ("full", "full, to the end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12, 48])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--memory-every",
        type="from 0",
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of every kind of block at every depth, then the time at one."""
    options = {name: getattr(args, name) for name in _OPTIONS}
    with freed_at_once():
        megabytes = {
            layers: {kind: in_new_process(peak, options, kind, layers) for kind in KINDS}
            for layers in args.layers
        }
    return {
        "torch": torch.__version__,
        "options": options,
        "megabytes": megabytes,
        "seconds": times(options, args.time_layers, args.rounds),
    }


def show(result: dict[str, Any]) -> None:
    """Print peaks by depth, then times with their ratios to checkpointing."""
    options = result["options"]
    print(
        f"dim {options['dim']}, {options['batch']} x {options['length']} tokens, "
        f"{options['precision']}, {options['device']}, torch {result['torch']}"
    )
    print("peak MB     " + "".join(f"{kind:>18}" for kind in KINDS))
    for layers, row in result["megabytes"].items():
        print(f"{layers:4} layers " + "".join(f"{value:18,.1f}" for value in row.values()))
    for kind, seconds in result["seconds"].items():
        compared = ", ".join(
            f"{median_range(ratios(seconds, result['seconds'][full]), '.3f')} x {full}"
            for full in FULL
        )
        print(f"{kind:18}{median_range(seconds, '.1f', 1e-3):>26} ms: {compared}")


class Pass:
    """A model and a batch, ready to run. options: those of the command, by name."""

    def __init__(self, options: dict[str, Any], kind: str, layers: int) -> None:
        args = argparse.Namespace(**options)
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
        # As in training: a table's gradient is the rows that were read, not an array of its size,
        # which would be most of the peak.
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
        self.early_stop = kind != "full, to the end"

    def run(self) -> None:
        """Run forward and backward, and forget the tables' gradients."""
        # Around forward alone: checkpoints remember both for when they compute again, and backward
        # itself belongs outside autocast.
        with self.arithmetic(), set_checkpoint_early_stop(self.early_stop):
            loss: Tensor = token_losses(self.model(self.tokens, self.ctx)[0], self.tokens).mean()
        loss.backward()
        for _, table in find_tables(self.model):
            # There is no optimizer to take them; kept, they would grow with every pass.
            table.drop_reads()


def peak(options: dict[str, Any], kind: str, layers: int) -> float:
    """Return the megabytes that a pass takes at most, in a fresh process."""
    torch.set_num_threads(1)
    measured = Pass(options, kind, layers)
    if options["device"] != "cpu":
        measured.run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measured.run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # A small pass first, for what torch sets up once.
    Pass({**options, "batch": 1, "length": 8, "dim": 32}, kind, 1).run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured.run()
    # Linux counts in KiB.
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def times(options: dict[str, Any], layers: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds of every kind's pass, round by round."""
    passes = {kind: Pass(options, kind, layers).run for kind in KINDS}
    return interleave(passes, rounds, partial(now, torch.device(options["device"])))
