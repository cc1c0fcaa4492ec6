"""Rates of the data pipeline on one core: web pages by stage, tokenisers, token stream; compared
with other packages where there are any.

  memshard bench data DIR --warc news_pages-00000.warc.gz

All are rates in CPU time of this process, the median of interleaved rounds.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from memshard.data_pipeline.format.index import TRAIN, load_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.stream.reader import SplitReader
from memshard.data_pipeline.stream.train_stream import ORDERS, TrainStream
from memshard.data_pipeline.tokenizer import Tokenizer

SAMPLE_TOKENS = 400_000
LANES = 64
Action = Callable[[], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", nargs="?", metavar="DIR", help="data folder to read the stream of")
    parser.add_argument(
        "--warc", nargs="+", default=[], metavar="FILE", help="WARC files to measure the stages on"
    )
    parser.add_argument(
        "--length",
        nargs="+",
        type=int,
        default=[256, 1024],
        metavar="N",
        help="row lengths (default 256 1024)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="interleaved rounds whose median counts (default 5)"
    )
    parser.add_argument(
        "--model",
        action="store_true",
        help="also what a 12-layer 1024-dim model takes in, in training on this machine",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what was named: the stages on WARC files, tokenizer and stream on a data folder."""
    if not args.path and not args.warc:
        raise ValueError("nothing to measure: name a data folder, or WARC files with --warc")
    result: dict[str, Any] = {}
    if args.warc:
        result["pages"] = page_rates([Path(file) for file in args.warc], args.rounds)
    if args.path:
        result["tokenizer_bytes_per_s"] = tokenizer_rates(args.path, args.rounds)
        result["stream_tokens_per_s"] = stream_rates(args.path, tuple(args.length), args.rounds)
        first = f"first pass, rows of {args.length[0]}"
        result["stream_tokens_per_s"][first] = first_pass_rate(args.path, args.length[0])
    if args.model:
        result["model_tokens_per_s"] = model_rate()
    return result


def show(result: dict[str, Any]) -> None:
    """Print the rates as a table."""
    for name, rates in result.get("pages", {}).items():
        print(
            f"{name:<28}{rates['pages_per_s']:>14,.0f} "
            f"pages/s{rates['bytes_per_s'] / 1e6:>12,.1f} MB/s"
        )
    for name, rate in result.get("tokenizer_bytes_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} MB/s")
    for name, rate in result.get("stream_tokens_per_s", {}).items():
        print(f"{name:<28}{rate / 1e6:>14,.1f} million tokens/s")
    if "model_tokens_per_s" in result:
        print(f"{'12 x 1024 model, training':<28}{result['model_tokens_per_s']:>14,.0f} tokens/s")


def stream_rates(path: str, lengths: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Return tokens a second of the training stream by order and row length, padding not counted,
    and of stock webdataset reading and decoding the same shards.
    """
    actions: dict[str, Action] = {
        f"{order}, rows of {length}": _stream(path, length, order)
        for length in lengths
        for order in ORDERS
    }
    actions["webdataset, whole shards"] = lambda: _webdataset(path)
    return _rates(actions, rounds)


def _stream(path: str, length: int, order: Order) -> Action:
    stream = TrainStream(path, length, LANES, 0, order=order)
    place = 0

    def read() -> float:
        nonlocal place
        tokens = 0
        while tokens < 5 * SAMPLE_TOKENS:
            # The place only grows, as in training: beyond the first epoch, in a new order.
            stream.batch(place, LANES)
            tokens += stream.predicted(place, LANES)
            place += LANES
        return tokens

    # A whole epoch first: it fills the page cache, orders the documents and tests their checksums.
    stream.batch(0, stream.samples_per_epoch)
    return read


def _webdataset(path: str) -> float:
    import webdataset

    shards = load_index(path).splits[TRAIN].shards[:2]
    samples = webdataset.WebDataset(
        [str(Path(path) / shard.file) for shard in shards], shardshuffle=False, empty_check=False
    ).decode()
    return float(sum(len(sample["tokens.npy"]) for sample in samples))


def first_pass_rate(path: str, length: int) -> float:
    """Return tokens a second of a fresh stream, which tests every document's checksum."""
    stream = TrainStream(path, length, LANES, 0)
    # The first batch puts the whole epoch in order, which is not what is timed here.
    stream.batch(0, 1)
    begun = time.process_time()
    tokens = sum(
        stream.batch(place, LANES).inputs.numel()
        for place in range(0, min(stream.samples_per_epoch, 40 * LANES), LANES)
    )
    return tokens / (time.process_time() - begun)


def tokenizer_rates(path: str, rounds: int) -> dict[str, float]:
    """Return bytes of text a second on one thread, for the folder's tokenizer and for Hugging Face
    tokenizers' byte BPE of the same size.
    """
    tokenizer, texts = Tokenizer(path), list(_texts(path))
    size = float(sum(len(text.encode()) for text in texts))

    def ours() -> float:
        tokenizer.encode_batch(texts, threads=1)
        return size

    actions: dict[str, Action] = {"sentencepiece": ours}
    try:
        # One thread as for ours; by default it would take every core, and CPU time counts them all.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import ByteLevelBPETokenizer

        peer = ByteLevelBPETokenizer()
        peer.train_from_iterator(texts, vocab_size=tokenizer.vocab_size, show_progress=False)

        def theirs() -> float:
            # The wrapper has no name for the fast path, which leaves out the offsets that training
            # does not need: the peer at its best.
            peer._tokenizer.encode_batch_fast(texts)
            return size

        actions["tokenizers, byte BPE"] = theirs
    except ImportError:
        pass
    return _rates(actions, rounds)


def _texts(path: str) -> Iterator[str]:
    tokenizer, reader = Tokenizer(path), SplitReader(path, TRAIN)
    starts = np.concatenate([[0], np.cumsum(reader.lengths)])
    order = np.arange(len(reader.lengths))
    for document in range(int(np.searchsorted(starts[:-1], SAMPLE_TOKENS))):
        tokens = reader.read(
            order, starts, starts[document : document + 1], int(reader.lengths[document])
        )[0][0]
        # Without the <eos> that ends each document and stands for no text.
        yield tokenizer.decode(tokens[:-1])


def page_rates(warcs: list[Path], rounds: int, pages: int = 120) -> dict[str, dict[str, float]]:
    """Return pages a second and input bytes a second of every stage from WARC to signature, over at
    most `pages` pages for the slow ones.
    """
    from memshard.data_pipeline.prepare.duplicates import band_keys, exact_hash
    from memshard.data_pipeline.web.charset import decode
    from memshard.data_pipeline.web.extract import main_text
    from memshard.data_pipeline.web.language import detect_language
    from memshard.data_pipeline.web.quality import failed_rule
    from memshard.data_pipeline.web.warc import read_pages

    bodies = [page.body for warc in warcs for page in read_pages(warc, Counter())]
    # Every n-th page rather than the first ones, so that all files are in the sample.
    sample = bodies[:: max(len(bodies) // pages, 1)]
    html = [decode(body) for body in sample]
    quick = {page: main_text(page, "resiliparse") for page in html}
    texts = [text for text in quick.values() if text]
    # Stages up to the main text count the bytes of raw pages, those after it the bytes of text:
    # each what it takes in.
    raw, kept = float(sum(map(len, sample))), float(sum(len(text.encode()) for text in texts))

    def over(function: Callable[[str], object], items: list[str]) -> Action:
        return lambda: float(len([function(item) for item in items]))

    actions: dict[str, tuple[Action, float]] = {
        "read WARC": (
            lambda: float(sum(1 for warc in warcs for _ in read_pages(warc, Counter()))),
            sum(map(len, bodies)) / len(bodies),
        ),
        "decode": (lambda: float(len([decode(body) for body in sample])), raw / len(sample)),
        "main text, resiliparse": (
            over(lambda page: main_text(page, "resiliparse"), html),
            raw / len(html),
        ),
        "main text, trafilatura": (
            # The quick text is a stage of its own.
            over(lambda page: main_text(page, "trafilatura", quick[page]), html),
            raw / len(html),
        ),
        "language": (over(detect_language, texts), kept / len(texts)),
        "quality": (over(failed_rule, texts), kept / len(texts)),
        "exact hash": (over(exact_hash, texts), kept / len(texts)),
        "MinHash": (over(band_keys, texts), kept / len(texts)),
    }
    try:
        from warcio.archiveiterator import ArchiveIterator

        def peer() -> float:
            count = 0
            for warc in warcs:
                with warc.open("rb") as stream:
                    for record in ArchiveIterator(stream):
                        if record.rec_type == "response":
                            # Our reader returns whole bodies, so the peer has to read them as well.
                            record.content_stream().read()
                            count += 1
            return float(count)

        actions["read WARC (warcio)"] = peer, sum(map(len, bodies)) / len(bodies)
    except ImportError:
        pass
    rates = _rates({name: action for name, (action, _) in actions.items()}, rounds)
    return {
        name: {"pages_per_s": rate, "bytes_per_s": rate * actions[name][1]}
        for name, rate in rates.items()
    }


def model_rate(
    layers: int = 12, dim: int = 1024, vocabulary: int = 16_384, length: int = 256
) -> float:
    """Return tokens a second of forward and backward of a dense transformer, on all threads."""
    import torch

    from memshard.models.config import ModelConfig
    from memshard.models.initialize import initialize
    from memshard.models.loss import token_losses
    from memshard.models.transformer import Transformer

    model = Transformer(
        ModelConfig(layers=layers, dim=dim, vocab_size=vocabulary, max_length=length)
    )
    initialize(model, 0)
    tokens = torch.randint(vocabulary, (2, length))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        token_losses(model(tokens)[0], tokens).mean().backward()
        times.append(time.perf_counter() - begun)
    # The first pass allocates gradients and starts threads.
    return tokens.numel() / median(times[1:])


def _rates(actions: dict[str, Action], rounds: int) -> dict[str, float]:
    """Return what each action handles in a second of CPU time, the median over rounds."""
    measured: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            begun = time.process_time()
            amount = action()
            measured[name].append(amount / (time.process_time() - begun))
    return {name: median(rates) for name, rates in measured.items()}
