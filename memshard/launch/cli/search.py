"""`memshard search`: Primer's evolution of decoder programs."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from typing import Any

from memshard.launch.cli.outcome import UsageError, usage_errors
from memshard.launch.cli.parser import whole


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `search` command."""
    search = subparsers.add_parser(
        "search",
        help="evolve decoder programs: mutations, hurdles, a journal that survives everything",
    )
    commands = search.add_subparsers(
        dest="search_command", metavar="run|report|compile", required=True
    )
    run = commands.add_parser(
        "run", help="start a search, or go on with the one in DIR, and write its report"
    )
    run.add_argument("folder", nargs="?", metavar="DIR", help="folder of journal and report")
    run.add_argument("--settings", type=Path, metavar="FILE", help="YAML file of settings")
    run.add_argument(
        "--workers",
        type=whole(),
        default=1,
        metavar="N",
        help="programs trained side by side, one thread each (default 1)",
    )
    run.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="workers of a Ray cluster that also sees text and DIR; local starts one here",
    )
    run.add_argument(
        "--explain", action="store_true", help="print all settings, their defaults and meaning"
    )
    run.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings, such as text=FILE children=100",
    )
    run.set_defaults(run=run_search)
    report = commands.add_parser("report", help="write the report of a search, finished or not")
    report.add_argument("folder", metavar="DIR", help="folder of the journal")
    report.set_defaults(run=run_report)
    compiled = commands.add_parser(
        "compile", help="a DNA as the block of a model of any width, for model.program of a recipe"
    )
    compiled.add_argument(
        "dna",
        metavar="DNA",
        help="JSON file, such as the winner.json of a search; or transformer, primer-ez and so on",
    )
    compiled.add_argument(
        "--dim", type=whole(), required=True, metavar="N", help="width of the model, model.dim"
    )
    compiled.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON file to write, for model.program",
    )
    compiled.add_argument(
        "--source", type=Path, metavar="FILE", help="also write the block as torch code"
    )
    compiled.set_defaults(run=run_compile)


def run_search(args: argparse.Namespace) -> dict[str, Any]:
    """Run a search, or go on with one, then report."""
    if args.explain:
        from memshard.search.evolve.settings import Settings
        from memshard.trainer.config.explain import walk

        keys = list(walk(Settings))
        print(
            "\n".join(
                f"{key.name}: {key.type}; default {key.default}\n{indent(key.doc, '    ')}"
                for key in keys
            )
        )
        return {
            key.name: {"type": key.type, "default": key.default, "doc": key.doc} for key in keys
        }
    if args.folder is None:
        raise UsageError("name a folder for the journal: memshard search run DIR text=FILE")
    # A stack in place of `with usage_errors()`, since set-up ends in the middle of `search`, where
    # it asks for the workers.
    with ExitStack() as setup:
        setup.enter_context(usage_errors())
        from memshard.io import check_free
        from memshard.search.evolve.journal import read
        from memshard.search.evolve.report import WRITTEN
        from memshard.search.evolve.run import StartFailed, search
        from memshard.search.evolve.settings import load_settings

        # The first line of a journal has the settings that it began with, and others are refused.
        begun = read(Path(args.folder))
        if not begun:
            check_free(Path(args.folder), WRITTEN, "choose another folder")
        settings = load_settings(
            args.settings, args.overrides, begun[0]["settings"] if begun else None
        )

        def workers() -> Any:
            started = _workers(args, settings)
            setup.close()  # errors from here on are not the user's
            return started

        try:
            search(Path(args.folder), settings, workers)
        except StartFailed as error:
            raise UsageError(str(error)) from error
    return run_report(args)


def _workers(args: argparse.Namespace, settings: Any) -> Any:
    from memshard.search.evolve.child import work

    if args.ray:
        from memshard.search.evolve.ray_workers import RayWorkers

        return RayWorkers(
            work, args.workers, settings.timeout, args.ray, gpus=int(settings.device == "cuda")
        )
    from memshard.search.evolve.workers import Processes

    # CUDA maps far more than it uses.
    return Processes(
        work, args.workers, settings.timeout, settings.memory if settings.device == "cpu" else None
    )


def run_report(args: argparse.Namespace) -> dict[str, Any]:
    """Write and print the report."""
    with usage_errors():
        from memshard.search.evolve.report import REPORT_FILE, report
        from memshard.search.evolve.run import load

        folder = Path(args.folder)
        result = report(load(folder), folder)
    if not args.json:
        print((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return result


def run_compile(args: argparse.Namespace) -> dict[str, Any]:
    """Write a program, and print what it can do."""
    with usage_errors():
        from memshard.search.dna.at_width import at_width

        block = at_width(args.dna, args.dim)
        args.out.write_text(block.program + "\n", encoding="utf-8")
        if args.source:
            args.source.write_text(block.source, encoding="utf-8")
    if not args.json:
        generates = (
            "generates with a cache"
            if block.uncached is None
            else f"cannot generate: {block.uncached}"
        )
        print(
            f"{args.out}: {block.parameters:,} parameters a block; sees no later token; {generates}"
        )
        print(f"train it with model.program={args.out} model.dim={args.dim}")
    return {"parameters": block.parameters, "uncached": block.uncached}
