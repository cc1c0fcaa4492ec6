"""The text that `memshard plan --explain` adds."""

from dataclasses import asdict

from memshard.trainer.cost.counted.rates import Rates
from memshard.trainer.cost.counted.step import SUGGESTED, Explained, Part


def explanation(explained: Explained, suggested: Explained | None, rates: Rates) -> str:
    """Return the parts of a step as a table, their sums, the ratio, what the suggested settings
    make of it, and the rates.
    """
    lines = [f"{'counted on one GPU, not measured':<48}{'TFLOP':>9}{'GB':>9}{'ms':>9}"]
    for title, parts, sign in (
        ("a step without the memory", explained.dense, 1),
        ("the memory", explained.memory, 1),
        ("the feedforward that it replaces", explained.replaced, -1),
    ):
        lines += [_line(part) for part in parts]
        total = sign * sum(part.seconds for part in parts)
        lines.append(f"{title:<48}{'':>18}{total * 1e3:9.2f}")
    lines.append(
        f"{'a step with it':<48}{'':>18}{explained.seconds * 1e3:9.2f}: {explained.ratio:.3f} times"
    )
    if suggested is not None:
        settings = " ".join(f"{key}={value}" for key, value in SUGGESTED.items())
        lines += [
            f"with {settings}",
            f"{'':66}{suggested.seconds * 1e3:9.2f}: {suggested.ratio:.3f} times",
        ]
    named = ", ".join(f"{name} {rate:.3g}" for name, rate in asdict(rates).items())
    return "\n".join([*lines, f"assumed rates: {named}"])


def _line(part: Part) -> str:
    numbers = part.flops / 1e12, part.bytes / 1e9
    counted = "".join(f"{number:9.2f}" if number else f"{'':9}" for number in numbers)
    return f"  {part.name:<46}{counted}{part.seconds * 1e3:9.2f}"
