"""`memshard train` against a plain training loop of the same dense model on the same tokens, in one
process.

    OMP_NUM_THREADS=1 memshard bench plain-loop data/pkm --dim 384 --heads 6
"""

import argparse
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.bench.common.sizes import add_sizes
from memshard.experiments.common.clock import interleave, now
from memshard.experiments.common.repeated import median_low_high, range_text, ratios
from memshard.models.config import MixerConfig, ModelConfig
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

_RATIO = "memshard / plain"


class PlainBlock(nn.Module):
    """Pre-norm attention and GELU feedforward without bias, as in nanoGPT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # One product for the three projections, the form that is usually the faster one.
        self.qkv, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = (
            nn.Linear(dim, 4 * dim, bias=False),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output. x: [batch, length, dim], as the output."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class PlainModel(nn.Module):
    """The dense model that `memshard train` builds: learned positions, tied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.max_length is not None
        self.tokens, self.positions = (
            nn.Embedding(config.vocab_size, config.dim),
            nn.Embedding(config.max_length, config.dim),
        )
        self.blocks = nn.Sequential(
            *(PlainBlock(config.dim, config.mixer.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.dim)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats. inputs, targets: [batch, length] int64."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", metavar="DIR", help="data folder to train on")
    add_sizes(parser)
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="interleaved rounds whose median counts (default 9)",
    )


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return tokens a second of both loops (of processor time, on a CPU), and our rate over the
    plain one's, step by step: median, low and high.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, rounds = args.batch, args.rounds
    recipe = Recipe(
        data=DataConfig(path=args.data, length=args.length),
        model=ModelConfig(layers=args.layers, dim=args.dim, mixer=MixerConfig(heads=args.heads)),
        train=TrainConfig(steps=rounds + 1, batch=batch),
        optimizer=OptimizerConfig(warmup=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = set_up(recipe, Path(folder) / "run", device)
        plain = PlainModel(trained.recipe.model).to(device)
        autocast = (
            torch.autocast(device.type, trained.dtype)
            if trained.dtype != torch.float32
            else nullcontext()
        )
        # fused: the fastest AdamW that torch has, and so the fairest to compare with.
        optimizer = torch.optim.AdamW(
            plain.parameters(), lr=recipe.optimizer.lr, betas=recipe.optimizer.betas, fused=True
        )
        # Read beforehand, while ours reads within its step: what that costs counts against us.
        batches = [trained.stream.batch(step * batch, batch) for step in range(rounds + 1)]

        def plain_step() -> None:
            # Ours goes first in every round and has counted its step, so this is the batch it has
            # just trained on.
            data = batches[trained.progress.step - 1]
            with autocast:
                loss = plain.loss(data.inputs.to(device), data.targets.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), recipe.train.clip)
            optimizer.step()
            optimizer.zero_grad()
            # Ours reads loss and norm in every step as well, which on a GPU waits for the
            # step to end.
            loss.item()

        seconds = interleave(
            {"memshard train": lambda: train_step(trained), "plain loop": plain_step},
            rounds,
            partial(now, device),
        )
    # Two models of different size would make any ratio.
    assert sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in trained.model.parameters()
    )
    rates = {
        name: median_low_high([batch * args.length / taken for taken in times])
        for name, times in seconds.items()
    }
    faster = ratios(seconds["plain loop"], seconds["memshard train"])
    return {**rates, _RATIO: median_low_high(faster)}


def show(result: dict[str, dict[str, float]]) -> None:
    """Print the rates and their ratio."""
    for name, rate in result.items():
        if name == _RATIO:
            print(f"{name:<24}{range_text(rate, ',.2f'):>24}")
        else:
            print(f"{name:<24}{range_text(rate, ',.0f'):>24} tokens/s")
