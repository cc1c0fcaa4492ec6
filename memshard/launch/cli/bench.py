"""`memshard bench`: side-by-side measurements, those of `memshard/bench/catalogue.py`."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from memshard.bench.catalogue import BENCHMARKS, Benchmark
from memshard.experiments.common import compact_json
from memshard.launch.cli.outcome import UsageError, usage_errors
from memshard.launch.cli.parser import CommandParser, whole


class _BenchmarkParser(CommandParser):
    """Reads the arguments of one benchmark.

    Its file declares them, and is imported only when the benchmark is chosen: most need torch.
    """

    def __init__(self, *args: Any, benchmark: Benchmark, **kwargs: Any) -> None:
        super().__init__(*args, description=f"Measure {benchmark.measures}.", **kwargs)
        self.benchmark = benchmark
        # For every option of every benchmark: 0 rounds or rows measure nothing.
        self.register("type", int, whole())
        self.register("type", "from 0", whole(0))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = import_module(self.benchmark.module)
        module.add_arguments(self)
        if "--out" not in self._option_string_actions:
            self.add_argument(
                "--out", type=Path, metavar="FILE", help="also write the result as JSON"
            )
        self.set_defaults(run=run, module=module)
        return super().parse_known_args(args, namespace)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `bench` command."""
    bench = subparsers.add_parser("bench", help="measure parts of memshard against their peers")
    bench.add_argument("--list", action="store_true", help="what can be measured")
    bench.set_defaults(run=run_list)
    commands = bench.add_subparsers(dest="benchmark", metavar="NAME", parser_class=_BenchmarkParser)
    for benchmark in BENCHMARKS.values():
        commands.add_parser(benchmark.name, help=benchmark.measures, benchmark=benchmark)


def run_list(args: argparse.Namespace) -> dict[str, str]:
    """Print what can be measured."""
    if not args.list:
        raise UsageError(
            f"name a benchmark: {', '.join(BENCHMARKS)} (memshard bench --list says what they "
            "measure)"
        )
    if not args.json:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:<16}{benchmark.measures}")
    return {name: benchmark.measures for name, benchmark in BENCHMARKS.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the result, and write it where --out says."""
    with usage_errors():
        result: dict[str, Any] = args.module.run(args)
    if not args.json:
        args.module.show(result)
    if getattr(args, "out", None):  # one that writes a folder takes that under another name
        compact_json.write(result, args.out)
    return result
