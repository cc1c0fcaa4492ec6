"""Plain DDP with a memory whose table is split over the processes; its state loads in one process
or any other number.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py --out runs/ddp

No downloads: the text is Python's own help pages, read as bytes.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from memshard import (
    CombinedOptimizer,
    ProductKeyMemory,
    RowAdam,
    externalize_tables,
    full_state_dict,
    load_full_state_dict,
    shard_tables,
)

LENGTH, BATCH = 128, 16


class Block(nn.Module):
    """Causal attention and a feedforward."""

    def __init__(self, dim: int, feedforward: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.feedforward = feedforward
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x: [sequences, length, dim]."""
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feedforward(self.norms[1](x))


class Model(nn.Module):
    """A small language model of bytes; the second of its three feedforwards is a memory."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, dim), nn.Embedding(LENGTH, dim)
        memory = ProductKeyMemory(dim, keys=64, heads=2, topk=16, key_dim=64, query_norm="layer")
        dense = [
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(2)
        ]
        self.blocks = nn.Sequential(Block(dim, dense[0]), Block(dim, memory), Block(dim, dense[1]))
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [sequences, length]; returns logits."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.blocks(x))


def text() -> Tensor:
    """Real text, [rows, LENGTH + 1]."""
    data = torch.frombuffer(
        bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8
    ).long()
    return data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def build() -> tuple[Model, CombinedOptimizer]:
    """The same model on every process, its table split if there are several; and its optimizer."""
    torch.manual_seed(0)
    model = Model()
    tables = shard_tables(model) if dist.is_initialized() else externalize_tables(model)
    return model, CombinedOptimizer(AdamW(model.parameters(), 3e-3), RowAdam(tables, 1e-2))


def train(model: nn.Module, optimizer: CombinedOptimizer, first: int, steps: int) -> list[float]:
    """Losses of some steps; every process takes its rows of each batch, and DDP averages the dense
    gradients.
    """
    rows = text()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    losses = []
    for step in range(first, first + steps):
        batch = rows[step * BATCH : (step + 1) * BATCH][rank::ranks]
        loss = F.cross_entropy(wrapped(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train, and save from the first process; what is there is loaded first, whatever number of
    processes saved it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")

    model, optimizer = build()
    file, first = args.out / "state.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        load_full_state_dict(model, optimizer, saved["model"], saved["optimizer"])
        first = saved["step"]
    losses = train(model, optimizer, first, args.steps)
    full = full_state_dict(model, optimizer)
    if full is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save({"model": full[0], "optimizer": full[1], "step": first + args.steps}, file)
        print(
            f"loss {losses[0]:.3f} at step {first + 1}, {losses[-1]:.3f} at step "
            f"{first + args.steps}; saved in {file}"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
