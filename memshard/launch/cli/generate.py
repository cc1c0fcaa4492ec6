"""memshard generate: continue a prompt, or translate it."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import MOST_SEED, Subparsers, real, whole

if TYPE_CHECKING:
    import torch

    from memshard.data_pipeline.tokenizer import Tokenizer
    from memshard.trainer.checkpoint.load_model import LoadedModel

DEFAULT_TOKENS = 100
_TIMEOUT = 600.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the `generate` command."""
    parser = subparsers.add_parser("generate", help="continue prompts, or translate them")
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a run folder (its newest checkpoint), a checkpoint or an export",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", metavar="TEXT", help="text to continue; empty for a new document"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="texts to continue as one batch, one a line, an empty one for a new document; - for "
        "standard input",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole(),
        metavar="N",
        help=f"tokens to write at most (default {DEFAULT_TOKENS}, or what learned positions allow)",
    )
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--temperature", type=real(0), metavar="T", help="divides the logits (default 1)"
    )
    heat.add_argument(
        "--greedy", action="store_true", help="take the best token, as --temperature 0 does"
    )
    parser.add_argument(
        "--topk", type=whole(), metavar="K", help="draw among the K best tokens (default all)"
    )
    parser.add_argument(
        "--topp",
        type=real(0),
        metavar="P",
        help="draw among the fewest tokens of total probability P (default all)",
    )
    add_beam_options(parser)
    parser.add_argument("--seed", type=whole(0, MOST_SEED), help="decides the draws (default 0)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic of matrix products",
    )
    parser.add_argument("--memmap", action="store_true", help="leave value tables on disk")
    parser.set_defaults(run=run)


def add_beam_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of beam search."""
    parser.add_argument(
        "--beam", type=whole(), metavar="N", help="of translators: width of the beam (default 4)"
    )
    parser.add_argument(
        "--length-penalty",
        type=real(0),
        metavar="A",
        help="of translators: how much longer translations are preferred, 0 for not (default 1)",
    )


def beam_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of beam search, with the defaults of those that were not given."""
    return {"beam": 4, "length_penalty": 1.0} | {
        name: getattr(args, name) for name in _given(args, "beam", "length_penalty")
    }


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """Return which of these options were given. A zero is given, a flag left out is False."""
    return [name for name in names if not any(getattr(args, name) is no for no in (None, False))]


def refuse_options(args: argparse.Namespace, models: str, *names: str) -> None:
    """Raise ValueError if one of these options was given, which this model would ignore.

    models: what the models do that they are for.
    """
    if given := _given(args, *names):
        raise ValueError(
            f"--{given[0].replace('_', '-')} does nothing with {args.checkpoint}: it is for models "
            f"that {models}; leave it out"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Continue or translate the prompts, in one process."""
    from memshard.launch.env import joined_ranks

    with joined_ranks(_TIMEOUT) as (device, _):
        return _generate(args, device)


def _generate(args: argparse.Namespace, device: "torch.device") -> dict[str, Any]:
    from memshard.models.decode.generate import (
        check_request,
        generate,
        left_padded,
        possible_tokens,
    )
    from memshard.trainer.precision import autocast, compute_dtype

    heat = 0.0 if args.greedy else args.temperature
    sampling = {
        "temperature": 1.0 if heat is None else heat,
        "topk": args.topk,
        "topp": args.topp,
    }
    with usage_errors():
        from memshard.trainer.checkpoint.load_model import load_model

        prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
        loaded = load_model(args.checkpoint, args.memmap, device)
        if loaded.recipe.model.translates:
            sampling_options = ("max_tokens", "temperature", "greedy", "topk", "topp", "seed")
            refuse_options(args, "continue text", *sampling_options)
            return _translate(args, loaded, prompts, compute_dtype(args.precision, device))
        refuse_options(args, "translate", "beam", "length_penalty")
        # A document begins after <eos>.
        eos = loaded.tokenizer.eos_id
        tokens, real = left_padded(
            [ids or [eos] for ids in loaded.tokenizer.encode_batch(prompts, threads=1)], eos
        )
        possible = possible_tokens(loaded.model, tokens.shape[1])
        limit = (
            args.max_tokens
            if args.max_tokens is not None
            else min(DEFAULT_TOKENS, possible or DEFAULT_TOKENS)
        )
        check_request(loaded.model, tokens, limit, **sampling)

    show = not args.json
    # A pipe or file gets the text at once, and a batch has no single place to grow at.
    stream = show and len(prompts) == 1 and sys.stdout.isatty()
    growing = GrowingText(loaded.tokenizer)
    if stream:
        print(prompts[0], end="", flush=True)

    def on_token(tokens: "torch.Tensor") -> None:
        piece = growing.add(int(tokens[0]))
        if stream:
            print(piece, end="", flush=True)

    began = time.perf_counter()
    with usage_errors(), autocast(compute_dtype(args.precision, device), device):
        new = generate(
            loaded.model,
            tokens,
            limit,
            real=real,
            stop=eos,
            seed=args.seed or 0,
            on_token=on_token,
            **sampling,
        ).tolist()
    seconds = time.perf_counter() - began
    # The batch goes on until its last row ends; what others have after their <eos> is filling.
    rows = [row[: row.index(eos) + 1] if eos in row else row for row in new]
    texts = [loaded.tokenizer.decode(row) for row in rows]
    if stream:
        # What was held back, if the text ends inside a character.
        print(texts[0][len(growing.shown) :])
    elif show:
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    results = [
        {"prompt": prompt, "text": text, "tokens": len(row)}
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
    ]
    rate = {"tokens_per_s": sum(map(len, rows)) / seconds}
    return {**results[0], **rate} if args.prompts is None else {"results": results, **rate}


def read_prompts(file: str) -> list[str]:
    """Return the lines of a UTF-8 file, or of standard input for "-", empty ones as they are, so
    that results match them by number. ValueError if there is none.
    """
    name = "standard input" if file == "-" else file
    raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        # A byte order mark is no text.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}): convert it first") from error
    # Not splitlines(), which also ends a line at U+2028, form feeds and other characters of a text.
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text:
        raise ValueError(f"{name} is empty: write a text to continue on each line")
    return prompts


def _translate(
    args: argparse.Namespace, loaded: "LoadedModel", texts: list[str], dtype: "torch.dtype"
) -> dict[str, Any]:
    from memshard.models.seq2seq import EncoderDecoder
    from memshard.trainer.evaluation.translation import translate

    assert isinstance(loaded.model, EncoderDecoder)
    translations = translate(
        loaded.model,
        loaded.tokenizer,
        texts,
        dtype,
        **beam_options(args),
    )
    if not args.json:
        print("\n".join(translations))
    results = [
        {"prompt": text, "text": translation}
        for text, translation in zip(texts, translations, strict=True)
    ]
    return results[0] if args.prompts is None else {"results": results}


class GrowingText:
    """Text that grows token by token; a character appears once all its bytes are there."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        """Return the text that this token adds."""
        self.ids.append(token)
        # All ids anew: a space or a character may depend on its neighbours. Trailing U+FFFD are
        # bytes of a character that is not complete.
        certain = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        new = certain[len(self.shown) :]
        self.shown += new
        return new
