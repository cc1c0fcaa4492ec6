"""`memshard import`: turn foreign memories, and memshard's exports, into memshard's formats."""

import argparse
from pathlib import Path
from typing import Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import Subparsers, whole


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "import", help="memories of XLM, Meta or lucidrains; exports back to checkpoints"
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a safetensors file with memory layers, or a folder that memshard export wrote",
    )
    parser.add_argument("out", metavar="OUT", help="a new folder: a memory each, or a checkpoint")
    parser.add_argument(
        "--topk",
        type=whole(),
        default=32,
        metavar="K",
        help="slots that a head reads, which the weights do not show (default 32)",
    )
    parser.add_argument(
        "--weighting",
        choices=("softmax", "relu"),
        default="softmax",
        help="how scores become weights, which the weights do not show either (default softmax; "
        "relu for lucidrains' non_competitive_gates)",
    )
    parser.add_argument(
        "--into",
        metavar="CKPT",
        help="a run folder, a checkpoint or an export of a model whose n-gram memories SRC "
        "replaces, in DeepSeek's or Qwen's format as its model.ngram.rule says",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import a file of memories, or an export."""
    source, out = Path(args.source), Path(args.out)
    with usage_errors():
        from memshard.trainer.checkpoint.open_checkpoint import is_export
        from memshard.trainer.export.bring_back import bring_back
        from memshard.trainer.export.foreign import import_memories
        from memshard.trainer.export.ngrams import import_ngrams

        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already: give the name of a new folder")
        if args.into is not None or is_export(source):
            step = (
                bring_back(source, out)
                if args.into is None
                else import_ngrams(source, args.into, out)
            )
            if not args.json:
                print(
                    f"{out}: checkpoint of step {step}, for eval, generate, export and train "
                    f"init_from={out}"
                )
            return {"checkpoint": str(out), "step": step}
        if source.is_dir():
            raise ValueError(f"{source} is no folder that memshard export wrote")
        memories = import_memories(source, out, args.topk, args.weighting)
    if not args.json:
        for memory in memories:
            print(
                f"{memory.path}: {memory.family} memory, "
                f"{', '.join(f'{key} {value}' for key, value in memory.settings.items())}"
            )
        print("load one with memshard.load_memory(folder)")
    return {
        "memories": [
            {"path": str(memory.path), "family": memory.family, **memory.settings}
            for memory in memories
        ]
    }
