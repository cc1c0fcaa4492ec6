"""Everything that passes of a small model leave behind."""

from collections.abc import Callable

import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.table import find_tables
from memshard.models.random import RandomKey
from memshard.models.transformer import Transformer
from tests.models.tiny import tiny_tokens

LENGTH = 9


def tiny_context(which: str = "plain") -> Context:
    """Return a context of three texts. which: plain, documents or padding."""
    positions = torch.arange(LENGTH).expand(3, -1)
    return Context(
        positions,
        documents=torch.tensor([[0] * 4 + [1] * 5, [7] * 9, [1] + [2] * 8])
        if which == "documents"
        else None,
        padding=positions < torch.tensor([9, 4, 6])[:, None] if which == "padding" else None,
        random=RandomKey(3, 5, torch.arange(3)),
    )


def two_passes(
    model: Transformer,
    logits: Callable[[Transformer, Tensor, Context], Tensor],
    ctx: Context,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return, of two micro-batches, outputs, gradients of all parameters, buffers, reads kept for
    tables. dtype: of autocast.
    """
    results = {}
    for _, table in find_tables(model):
        table.has_optimizer = True  # else the second pass is refused
    for seed in range(2):
        tokens = tiny_tokens(3, LENGTH, seed=seed)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            results[f"logits {seed}"] = logits(model, tokens, ctx)
            losses = token_losses(results[f"logits {seed}"], tokens.roll(-1, dims=1))
        (losses.sum() * 8).backward()
    results |= {
        f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    results |= dict(model.named_buffers())
    for name, table in find_tables(model):
        if table.hidden:
            assert table.anchor.grad is not None
            results[f"{name}.anchor"], results[f"{name}.asked"] = (
                table.anchor.grad,
                torch.tensor(table.reads_asked),
            )
            for number, read in enumerate(table.reads):
                results |= {
                    f"{name}.{number}.{field}": value for field, value in vars(read).items()
                }
    return results


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Check that two passes are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.isfinite().all() and torch.equal(ours[name], value), name
