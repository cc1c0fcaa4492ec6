"""A lossless sentencepiece tokenizer: every string decodes back to itself, with its white space and
control characters.
"""

import hashlib
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from memshard.data_pipeline.fetch import is_url
from memshard.data_pipeline.format.remote import local_copy
from memshard.io import read_small

log = logging.getLogger(__name__)
TokenizerModel = Literal["bpe", "unigram"]
TOKENIZER_FILE = "tokenizer.model"

# sentencepiece writes a space as U+2581 inside pieces, so a real U+2581 has to go
# through its bytes.
SPACE_MARK = "\u2581"
# A line that holds U+2585, sentencepiece's mark of unknown characters, is not trained on at all.
_UNTRAINED = {ord(SPACE_MARK): " ", 0x2585: " "}
BYTE_PIECES = 260  # 256 bytes, <unk>, <eos>, newline, space
MOST_LOST = 20  # lost characters that a warning names
MAX_LINE = 1000  # characters; sentencepiece silently drops training lines above 4192 bytes


def training_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text as training takes them: not blank, long ones cut."""
    for line in text.split("\n"):
        if not line.isspace():
            yield from (line[start : start + MAX_LINE] for start in range(0, len(line), MAX_LINE))


def train_tokenizer(lines: Iterable[str], vocab_size: int, model: TokenizerModel = "bpe") -> bytes:
    """Train a vocabulary of exactly `vocab_size` pieces on `training_lines` and return the
    serialised model.

    Pieces: <unk> 0, <eos> 1, newline, the 256 bytes, then learned ones, also runs of spaces. A
    vocabulary that cannot hold all characters has the most frequent ones, at least the space; all
    others are bytes. 256 to BYTE_PIECES are taken as the latter, with a warning. The result depends
    only on the lines, not on the machine's cores. Raises ValueError if the text cannot fill the
    vocabulary.
    """
    if 256 <= vocab_size < BYTE_PIECES:
        log.warning(
            "a vocabulary of bytes has %d pieces (256 bytes, <unk>, <eos>, newline, space), which "
            "--vocab %d is taken for",
            BYTE_PIECES,
            vocab_size,
        )
        vocab_size = BYTE_PIECES
    lines = list(lines)
    try:
        return _train(lines, vocab_size, model)
    except RuntimeError as error:
        if vocab_size < BYTE_PIECES or "required_chars" not in str(error):
            raise ValueError(_explain(str(error), vocab_size)) from error
    room = vocab_size - BYTE_PIECES
    # Half of it first, so that pieces of several characters are learned, too; a short text may not
    # have that many of those.
    for number in (room // 2, room):
        others = _all_but_frequent(lines, number)
        try:
            return _train((others.sub(" ", line) for line in lines), vocab_size, model)
        except RuntimeError as error:
            reason = str(error)
    raise ValueError(_explain(reason, vocab_size))


def _all_but_frequent(lines: Iterable[str], number: int) -> re.Pattern[str]:
    """Return a pattern that matches all but the most frequent characters of the lines."""
    counts = Counter[str]()
    for line in lines:
        counts.update(line.translate(_UNTRAINED))
    # Of equally frequent ones the first by code point: the same on every machine.
    order = sorted(counts, key=lambda character: (-counts[character], character))
    return re.compile(f"[^{re.escape(''.join([' ', *order[:number]]))}]")


def _train(lines: Iterable[str], vocab_size: int, model: TokenizerModel) -> bytes:
    import sentencepiece

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.translate(_UNTRAINED) for line in lines),
        model_writer=proto,
        vocab_size=vocab_size,
        model_type=model,
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        unk_id=0,
        eos_id=1,
        eos_piece="<eos>",
        bos_id=-1,
        pad_id=-1,
        num_threads=16,  # fixed: it decides the order of sums in unigram training
        minloglevel=2,
    )
    return proto.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if largest := re.search(r"too high .*<= (\d+)", message):
        return (
            f"--vocab {vocab_size} is more than this text supports: set --vocab to at most "
            f"{largest[1]}, or give more text"
        )
    if vocab_size < BYTE_PIECES:
        return (
            f"--vocab {vocab_size} cannot hold the characters of this text: set --vocab to at "
            "least 256, which holds them as bytes"
        )
    return f"the tokenizer could not be trained with --vocab {vocab_size}: {message}"


class Tokenizer:
    """A trained tokenizer, read from a model file or a data folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = (
            local_copy(path, TOKENIZER_FILE) if is_url(path) or Path(path).is_dir() else Path(path)
        )
        try:
            proto = read_small(file)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{file}: no such tokenizer; `memshard data build` writes one, and sentencepiece "
                "models of others are taken, but not Hugging Face's tokenizer.json"
            ) from None
        # Here: training needs token shards alone, and a machine may have nothing else.
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            advice = (
                "give one, or a folder that `memshard data build` wrote (Hugging Face's "
                "tokenizer.json is another format)"
                if file == Path(path)
                else "build the data set again"
            )
            raise ValueError(f"{file} is not a sentencepiece model: {advice}") from error
        self.proto = proto
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(
                f"{file} has no <eos> (its eos_id is -1), which ends every document: train it with "
                "one, or leave out --tokenizer to have one trained"
            )
        self._space_mark = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]

    def warn_if_lossy(self, texts: Sequence[str]) -> None:
        """Log a warning that shows where decoding the tokens of a text gives another one, and names
        characters that are lost.
        """
        lossy, example = 0, ""
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            decoded = self.decode(ids)
            if decoded != text:
                pairs = enumerate(zip(text, decoded, strict=False))
                ends = min(len(text), len(decoded))
                place = next((number for number, (one, other) in pairs if one != other), ends)
                begin, end = max(place - 10, 0), place + 10
                example = example or f"{text[begin:end]!r} becomes {decoded[begin:end]!r}"
                lossy += 1
        if lossy:
            log.warning(
                "the tokenizer loses text in %d of %d documents, e.g. %s%s: leave out --tokenizer "
                "to have a lossless one trained",
                lossy,
                len(texts),
                example,
                self._lost_characters(texts),
            )

    def _lost_characters(self, texts: Sequence[str]) -> str:
        """Return, as text, what is lost between two letters: characters, and runs of spaces."""
        counts = Counter("".join(texts))
        # A letter that the tokenizer surely knows.
        letter = max(filter(str.isalpha, counts), key=counts.__getitem__, default="")
        inner = {"runs of spaces": "  "} | {repr(one): one for one in sorted(counts)}
        ids = self.encode_batch([letter + text + letter for text in inner.values()])
        pairs = zip(inner.items(), ids, strict=True)
        lost = [name for (name, text), of_text in pairs if text not in self.decode(of_text)]
        more = f" and {len(lost) - MOST_LOST} others" if len(lost) > MOST_LOST else ""
        return f"; it cannot write {', '.join(lost[:MOST_LOST])}{more}" if lost else ""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without <eos>."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = -1) -> list[list[int]]:
        """Return the token ids of every text. threads: -1 for all cores; the result is the same."""
        parts = [text.split(SPACE_MARK) for text in texts]
        encoded = iter(self._encode_parts(list(chain.from_iterable(parts)), threads))
        ids = []
        for count in map(len, parts):
            text_ids = next(encoded)
            for _ in range(count - 1):
                # A real U+2581 stood between the parts, so its three bytes do.
                text_ids += self._space_mark + next(encoded)
            ids.append(text_ids)
        return ids

    def _encode_parts(self, parts: list[str], threads: int) -> list[list[int]]:
        try:
            return self._processor.encode(parts, out_type=int, num_threads=threads)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                "the text is not a string, or holds half a surrogate pair, which UTF-8 cannot "
                "write: remove it"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without <eos> and those beyond the vocabulary, which a model
        with a larger one can draw; an incomplete UTF-8 sequence becomes U+FFFD.
        """
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        return self._processor.decode(known)

    def texts(self) -> list[str | None]:
        """Return the text of each token, its spaces included; None for bytes, <unk>, <eos> and
        other tokens that stand for no text.
        """
        processor = self._processor
        no_text = (processor.is_byte, processor.is_unknown, processor.is_control)
        return [
            None
            if any(check(token) for check in no_text)
            else processor.id_to_piece(token).replace(SPACE_MARK, " ")
            for token in range(self.vocab_size)
        ]
