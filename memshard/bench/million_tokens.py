"""One training step on a million tokens in one process: forward, backward, update; time and peak
resident memory.

    python -m memshard.bench.million_tokens                       # 1,048,576 tokens, width 512, 8
    heads, 3 layers; below 16 GB python -m memshard.bench.million_tokens --tokens 65536        # try
    it first; memory grows with the tokens

Bytes, LSH attention of two rounds and chunks of 64, one head at a time, reversible blocks,
feedforward and loss in pieces, axial positions. On a GPU, if there is one, peak memory is the
device's.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path

import torch

from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer

GB = 1 << 30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def main() -> None:
    """Run the step and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    args = parser.parse_args()
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        # What is freed must be given back, or the allocator's hoard counts.
        ctypes.CDLL(None).mallopt(option, 1 << 20)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixer = MixerConfig(kind="lsh", heads=args.heads, heads_at_once=1)
    config = ModelConfig(
        vocab_size=256,
        layers=args.layers,
        dim=args.dim,
        max_length=args.tokens,
        mixer=mixer,
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
    started = resident("VmRSS")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{args.tokens:,} tokens, {count:,} parameters, {started:.2f} GB before the first step",
        flush=True,
    )
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
            }
        )
        steps[-1] |= {"processor_s": time.process_time() - cpu, "peak_gb": resident("VmHWM")}
        if device.type == "cuda":
            steps[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / GB
        print(", ".join(f"{key} {value:.2f}" for key, value in steps[-1].items()), flush=True)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        args.out.write_text(
            json.dumps({**settings, "device": device.type, "result": steps}, indent=1) + "\n"
        )


def resident(field: str) -> float:
    """GB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / (1 << 20)


if __name__ == "__main__":
    main()
