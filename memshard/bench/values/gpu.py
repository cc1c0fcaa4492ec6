"""Table reads and row updates on a GPU, as shares of the bandwidth of a plain copy.

    memshard bench values-gpu --out runs/values_gpu.json

Forward: weighted sums of 128 reads a token from a table far larger than the cache, with rows drawn
evenly; its bytes are those of all reads and of the sums. Update: one fused pass of row Adam over
the distinct rows; its bytes are values and moments, read and written. A copy counts bytes read and
written as well. Medians; the cache is emptied before each repetition.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from memshard.bench.gpu.clock import copy_rate, seconds
from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import backend_for
from memshard.models.memory.table import ValueTable
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.optim.rows.step import Step

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--slots", type=int, default=1_048_576)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--reads", type=int, default=128, help="rows a token reads (default 128)")
    parser.add_argument("--tokens", type=int, default=4096)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure reads and updates in each dtype. ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError(
            "this needs a CUDA device and there is none here; memshard bench values measures the "
            "CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_rate(device)
    sizes = {name: getattr(args, name) for name in ("slots", "dim", "reads", "tokens")}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "path": backend_for(device)[1],
        "copy": bandwidth,
        "sizes": sizes,
        "dtypes": {},
    }
    for name in ("fp16", "bf16", "fp32"):
        timed = {**reads(args, DTYPES[name], device), **updates(args, DTYPES[name], device)}
        result["dtypes"][name] = {
            what: {"seconds": time, "share": size / time / bandwidth}
            for what, (time, size) in timed.items()
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the times as a Markdown table."""
    sizes = result["sizes"]
    print(
        f"{result['device']}, {sizes['slots']:,} x {sizes['dim']}, {sizes['tokens']:,} tokens of "
        f"{sizes['reads']} reads, torch {result['torch']}; {result['path']}"
    )
    print(f"copy {result['copy'] / 1e9:,.0f} GB/s\n")
    print("| dtype | what | ms | of copy bandwidth |\n|---|---|---|---|")
    for dtype, lines in result["dtypes"].items():
        for what, line in lines.items():
            print(f"| {dtype} | {what} | {line['seconds'] * 1e3:.3f} | {line['share']:.0%} |")


def reads(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Return seconds and bytes of our forward pass, of torch's EmbeddingBag, and of a plain gather,
    which writes all rows it reads.
    """
    table = new_table(args, dtype, device)
    rows = torch.randint(args.slots, (args.tokens, args.reads), device=device)
    weights = torch.rand(args.tokens, args.reads, device=device)
    gathered, sums = rows.numel() * args.dim * dtype.itemsize, args.tokens * args.dim
    flat = rows.flatten()
    with torch.no_grad():
        # EmbeddingBag takes weights of the table's dtype only; ours takes fp32 beside any.
        half = weights.to(dtype)
        bag = seconds(
            lambda: F.embedding_bag(rows, table.weight, mode="sum", per_sample_weights=half),
            device,
        )
        return {
            # Our sums are fp32 whatever the table's dtype, EmbeddingBag's have its dtype.
            "memshard": (
                seconds(lambda: table.weighted_sum(rows, weights), device),
                gathered + 4 * sums,
            ),
            "EmbeddingBag": (bag, gathered + dtype.itemsize * sums),
            "gather": (seconds(lambda: table.weight[flat], device), 2 * gathered),
        }


def updates(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Return seconds and bytes of the fused pass, of the same in plain torch, and of a whole
    optimizer step, which sorts the reads first.
    """
    table = new_table(args, dtype, device)
    optimizer = RowAdam([table], rounding="stochastic")
    state = optimizer.state[table.anchor]
    rows = torch.randint(args.slots, (args.tokens, args.reads), device=device)
    weights = torch.rand(args.tokens, args.reads, device=device).requires_grad_()
    table.weighted_sum(rows, weights).backward(torch.randn(args.tokens, args.dim, device=device))
    # A step forgets the reads it has used; `whole` hands them back before each repetition.
    kept, (part,) = list(table.reads), table.gradients(1.0)
    step = Step("lazy", 1, 1e-3, 0.9, 0.98, 1e-8)
    update = step.update(table, state, part)
    # Read and written: a value, and two moments of 4 bytes each.
    size = 2 * len(rows.unique()) * args.dim * (dtype.itemsize + 8)

    def whole() -> None:
        for read in kept:
            table.collect(read)
        optimizer.step()

    result = {}
    # The passes below update from `part`, which holds the summed gradients already.
    table.drop_reads()
    with torch.no_grad():
        # Otherwise both lines would be one.
        if table.backend is not plain_rows:
            result["row Adam"] = seconds(lambda: table.backend.adam_rows(update), device), size
        result["row Adam, plain torch"] = (
            seconds(lambda: plain_rows.adam_rows(update), device),
            size,
        )
    result["optimizer step"] = seconds(whole, device), size
    return result


def new_table(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> ValueTable:
    """Return a hidden table on the device."""
    with torch.device("meta"):
        table = ValueTable(args.slots, args.dim)
    # On the meta device until the dtype is set, so no fp32 table is ever allocated; hidden, so its
    # gradient is collected as reads, not as 4 GB.
    table.hide()
    table.to(dtype).to_empty(device=device)
    table.weight.fill_(0.01)
    return table
