"""LSH attention against its peers: processor time of a training step and peak memory of small
language models on long sequences.

    memshard bench lsh --lengths 16384
    memshard bench lsh --lengths 16384 65536 --only memshard

Six layers, width 128, two heads, two rounds, chunks of 64, bytes, AdamW, one thread, fp32. Ours
(reversible, chunked), reformer-pytorch, transformers' Reformer and softmax attention with
checkpointing, as far as they are installed. Times are medians of interleaved steps in one process;
peaks are resident memory above what it was before the model, each in a process of its own. The
peers' LSH is not strictly causal.
"""

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from memshard.bench.common.peak_memory import freed_at_once, peak_memory
from memshard.experiments.common.clock import interleave
from memshard.experiments.common.repeated import median_range, ratios
from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer

LAYERS, DIM, HEADS, ROUNDS, CHUNK, VOCABULARY = 6, 128, 2, 2, 64, 256
TOKENS_AT_ONCE = 1024
Loss = Callable[[Tensor], Tensor]


def memshard(length: int) -> tuple[nn.Module, Loss]:
    """Build ours: reversible blocks, feedforward and loss in chunks of tokens."""
    mixer = MixerConfig(kind="lsh", heads=HEADS, rounds=ROUNDS, chunk=CHUNK)
    return ours(Transformer(config(mixer, length, residual="reversible", tie_head=False)))


def softmax(length: int) -> tuple[nn.Module, Loss]:
    """Build ours with softmax attention, every block recomputed in backward."""
    model = Transformer(config(MixerConfig(heads=HEADS), length))
    return ours(model, Recompute("full"))


def config(mixer: MixerConfig, length: int, **changes: Any) -> ModelConfig:
    """Return a config of the common sizes."""
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
    """Return a model of ours, initialised, and its loss as a function of tokens.

    By default feedforward and loss take TOKENS_AT_ONCE tokens of a sequence at a time.
    """
    model.configure(recompute or Recompute(chunk=TOKENS_AT_ONCE))
    initialize(model, 0)
    return model, lambda tokens: model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean()


def reformer_pytorch(length: int) -> tuple[nn.Module, Loss]:
    """Build lucidrains' ReformerLM."""
    from reformer_pytorch import ReformerLM

    model = ReformerLM(
        num_tokens=VOCABULARY,
        dim=DIM,
        depth=LAYERS,
        max_seq_len=length,
        heads=HEADS,
        bucket_size=CHUNK,
        n_hashes=ROUNDS,
        ff_chunks=length // TOKENS_AT_ONCE,
        causal=True,
    )
    return model, lambda tokens: nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


def transformers(length: int) -> tuple[nn.Module, Loss]:
    """Build Hugging Face's ReformerModelWithLMHead."""
    from transformers import ReformerConfig, ReformerModelWithLMHead

    # Chunks of twice the mean bucket, as in the paper (m = 2 l / n_buckets, section 2).
    buckets = 2 * length // CHUNK
    # Two factors near the root: the random rotations are then as wide as their sum, not
    # as their product.
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
        chunk_size_feed_forward=TOKENS_AT_ONCE,
        chunk_size_lm_head=TOKENS_AT_ONCE,
        # Its default is 0.05; no other variant has dropout.
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
    )
    model = ReformerModelWithLMHead(settings)
    # It shifts labels by one itself, so they are the inputs, not the targets.
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


VARIANTS = {
    "memshard": memshard,
    "reformer-pytorch": reformer_pytorch,
    "transformers": transformers,
    "SDPA + checkpointing": softmax,
}
NEEDS = {"reformer-pytorch": "reformer_pytorch", "transformers": "transformers"}


def stepper(name: str, length: int) -> Callable[[], None]:
    """Return a function that takes one training step of a variant."""
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


def take_steps(name: str, length: int) -> None:
    """Take two steps of a variant, whose memory is measured."""
    step = stepper(name, length)
    step()
    step()


def peak(name: str, length: int) -> float | None:
    """Return the MiB of resident memory that two steps need at most, in a process of their own."""
    # A peer's imports, hundreds of MB with transformers, are no part of its model.
    packages = (NEEDS[name],) if name in NEEDS else ()
    with freed_at_once():
        taken = peak_memory(take_steps, name, length, packages=packages)
    return None if taken is None else taken / (1 << 20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="leave the others out")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time the variants that are installed in turn, and measure the memory of each."""
    torch.set_num_threads(1)
    names = [name for name in args.only or VARIANTS if name not in NEEDS or find_spec(NEEDS[name])]
    result: dict[int, dict[str, Any]] = {}
    for length in args.lengths:
        # All models stay in memory for the rounds of a length; their peaks are measured elsewhere.
        seconds = interleave({name: stepper(name, length) for name in names}, args.rounds)
        result[length] = {
            name: {"seconds": seconds[name], "peak_mb": peak(name, length)} for name in names
        }
    return {"torch": torch.__version__, "result": result}


def show(result: dict[str, Any]) -> None:
    """Print times, ratios to the first variant in the same round, and memory."""
    lengths = result["result"]
    for length, rows in lengths.items():
        first = next(iter(rows))
        print(
            f"{length:,} tokens: processor seconds a step, ratio to {first} within a round "
            "(range), peak MB"
        )
        for name, row in rows.items():
            slower = ratios(row["seconds"], rows[first]["seconds"])
            print(
                f"  {name:<22}{statistics.median(row['seconds']):8.2f}  "
                f"{median_range(slower, '.2f')}  {row['peak_mb'] or float('nan'):7.0f}"
            )
    if len(lengths) > 1:
        shortest, *_, longest = lengths
        name = next(iter(lengths[shortest]))
        before, after = (
            statistics.median(lengths[length][name]["seconds"]) for length in (shortest, longest)
        )
        print(
            f"{name}: {after / before:.2f} times the time for {longest / shortest:g} times the "
            "tokens"
        )
