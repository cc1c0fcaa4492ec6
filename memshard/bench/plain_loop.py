"""`memshard train` beside a plain training loop of the same dense model on the same tokens, in one
process.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.bench.spread import spread
from memshard.models.config import MixerConfig, ModelConfig
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step


class PlainBlock(nn.Module):
    """Pre-norm attention and GELU feedforward, without bias, in the manner of nanoGPT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = (
            nn.Linear(dim, 4 * dim, bias=False),
            nn.Linear(4 * dim, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, dim]; returns the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class PlainModel(nn.Module):
    """Learned positions, tied head."""

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
        """Mean cross-entropy in nats. inputs, targets: [batch, length] int64."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rates(
    path: str, layers: int, dim: int, heads: int, length: int, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens a second of both (of CPU time, on a CPU) in interleaved steps after a first pair, and
    their ratio step by step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    recipe = Recipe(
        data=DataConfig(path=path, length=length),
        model=ModelConfig(layers=layers, dim=dim, mixer=MixerConfig(heads=heads)),
        train=TrainConfig(steps=rounds + 1, batch=batch),
        optimizer=OptimizerConfig(warmup=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(recipe, Path(folder) / "run", device)
        plain = PlainModel(run.recipe.model).to(device)
        autocast = (
            torch.autocast(device.type, run.dtype) if run.dtype != torch.float32 else nullcontext()
        )
        optimizer = torch.optim.AdamW(
            plain.parameters(), lr=recipe.optimizer.lr, betas=recipe.optimizer.betas, fused=True
        )
        fed = [run.stream.batch(step * batch, batch) for step in range(rounds + 1)]

        def plain_step() -> None:
            data = fed[run.progress.step - 1]
            with autocast:
                loss = plain.loss(data.inputs.to(device), data.targets.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), recipe.train.clip)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        actions: dict[str, Callable[[], object]] = {
            "memshard train": lambda: train_step(run),
            "plain loop": plain_step,
        }
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds + 1):
            for name, action in actions.items():
                begun = clock()
                action()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(clock() - begun)
    found = {
        name: spread([batch * length / seconds for seconds in taken[1:]])
        for name, taken in times.items()
    }
    own, other = times.values()
    found["memshard / plain"] = spread(
        [theirs / ours for ours, theirs in zip(own[1:], other[1:], strict=True)]
    )
    assert sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in run.model.parameters()
    )
    return found
