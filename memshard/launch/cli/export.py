"""`memshard export`: one safetensors file from a sharded checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from memshard.launch.cli.outcome import UsageError, usage_errors
from memshard.launch.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("export", help="one safetensors file, or a Hugging Face model")
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a run folder (its newest checkpoint), a checkpoint or an export",
    )
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="of all floating-point tensors (default fp32)",
    )
    parser.add_argument(
        "--tables",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="of value tables; int8 with a scale a row (default --dtype)",
    )
    parser.add_argument(
        "--huggingface",
        action="store_true",
        help="add the code for transformers (AutoModelForCausalLM, AutoTokenizer)",
    )
    parser.add_argument(
        "--ngrams",
        action="store_true",
        help="only the n-gram memories, in DeepSeek's or Qwen's format as model.ngram.rule says, "
        "with tables as they are",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export a model, and compare its logits with the source's."""
    if args.ngrams:
        return _run_ngrams(args)
    with usage_errors():
        from memshard.trainer.export.export import export

        exported = export(args.checkpoint, args.out, args.dtype, args.tables, args.huggingface)
    if not args.json:
        print(
            f"{exported.path}: step {exported.step}, {exported.bytes / 1e6:,.1f} MB, logits as in "
            "the checkpoint",
            end="",
        )
        print(
            f" (rounding moves them by at most {exported.difference:.2g})"
            if exported.difference
            else ""
        )
    return {
        "export": str(exported.path),
        "step": exported.step,
        "bytes": exported.bytes,
        "largest_logit_difference": exported.difference,
    }


def _run_ngrams(args: argparse.Namespace) -> dict[str, Any]:
    if args.huggingface or args.tables or args.dtype != "fp32":
        raise UsageError("--ngrams goes with no other option: leave them out")
    with usage_errors():
        from memshard.trainer.export.ngrams import export_ngrams

        size = export_ngrams(args.checkpoint, Path(args.out))
    if not args.json:
        print(f"{args.out}: n-gram memories, {size / 1e6:,.1f} MB")
    return {"export": args.out, "bytes": size}
