"""Rows of n-grams against the public references, side by side: that they agree, and what they cost.

    OMP_NUM_THREADS=1 memshard bench ngram-hash --reference Engram

--reference is a checkout of deepseek-ai/Engram, whose demo is imported as it is, so give one that
you trust; it needs sympy, tokenizers and transformers. Qwen's is transformers' own. Random ids and
a vocabulary of made-up words; one thread; medians of interleaved rounds.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memshard.experiments.common.clock import interleave
from memshard.experiments.common.repeated import median_range
from memshard.models.ngram.build import build_addresses
from memshard.models.ngram.kinds import NgramConfig
from memshard.models.ngram.token_map import fold_text
from memshard.models.ngram.window import document_begins, windows

_DEMO = "engram_demo_v1.py"
_LAYERS = (1, 15)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help=f"a checkout of Engram, with {_DEMO}"
    )
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table (default 100,000)")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--rounds", type=int, default=9, help="interleaved rounds whose median counts (default 9)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return, for each reference there is, how many rows differ and seconds of every round.

    ValueError for a folder without the demo.
    """
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, args.vocabulary, (args.batch, args.length))
    # An end of document every 50 tokens or so.
    tokens[generator.random(tokens.shape) < 0.02] = args.vocabulary - 1
    result = {}
    if args.reference is not None:
        result["engram"] = _against_engram(args, tokens)
    if importlib.util.find_spec("transformers.models.qwen4_exp") is not None:
        result["qwen"] = _against_qwen(args, tokens)
    if not result:
        raise ValueError(
            "there is nothing to compare with: give --reference, or install a transformers that "
            "has qwen4_exp"
        )
    return result


def show(result: dict[str, Any]) -> None:
    """Print whether rows agree, and the medians with their range."""
    for name, measured in result.items():
        rows, different = measured["rows"], measured["different"]
        same = "all the same" if not different else f"{different:,} DIFFERENT"
        print(f"{name}: {rows:,} rows of {measured['tokens']:,} tokens, {same}")
        base = statistics.median(measured["seconds"]["reference"])
        for variant, seconds in measured["seconds"].items():
            ratio = base / statistics.median(seconds)
            print(
                f"  {variant:<20}{median_range(seconds, '.2f', 1e-3):>24} ms  {ratio:6.2f}x as fast"
            )


def _against_engram(args: argparse.Namespace, tokens: NDArray[np.int64]) -> dict[str, Any]:
    demo = _load(args.reference / _DEMO)
    words = _words(args.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(words, folder)
        mapping = demo.NgramHashMapping(
            engram_vocab_size=[args.rows] * (args.order - 1),
            max_ngram_size=args.order,
            n_embed_per_ngram=args.heads,
            n_head_per_ngram=args.heads,
            layer_ids=list(_LAYERS),
            tokenizer_name_or_path=folder,
            pad_id=0,
            seed=0,
        )
    token_map, count = fold_text(words)
    settings = _settings(args, "engram", _LAYERS, reset=False, pad=token_map[0])
    layers = [build_addresses(settings, count, layer) for layer in _LAYERS]
    lookup = np.array(token_map)

    def reference() -> NDArray[np.int64]:
        hashed = mapping.hash(tokens)
        sizes = mapping.vocab_size_across_layers
        # The demo adds offsets where it reads its table.
        return np.stack(
            [
                hashed[layer] + np.cumsum([0, *(s for order in sizes[layer] for s in order)])[:-1]
                for layer in _LAYERS
            ]
        )

    def with_numpy() -> NDArray[np.int64]:
        window = windows(lookup[tokens], args.order)
        return np.stack([layer.numpy_rows(window) for layer in layers])

    def with_torch() -> Tensor:
        window = windows(torch.from_numpy(lookup)[torch.from_numpy(tokens)], args.order)
        return torch.stack([layer(window) for layer in layers])

    return _compared(
        args,
        {"reference": reference, "memshard, numpy": with_numpy, "memshard, torch": with_torch},
    )


def _against_qwen(args: argparse.Namespace, tokens: NDArray[np.int64]) -> dict[str, Any]:
    from transformers.models.qwen4_exp import modeling_qwen4_exp as modeling
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    eos = args.vocabulary - 1
    settings = _settings(args, "qwen", (1,), seed=1234, eos=eos)
    config = Qwen4ExpTextConfig(
        hidden_size=settings.reads,
        vocab_size=args.vocabulary,
        ple_layer_ids=[2],
        ngram_size=args.order,
        heads_per_ngram=args.heads,
        ngram_vocab_size_base=args.rows,
        seed=settings.seed,
        eos_token_id=eos,
        # Of its attention, which is not built here; checked all the same.
        indexer_n_heads=1,
        indexer_kv_heads=1,
        indexer_head_dim=256,
        indexer_budget=4,
        indexer_compress_ratio=4,
    )
    module = modeling.Qwen4ExpTextNGramEmbedding(config, settings.reads, 1, 0)
    # Hands on the rows that it would read, one behind the other; its weight's device is asked for.
    module.ngram_embedding = nn.Identity()
    module.ngram_embedding.weight = torch.empty(0)
    layer = build_addresses(settings, args.vocabulary, 1)
    ids = torch.from_numpy(tokens)

    def reference() -> Tensor:
        rows: Tensor = module(ids, None).unflatten(-1, (args.length, -1))
        return rows

    def with_numpy() -> NDArray[np.int64]:
        window = windows(tokens, args.order, document_begins(tokens, eos))
        rows: NDArray[np.int64] = layer.numpy_rows(window)
        return rows

    def with_torch() -> Tensor:
        rows: Tensor = layer(windows(ids, args.order, document_begins(ids, eos)))
        return rows

    return _compared(
        args,
        {"reference": reference, "memshard, numpy": with_numpy, "memshard, torch": with_torch},
    )


def _settings(
    args: argparse.Namespace, rule: str, layers: tuple[int, ...], **more: Any
) -> NgramConfig:
    return NgramConfig(
        rule=rule, layers=layers, order=args.order, heads=args.heads, rows=args.rows, **more
    )


def _compared(args: argparse.Namespace, variants: dict[str, Any]) -> dict[str, Any]:
    expected, *actual = (np.asarray(variant()) for variant in variants.values())
    assert all(rows.shape == expected.shape for rows in actual)
    return {
        "tokens": args.batch * args.length,
        "rows": expected.size,
        "different": int(sum((rows != expected).sum() for rows in actual)),
        "seconds": interleave(variants, args.rounds),
    }


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a checkout of deepseek-ai/Engram by --reference")
    spec = importlib.util.spec_from_file_location("engram_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up there.
    sys.modules["engram_reference"] = module
    spec.loader.exec_module(module)
    return module


def _words(count: int) -> list[str]:
    """Return different words of which many are the same after folding."""
    draw = random.Random(0)
    letters = "aAbBcCeEéÉèîöÖßΣςﬁxyz0①\uff21\uff42İ\u0131ñÑ한日ж\ufffd \t\u3000"
    words: dict[str, None] = {}
    while len(words) < count:
        words.setdefault("".join(draw.choices(letters, k=draw.randrange(1, 6))))
    return list(words)


def _write_tokenizer(words: list[str], folder: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[0])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
