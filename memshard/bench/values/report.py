"""The tables that `memshard bench values` prints. This file does not load torch."""

from typing import Any

OURS, FBGEMM = "memshard", "FBGEMM, row-wise Adagrad"
PARTS = ("forward", "backward", "update", "total")


def show(result: dict[str, Any]) -> None:
    """Print the result as Markdown."""
    table, sizes = result["table"], result["table"]["sizes"]
    shape = f"{sizes['slots']:,} x {sizes['dim']} {sizes['dtype']}, {sizes['reads']} reads a token"
    print(f"{shape}, {result['threads']} threads, torch {result['torch']}")
    print(
        f"{table['kernels']}; THP_MEM_ALLOC_ENABLE={int(result['thp'])}; clip {sizes['clip']:g}; "
        f"{sizes['rounds']} rounds"
    )
    print(f"stream read {table['read_bandwidth'] / 1e9:.1f} GB/s")
    for tokens, lines in table["tokens"].items():
        print(f"\n{tokens:,} tokens a step, {tokens * sizes['reads']:,} reads\n")
        print(
            "| | forward, ms | backward | update | step | processor time | ours is faster by | by "
            "processor time | GB/s | memory, GB |"
        )
        print("|---" * 10 + "|")
        for name, line in lines.items():
            shown = " | ".join(f"{line[part] * 1e3:.1f}" for part in (*PARTS, "cpu"))
            ratio = f"{_ratio(line)} | {line['cpu_ratio']:.1f}x"
            print(
                f"| {name} | {shown} | {ratio} | {line['bytes_per_s'] / 1e9:.1f} | "
                f"{_gigabytes(table['peak_memory'][name])} |"
            )
        ours = lines[OURS]
        # How many times as long as streaming the same bytes: below 1 where hot rows come
        # from the cache.
        over = table["read_bandwidth"] / ours["forward_bytes_per_s"]
        print(f"\nforward: {over:.2f} x (bytes of all reads) / (stream read bandwidth)")
        print(
            f"distinct rows a step: {ours['rows']:,.0f}; ours takes "
            f"{ours['total'] / ours['rows'] * 1e6:.2f} us for each"
        )
    print(
        "\nGB/s: the bytes that a step cannot avoid (reads twice, distinct rows and two moments "
        "in and out) over its time."
    )
    print(
        "Memory: the peak of a process that takes steps of the largest size, above what Python "
        "and torch have."
    )
    if FBGEMM in table["peak_memory"]:
        print(
            "FBGEMM has no Adam on CPU: row-wise Adagrad keeps one number a row, and updates in "
            "its backward pass."
        )
    for name, layer in result["layers"].items():
        for tokens, line in layer["tokens"].items():
            # Ours was put first in `layers.measure`, and JSON keeps the order.
            (name_ours, ours), (_, theirs) = line["seconds"].items()
            print(
                f"\nwhole layer, {tokens:,} tokens: {name_ours} {ours * 1e3:.1f} ms, {name} "
                f"{theirs * 1e3:.1f} ms: {_ratio(line)}"
            )
        (_, our_peak), (_, their_peak) = layer["peak_memory"].items()
        print(f"peak memory: {_gigabytes(our_peak)} against {_gigabytes(their_peak)} GB")
    for name, command in result["missing"].items():
        print(f"\nnot measured: {name} ({command})")


def _ratio(line: dict[str, float]) -> str:
    return f"{line['ratio']:.1f}x ({line['ratio_low']:.1f} to {line['ratio_high']:.1f})"


def _gigabytes(peak: int | None) -> str:
    return "?" if peak is None else f"{peak / 1e9:.2f}"
