"""Table reads and row updates on a GPU, as shares of the bandwidth of a plain copy.

    python -m memshard.bench.values.gpu --out runs/values_gpu

Forward: weighted sums of 128 reads a token from a table far larger than the cache, rows drawn
evenly; its bytes are those of all reads and of the sums. Update: one fused pass of row Adam over
the distinct rows; its bytes are values and moments, read and written. A copy's are read and
written, too. Medians; the cache is emptied before each repetition. Exits with 2 where there is no
GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from memshard.models.kernels.backend import chosen
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.optim.rows.compiled_update import update_rows_compiled
from memshard.trainer.optim.rows.step import Step, factors, update_rows

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=1_048_576)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--reads", type=int, default=128, help="of a token (default 128)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="folder for values_gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "memshard/bench/values_gpu.py needs a CUDA device and there is none here; memshard "
            "bench values measures the CPU",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name, path = torch.cuda.get_device_name(), chosen(device)[1]
    print(
        f"{name}, {args.slots:,} x {args.dim}, {args.tokens:,} tokens of {args.reads} reads, "
        f"torch {torch.__version__}; {path}"
    )
    bandwidth = copy_bandwidth(device)
    print(
        f"copy {bandwidth / 1e9:,.0f} GB/s\n\n| dtype | what | ms | of copy bandwidth "
        "|\n|---|---|---|---|"
    )
    result = {
        "device": name,
        "path": path,
        "copy": bandwidth,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    for dtype in ("fp16", "bf16", "fp32"):
        lines = result[dtype] = {}
        for what, (time, size) in {
            **reads(args, DTYPES[dtype], device),
            **updates(args, DTYPES[dtype], device),
        }.items():
            lines[what] = {"seconds": time, "share": size / time / bandwidth}
            print(
                f"| {dtype} | {what} | {time * 1e3:.3f} | {lines[what]['share']:.0%} |", flush=True
            )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "values_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying 1 GiB."""
    source = torch.zeros(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / seconds(lambda: target.copy_(source))


def reads(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of the forward pass, of torch's EmbeddingBag, and of a plain gather, which
    writes all rows it reads.
    """
    table = new_table(args, dtype, device)
    rows = torch.randint(args.slots, (args.tokens, args.reads), device=device)
    weights = torch.rand(args.tokens, args.reads, device=device)
    gathered, sums = rows.numel() * args.dim * dtype.itemsize, args.tokens * args.dim
    flat = rows.flatten()
    with torch.no_grad():
        own = weights.to(dtype)
        bag = seconds(
            lambda: F.embedding_bag(rows, table.weight, mode="sum", per_sample_weights=own)
        )
        return {
            "memshard": (seconds(lambda: table.weighted_sum(rows, weights)), gathered + 4 * sums),
            "EmbeddingBag": (bag, gathered + dtype.itemsize * sums),
            "gather": (seconds(lambda: table.weight[flat]), 2 * gathered),
        }


def updates(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of the fused pass, of the same in plain torch, and of a whole optimizer
    step, which sorts the reads first.
    """
    table = new_table(args, dtype, device)
    optimizer = RowAdam([table], rounding="stochastic")
    state = optimizer.state[table.anchor]
    rows = torch.randint(args.slots, (args.tokens, args.reads), device=device)
    weights = torch.rand(args.tokens, args.reads, device=device).requires_grad_()
    table.weighted_sum(rows, weights).backward(torch.randn(args.tokens, args.dim, device=device))
    kept, (part,) = list(table.reads), table.gradients(1.0)
    step = Step("lazy", 1, 1e-3, 0.9, 0.98, 1e-8)
    found = factors(step, state, part.rows)
    size = 2 * len(part.rows) * args.dim * (dtype.itemsize + 8)

    def whole() -> None:
        for read in kept:
            table.collect(read)
        optimizer.step()

    result = {}
    table.drop_reads()
    with torch.no_grad():
        if update_rows_compiled(table, state, step, part, found):
            result["row Adam"] = (
                seconds(lambda: update_rows_compiled(table, state, step, part, found)),
                size,
            )
        result["row Adam, plain torch"] = (
            seconds(lambda: update_rows(table, state, step, part, found)),
            size,
        )
    result["optimizer step"] = seconds(whole), size
    return result


def new_table(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> ValueTable:
    """A hidden table on the device."""
    with torch.device("meta"):
        table = ValueTable(args.slots, args.dim)
    table.hide()
    table.to(dtype).to_empty(device=device)
    table.weight.fill_(0.01)
    return table


def seconds(run: Callable[[], object]) -> float:
    """The median time of a call."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3


if __name__ == "__main__":
    sys.exit(main())
