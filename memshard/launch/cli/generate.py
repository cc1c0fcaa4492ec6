"""memshard generate: continue a prompt."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import Subparsers

if TYPE_CHECKING:
    from memshard.data_pipeline.tokenizer import Tokenizer

DEFAULT_TOKENS = 100


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("generate", help="continue a prompt")
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder (its newest checkpoint) or a checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; empty for a new document")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"tokens to write at most (default {DEFAULT_TOKENS}, or what learned positions allow)"
    )
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides the logits (default 1)")
    heat.add_argument("--greedy", action="store_true", help="take the best token, as --temperature 0 does")
    parser.add_argument("--topk", type=int, metavar="K", help="draw among the K best tokens (default all)")
    parser.add_argument("--topp", type=float, metavar="P", help="draw among the fewest tokens of total probability P (default all)")
    parser.add_argument("--seed", type=int, default=0, help="decides the draws (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from memshard.models.decode.generate import check_request, generate, possible_tokens

    sampling = {"temperature": 0.0 if args.greedy else args.temperature, "topk": args.topk, "topp": args.topp}
    with usage_errors():
        from memshard.trainer.checkpoint.load_model import load

        loaded = load(args.checkpoint)
        # A document begins after <eos>.
        prompt = torch.tensor([loaded.tokenizer.encode(args.prompt) or [loaded.tokenizer.eos_id]])
        possible = possible_tokens(loaded.model, prompt.shape[1])
        limit = args.max_tokens if args.max_tokens is not None else min(DEFAULT_TOKENS, possible or DEFAULT_TOKENS)
        check_request(loaded.model, prompt, limit, **sampling)

    show = not args.json
    stream = show and sys.stdout.isatty()
    growing = GrowingText(loaded.tokenizer)
    if stream:
        print(args.prompt, end="", flush=True)

    def on_token(tokens: torch.Tensor) -> None:
        piece = growing.add(int(tokens[0]))
        if stream:
            print(piece, end="", flush=True)

    began = time.perf_counter()
    tokens = generate(loaded.model, prompt, limit, stop=loaded.tokenizer.eos_id, seed=args.seed, on_token=on_token, **sampling)
    seconds = time.perf_counter() - began
    text = loaded.tokenizer.decode(tokens[0].tolist())
    if stream:
        print(text[len(growing.shown) :])
    elif show:
        print(args.prompt + text)
    return {"prompt": args.prompt, "text": text, "tokens": tokens.shape[1], "tokens_per_s": tokens.shape[1] / seconds}


class GrowingText:
    """The text of tokens that come one by one; a character whose bytes are not all there yet waits for the rest."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        self.ids.append(token)
        certain = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        new = certain[len(self.shown) :]
        self.shown += new
        return new
