"""LSH attention against its peers: processor time of a training step and peak memory of small
language models on long sequences.

    python -m memshard.bench.lsh --out docs/results/lsh.json
    python -m memshard.bench.lsh --lengths 16384 65536 --only memshard

Six layers, width 128, two heads, two rounds, chunks of 64, bytes, AdamW, one thread, fp32. Ours
(reversible, chunked), reformer-pytorch, transformers' Reformer and softmax attention with
checkpointing, as far as they are installed. Times are medians of interleaved steps in one process;
peaks are resident memory above what it was before the model, each in a process of its own. The
peers' LSH is not strictly causal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memshard.bench.spread import shown, spread
from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer

LAYERS, DIM, HEADS, ROUNDS, CHUNK, VOCABULARY, PIECE = 6, 128, 2, 2, 64, 256, 1024
Loss = Callable[[Tensor], Tensor]


def memshard(length: int) -> tuple[nn.Module, Loss]:
    """Reversible blocks, feedforward and loss in pieces."""
    mixer = MixerConfig(kind="lsh", heads=HEADS, rounds=ROUNDS, chunk=CHUNK)
    return ours(Transformer(config(mixer, length, residual="reversible", tie_head=False)))


def softmax(length: int) -> tuple[nn.Module, Loss]:
    """scaled_dot_product_attention, every block computed again in backward."""
    model = Transformer(config(MixerConfig(heads=HEADS), length))
    return ours(model, Recompute("full"))


def config(mixer: MixerConfig, length: int, **changes: Any) -> ModelConfig:
    """The common sizes."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "layers": LAYERS,
        "dim": DIM,
        "max_length": length,
        "mixer": mixer,
        "position": "axial",
    }
    return ModelConfig(**{**sizes, "feedforward": FeedForwardConfig(activation="relu"), **changes})


def ours(model: Transformer, recompute: Recompute | None = None) -> tuple[nn.Module, Loss]:
    """Return a model of ours and its loss, by default PIECE tokens of a sequence at a time."""
    model.configure(recompute or Recompute(chunk=PIECE))
    initialize(model, 0)
    return model, lambda tokens: model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean()


def reformer_pytorch(length: int) -> tuple[nn.Module, Loss]:
    """lucidrains' ReformerLM."""
    from reformer_pytorch import ReformerLM

    model = ReformerLM(
        num_tokens=VOCABULARY,
        dim=DIM,
        depth=LAYERS,
        max_seq_len=length,
        heads=HEADS,
        bucket_size=CHUNK,
        n_hashes=ROUNDS,
        ff_chunks=length // PIECE,
        causal=True,
    )
    return model, lambda tokens: nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


def transformers(length: int) -> tuple[nn.Module, Loss]:
    """Hugging Face's ReformerModelWithLMHead."""
    from transformers import ReformerConfig, ReformerModelWithLMHead

    buckets = 2 * length // CHUNK
    first = 1 << buckets.bit_length() // 2
    settings = ReformerConfig(
        attn_layers=["lsh"] * LAYERS,
        hidden_size=DIM,
        feed_forward_size=4 * DIM,
        num_attention_heads=HEADS,
        attention_head_size=DIM // HEADS,
        num_hashes=ROUNDS,
        lsh_attn_chunk_length=CHUNK,
        num_buckets=[first, buckets // first],
        axial_pos_shape=[length // 128, 128],
        axial_pos_embds_dim=[DIM // 2, DIM // 2],
        max_position_embeddings=length,
        vocab_size=VOCABULARY,
        is_decoder=True,
        chunk_size_feed_forward=PIECE,
        chunk_size_lm_head=PIECE,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
    )
    model = ReformerModelWithLMHead(settings)
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


VARIANTS = {
    "memshard": memshard,
    "reformer-pytorch": reformer_pytorch,
    "transformers": transformers,
    "SDPA + checkpointing": softmax,
}
NEEDS = {"reformer-pytorch": "reformer_pytorch", "transformers": "transformers"}


def stepper(name: str, length: int) -> Callable[[], None]:
    """One training step of a variant."""
    torch.manual_seed(0)
    model, loss = VARIANTS[name](length)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(VOCABULARY, (1, length + 1))

    def step() -> None:
        loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(name: str, length: int) -> float:
    """MB of resident memory that two steps need at most, in a new process."""
    command = [sys.executable, __file__, "--peak", name, "--lengths", str(length)]
    # The allocator must give back what is freed, or its hoard counts.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.split()[-1])


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384])
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="leave the others out")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        if args.peak in NEEDS:
            __import__(NEEDS[args.peak])
        before = resident("VmRSS")
        step = stepper(args.peak, args.lengths[0])
        step()
        step()
        print(resident("VmHWM") - before)
        return
    names = [name for name in args.only or VARIANTS if name not in NEEDS or find_spec(NEEDS[name])]
    result: dict[int, dict[str, Any]] = {}
    for length in args.lengths:
        steps = {name: stepper(name, length) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.runs + 1):
            for name, step in steps.items():
                begun = time.process_time()
                step()
                if turn:
                    seconds[name].append(time.process_time() - begun)
        result[length] = {
            name: {"seconds": seconds[name], "peak_mb": peak(name, length)} for name in names
        }
        print(
            f"{length:,} tokens: processor seconds a step, ratio to {names[0]} within a round "
            "(range), peak MB"
        )
        for name, found in result[length].items():
            ratios = spread(
                [other / own for other, own in zip(seconds[name], seconds[names[0]], strict=True)]
            )
            print(
                f"  {name:<22}{statistics.median(seconds[name]):8.2f}  {shown(ratios, 1, '.2f')}  "
                f"{found['peak_mb']:7.0f}",
                flush=True,
            )
    if len(args.lengths) > 1:
        first, last = (
            statistics.median(result[length][names[0]]["seconds"])
            for length in (args.lengths[0], args.lengths[-1])
        )
        print(
            f"{names[0]}: {last / first:.2f} times the time for "
            f"{args.lengths[-1] / args.lengths[0]:g} times the tokens"
        )
    if args.out:
        args.out.write_text(
            json.dumps({"torch": torch.__version__, "result": result}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
