"""One training step on a million tokens in one process: forward, backward, update; time and peak
resident memory.

    memshard bench million-tokens                   # width 512, 8 heads, 3 layers; below 16 GB
    memshard bench million-tokens --tokens 65536    # try it first; memory grows with the tokens

Bytes, LSH attention of two rounds and chunks of 64, one head at a time, reversible blocks,
feedforward and loss in chunks, axial positions. On a GPU, if there is one, peak memory is the
device's.
"""

import argparse
import ctypes
import time
from typing import Any

import torch

from memshard.bench.common.peak_memory import resident
from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer

GB = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt's options in glibc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of matrix products (default fp32)",
    )
    parser.add_argument("--steps", type=int, default=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Take the steps."""
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        # What is freed must be given back, or the allocator's hoard counts.
        ctypes.CDLL(None).mallopt(option, 1 << 20)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        vocab_size=256,
        layers=args.layers,
        dim=args.dim,
        max_length=args.tokens,
        mixer=MixerConfig(kind="lsh", heads=args.heads, heads_at_once=1),
        position="axial",
        residual="reversible",
        tie_head=False,
    )
    model = Transformer(config)
    initialize(model, 0)
    model.configure(Recompute(chunk=1 << 14))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    # A text that repeats itself: there is something to find.
    tokens = (
        torch.randint(256, (1, 4096))
        .repeat(1, args.tokens // 4096 + 1)[:, : args.tokens + 1]
        .to(device)
    )
    started = _gigabytes("VmRSS")
    steps = []
    for _ in range(args.steps):
        begun, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean()
        forward = time.perf_counter() - begun
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(
            {
                "loss": float(loss.detach()),
                "forward_s": forward,
                "step_s": time.perf_counter() - begun,
                "processor_s": time.process_time() - cpu,
                "peak_gb": torch.cuda.max_memory_allocated() / GB
                if device.type == "cuda"
                else _gigabytes("VmHWM"),
            }
        )
    sizes = ("tokens", "dim", "heads", "layers", "precision", "steps")
    return {
        **{key: getattr(args, key) for key in sizes},
        "device": device.type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "before_gb": started,
        "result": steps,
    }


def show(result: dict[str, Any]) -> None:
    """Print a line for each step."""
    print(
        f"{result['tokens']:,} tokens, {result['parameters']:,} parameters, "
        f"{result['before_gb']:.2f} GB before the first step"
    )
    for step in result["result"]:
        print(", ".join(f"{key} {value:.2f}" for key, value in step.items()))


def _gigabytes(field: str) -> float:
    return (resident(field) or 0) / GB
