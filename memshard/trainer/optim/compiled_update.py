"""The Adam step on rows as one compiled pass, which sums a row's gradient and updates it while it is in cache."""

from functools import cache
from typing import Any

import torch

from memshard.models.kernels.cpu import CpuKernels
from memshard.models.kernels.select import kernels_for
from memshard.models.memory.row_gradient import Read, SortedReads, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.row_update import Factors, Step, rounding_key, update_rows


def update_rows_compiled(table: ValueTable, state: dict[str, Any], step: Step, part: SortedReads, found: Factors) -> bool:
    """As `update_rows`; False, and nothing done, where only plain torch can."""
    kernels = kernels_for(table.weight, part.upstream)
    if kernels is None or state["exp_avg"].dtype != torch.float32 or not table.weight.is_contiguous() or not _agrees(kernels):
        return False
    _call(kernels, table, state, step, part, found)
    return True


def _call(kernels: CpuKernels, table: ValueTable, state: dict[str, Any], step: Step, part: SortedReads, found: Factors) -> None:
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
            "first_column": table.columns.start,
            "key": rounding_key(step),
            "beta1": step.beta1,
            "beta2": step.beta2,
            "eps": found.eps,
            "step_size": found.step_size,
        },
    )


@cache
def _agrees(kernels: CpuKernels) -> bool:
    """Whether a step of the kernels is a step of plain torch: every dtype, with and without what differs by row."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for master in {False, dtype != torch.float32}:
            results = []
            for fast in (True, False):
                generator = torch.Generator().manual_seed(0)
                with torch.random.fork_rng(devices=[]):
                    table = ValueTable(23, 37)
                table.hide()
                table.hold(torch.randn(23, 37, generator=generator).to(dtype))
                state: dict[str, Any] = {"exp_avg": torch.randn(23, 37, generator=generator)}
                state["exp_avg_sq"] = torch.rand(23, 37, generator=generator)
                if master:
                    state["master"] = table.weight.float()
                rows = torch.randint(23, (40,), generator=generator, dtype=torch.int32)
                offsets, weights = torch.tensor([0, 9, 9, 31]), torch.rand(40, generator=generator)
                part = sort_reads([Read(rows, weights, offsets, torch.randn(4, 37, generator=generator))])
                assert part is not None
                by_row = {name: torch.rand(len(part.rows), generator=generator) for name in ("step_size", "decay1", "decay2")}
                found = Factors(0.1, 1e-6, by_row if master else {})
                step = Step("lazy", 3, 0.1, 0.9, 0.99, 1e-6)
                if fast:
                    _call(kernels, table, state, step, part, found)
                else:
                    update_rows(table, state, step, part, found)
                results.append([table.weight.float(), state["exp_avg"], state["exp_avg_sq"]])
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            if not all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*results, strict=True)):
                return False
    return True
