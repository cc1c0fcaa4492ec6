"""Tests that every fast path must pass against plain torch, on this machine, before it is used."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memshard.models.kernels import plain_rows
from memshard.models.kernels.cpu_topk import CpuSearch
from memshard.models.kernels.plain_rows import AdamUpdate
from memshard.models.kernels.plain_topk import product_search

if TYPE_CHECKING:
    from memshard.models.kernels.backend import Lookup, RowBackend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def row_backend_fault(backend: "RowBackend", device: torch.device) -> str | None:
    """Return what is wrong with a backend on a device, to follow its name; None if all is well.

    Triton compiles at the first call: whatever goes wrong there must not stop a run.
    """
    for dtype in _DTYPES:
        try:
            right = _sums_agree(backend, dtype, device) and all(
                _updates_agree(backend, dtype, with_master, device)
                for with_master in {False, dtype != torch.float32}
            )
        # Any exception: a compiler or a driver may raise its own types, and plain
        # torch is always there.
        except Exception as problem:
            return f"fail in {dtype}: {' '.join(str(problem).split())[:200]}"
        if not right:
            return f"disagree with it in {dtype}"
    return None


@torch.no_grad()
def search_agrees(search: CpuSearch) -> bool:
    """Return whether a search finds the same slots, of scores with and without ties."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Few levels make ties of most scores; a million make none.
    for keys, levels in ((5, 2), (90, 3), (90, 1_000_000)):
        first, second = torch.randint(
            -levels, levels + 1, (2, 20, keys), generator=generator, device="cpu"
        ).to(torch.float32)
        if not torch.equal(search(first, second, 5), product_search(first, second, 5)):
            return False
    return True


@torch.no_grad()
def lookup_agrees(lookup: "Lookup", device: torch.device, precision: str) -> bool:
    """Return whether a search without stored scores finds the rows, weights and gradients that
    plain torch does, of scores with ties, and in fp32 without: rounded ones choose other rows.
    """
    draw, k = _Draws(device), 5
    # More sub-keys than a tile, in widths that fill none.
    for tied in (True, False) if precision == "fp32" else (True,):
        queries, sub_keys = draw.normal(5, 2, 2 * 37), draw.normal(2, 2, 66, 37)
        if tied:
            # Small whole numbers: sums are exact in any precision and order, and many are equal.
            queries, sub_keys = (x.clamp(-1, 1).round() for x in (queries, sub_keys))
        upstream = draw.normal(5, 2, k)
        try:
            rows, bits = lookup.look_up(queries, sub_keys, k, "softmax", precision)
            weights = bits.view(torch.float32)
            ours = lookup.gradients(queries, sub_keys, rows, weights, upstream, "softmax")
        # As in `row_backend_fault`.
        except Exception:
            return False
        right_rows, *right = _looked_up(queries, sub_keys, k, upstream)
        if not torch.equal(rows.long(), right_rows) or not all(
            a is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
            for a, b in zip((weights, *ours), right, strict=True)
        ):
            return False
    return True


@torch.enable_grad()
def _looked_up(queries: Tensor, sub_keys: Tensor, k: int, upstream: Tensor) -> list[Tensor]:
    """Return rows, weights, and the gradients to queries and sub-keys, by plain torch."""
    leaves = queries.detach().requires_grad_(), sub_keys.detach().requires_grad_()
    halves, keys = leaves[0].unflatten(-1, (2, -1)).unbind(-2), sub_keys.shape[2]
    first, second = (
        torch.einsum("thd,hnd->thn", half, leaves[1][:, side]) for side, half in enumerate(halves)
    )
    i1, i2 = product_search(first.detach(), second.detach(), k).long()
    weights = (first.gather(-1, i1) + second.gather(-1, i2)).softmax(-1)
    gradients = torch.autograd.grad(weights, leaves, upstream)
    return [(i1 + i2) % keys * keys + i1, weights.detach(), *gradients]


class _Draws:
    """Random tensors of fixed seed and dtype, whatever torch's defaults are at the moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu").to(
            self.device
        )

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu").to(
            self.device
        )

    def rows(self, slots: int, reads: int) -> Tensor:
        return torch.randint(
            slots, (reads,), generator=self.generator, dtype=torch.int32, device="cpu"
        ).to(self.device)


def _sums_agree(backend: "RowBackend", dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether sums agree: uneven and empty bags, repeated rows, a dim that fills no vector
    and one that does.
    """
    draw = _Draws(device)
    # 37 fills no vector of 4, 8 or 16 values; 48 fills them all.
    for dim in (37, 48):
        values, rows = draw.normal(29, dim).to(dtype), draw.rows(29, 50)
        weights, upstream = draw.normal(50), draw.normal(6, dim)
        offsets = torch.tensor([0, 0, 7, 8, 30, 50], device=device)
        # Of two in bf16 plain torch makes one in bf16.
        narrow = upstream if dtype == torch.bfloat16 else upstream.to(torch.bfloat16)
        reads = (values, rows, weights)
        pairs = (
            (backend.gather_sum(*reads, offsets), plain_rows.gather_sum(*reads, offsets)),
            (
                backend.score_gradients(values, rows, offsets, upstream),
                plain_rows.score_gradients(values, rows, offsets, upstream),
            ),
            (
                backend.score_gradients(values, rows, offsets, narrow),
                plain_rows.score_gradients(values, rows, offsets, narrow),
            ),
            (
                backend.segment_sums(*reads, offsets[2:]),
                plain_rows.segment_sums(*reads, offsets[2:]),
            ),
            (backend.sort_reads(rows, 29)[0].long(), plain_rows.sort_reads(rows, 29)[0]),
        )
        if not all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs):
            return False
    return True


def _updates_agree(
    backend: "RowBackend", dtype: torch.dtype, with_master: bool, device: torch.device
) -> bool:
    """Return whether a step agrees, with an fp32 master and factors for each row, or without."""
    draw, slots = _Draws(device), 23
    # GPUs train such tables under autocast to bf16, which gradients of sums then have.
    in_bf16 = device.type == "cuda" and dtype == torch.bfloat16 and not with_master
    dim = 48 if with_master else 37
    values = (draw.uniform(slots, dim) - 0.5).to(dtype)
    rows, weights = draw.rows(slots, 40), draw.uniform(40)
    offsets = torch.tensor([0, 9, 9, 31], device=device)
    order, distinct, starts = plain_rows.sort_reads(rows, slots)
    step_sizes, decay1, decay2 = (draw.uniform(len(distinct)) for _ in range(3))
    update = AdamUpdate(
        values=values,
        exp_avg=draw.uniform(slots, dim) - 0.5,
        exp_avg_sq=draw.uniform(slots, dim),
        master=values.float() if with_master else None,
        rows=distinct.long(),
        starts=starts,
        bags=plain_rows.bag_of_each_read(offsets, len(rows))[order],
        weights=weights[order],
        upstream=(draw.uniform(4, dim) - 0.5).to(torch.bfloat16 if in_bf16 else torch.float32),
        step_sizes=step_sizes if with_master else None,
        decay1=decay1 if with_master else None,
        decay2=decay2 if with_master else None,
        step_size=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-6,
        first_row=0,
        first_column=0,
        key=3 << 40,
    )
    stored = ("values", "exp_avg", "exp_avg_sq")
    twin = replace(update, **{name: getattr(update, name).clone() for name in stored})
    if with_master:
        twin = replace(twin, master=values.float())
    backend.adam_rows(update)
    plain_rows.adam_rows(twin)
    # The same random bits round half values in both, but a sum that differs in its last bit may
    # round to the neighbour, 2^-8 away in bf16.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return all(
        torch.allclose(
            getattr(update, name).float(),
            getattr(twin, name).float(),
            rtol=tolerance,
            atol=tolerance,
        )
        for name in stored
    )
