"""The Adam step on rows as one pass of a kernel, which sums a row's gradient and updates it while
it is at hand.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from memshard.models.kernels.backend import Kernels, chosen, kernels_for
from memshard.models.memory.row_gradient import Read, SortedReads, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.step import Factors, Step, rounding_key, update_rows


def update_rows_compiled(
    table: ValueTable, state: dict[str, Any], step: Step, part: SortedReads, found: Factors
) -> bool:
    """As `update_rows`; False, and nothing done, where only plain torch can."""
    kernels = kernels_for(table.weight, part.upstream)
    if (
        kernels is None
        or state["exp_avg"].dtype != torch.float32
        or not table.weight.is_contiguous()
        or disagreement(table.weight.device)
    ):
        return False
    _call(kernels, table, state, step, part, found)
    return True


def _call(
    kernels: Kernels,
    table: ValueTable,
    state: dict[str, Any],
    step: Step,
    part: SortedReads,
    found: Factors,
) -> None:
    by_row = {name: value.contiguous() for name, value in found.by_row.items()}
    kernels.adam_rows(
        {
            "values": table.weight,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "master": state.get("master"),
            "rows": part.rows.contiguous(),
            "starts": part.starts.contiguous(),
            "bags": part.bags.to(torch.int32),
            "weights": part.weights.contiguous(),
            "upstream": part.upstream.contiguous(),
            "step_sizes": by_row.get("step_size"),
            "decay1": by_row.get("decay1"),
            "decay2": by_row.get("decay2"),
        },
        {
            "count": len(part.rows),
            "first_row": table.first_row,
            "first_column": table.local_columns.start,
            "key": rounding_key(step),
            "beta1": step.beta1,
            "beta2": step.beta2,
            "eps": found.eps,
            "step_size": found.step_size,
        },
    )


@cache
def disagreement(device: torch.device) -> str | None:
    """Why the device's kernels take no steps; None if theirs are plain torch's: every dtype, with
    and without what differs by row.
    """
    kernels, reason = chosen(device)
    if kernels is None:
        return reason
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for master in {False, dtype != torch.float32}:
            try:
                right = _agrees(kernels, dtype, master, device)
            except Exception as problem:  # as in select.py
                return f"they fail in {dtype}: {' '.join(str(problem).split())[:200]}"
            if not right:
                return f"they disagree in {dtype}"
    return None


def _agrees(kernels: Kernels, dtype: torch.dtype, master: bool, device: torch.device) -> bool:
    results = []
    dim = 48 if master else 37  # one that fills vectors, one that does not
    for fast in (True, False):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.rand(shape, generator=generator).to(device)

        with torch.device("meta"):
            table = ValueTable(23, dim)
        table.hide()
        table.set_values((draw(23, dim) - 0.5).to(dtype))
        state: dict[str, Any] = {"exp_avg": draw(23, dim) - 0.5, "exp_avg_sq": draw(23, dim)}
        if master:
            state["master"] = table.weight.float()
        rows = torch.randint(23, (40,), generator=generator, dtype=torch.int32).to(device)
        offsets = torch.tensor([0, 9, 9, 31], device=device)
        part = sort_reads([Read(rows, draw(40), offsets, draw(4, dim) - 0.5)])
        assert part is not None
        by_row = {name: draw(len(part.rows)) for name in ("step_size", "decay1", "decay2")}
        found = Factors(0.1, 1e-6, by_row if master else {})
        step = Step("lazy", 3, 0.1, 0.9, 0.99, 1e-6)
        if fast:
            _call(kernels, table, state, step, part, found)
        else:
            update_rows(table, state, step, part, found)
        results.append([table.weight.float(), state["exp_avg"], state["exp_avg_sq"]])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*results, strict=True)
    )
