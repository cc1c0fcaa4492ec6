"""Decoding gives back exactly what was encoded, whatever the text."""

import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from memshard.data_pipeline.prepare import sample
from memshard.data_pipeline.prepare.index_tars import index_tars
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.prepare.sample import sample_lines
from memshard.data_pipeline.tokenizer import (
    Tokenizer,
    TokenizerModel,
    train_tokenizer,
    training_lines,
)

HARD = [
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "\tdef f(x):\n\t\treturn  x   # spaces\n",
    "carriage return\r\nand line feed\r\n\r",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and flags \U0001f1e9\U0001f1ea",
    "control \x00\x01\x07\x0b\x0c\x1b\x7f\x85 characters",
    "\u2581 sentencepiece's own space mark \u2581\u2581 \u2581",
    "decomposed e\u0301, ligature \ufb01, full width \uff21, no-break\u00a0space, byte order mark "
    "\ufeff",
    "written like pieces: <eos> <unk> <s> <0x0A> \u2047",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u2028 \u2029 \U0010ffff",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    lines = [
        line
        for text in [Path(__file__).read_text(encoding="utf-8")] * 3
        for line in training_lines(text)
    ]
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(lines, 420, request.param))
    return Tokenizer(file)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_characters(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    alphabet = " \t\r\n\u2581aeZ\u00e9\u4e2d\U0001f600" + "".join(
        chr(draw.randrange(0x2FFF)) for _ in range(50)
    )
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(500)]
    encoded = tokenizer.encode_batch(texts, threads=2)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert all(
        0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id
        for ids in encoded
        for token in ids
    )


def test_indentation_is_cheap(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("        return")) < 8 + len(tokenizer.encode("return"))


def test_long_lines_still_train() -> None:
    text = "one very long line of words that never ends " * 2000
    assert train_tokenizer(training_lines(text), 300)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"--vocab 8192 is more than this text supports: set --vocab to at most \d+",
    ):
        train_tokenizer(["the cat sat on the mat"], 8192)
    with pytest.raises(
        ValueError,
        match=r"--vocab 100 cannot hold the characters of this text: set --vocab to at least \d+",
    ):
        train_tokenizer(["the cat sat on the mat"], 100)
    with pytest.raises(FileNotFoundError, match="memshard data build"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
        Tokenizer(tmp_path)


MANY = [f"some text {number} of words {chr(0x4E00 + number)}" for number in range(3000)]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [256, 259, 260, 261, 300, 512, 1000, 3000])
def test_characters_that_a_vocabulary_cannot_hold_are_bytes(
    model: TokenizerModel, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m").write_bytes(train_tokenizer(MANY, size, model))
    tokenizer = Tokenizer(tmp_path / "m")
    assert tokenizer.vocab_size == max(size, 260)
    assert ("a vocabulary of bytes has 260 pieces" in caplog.text) == (size < 260)
    for text in (MANY[7], "x  y\n\t\0 \u2581 \U0001f600 [^]-\\", " "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Frequent words are pieces where there is room; unigram finds too few others in this text.
    assert len(tokenizer.encode(" of words")) <= (9 if size < 300 or model == "unigram" else 6)


def test_lines_with_u2585_are_trained_on() -> None:
    bars = [f"zebra quokka \u2585\u2587 special words {number % 5}" for number in range(2000)]
    others = [f"common text number {number} with more words here" for number in range(300)]
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=train_tokenizer(bars + others, 400)
    )
    assert len(processor.encode("zebra quokka special words")) < 8


@pytest.fixture
def train_other(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains a tokenizer as others do and returns its file."""

    def train(**settings: object) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(f"the quick brown fox number {n}" for n in range(500)),
            model_prefix=str(tmp_path / "other"),
            **{"vocab_size": 60, "minloglevel": 2, **settings},
        )
        return tmp_path / "other.model"

    return train


def test_the_sample_of_long_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is as likely in it as any other, wherever it stands."""
    texts = [f"{number:04d}" + "日" * 332 for number in range(2000)]  # 1000 bytes each
    assert sample_lines(texts, 0) == texts
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 200_000)
    counts = np.zeros(10)
    for seed in range(20):
        lines = sample_lines(texts, seed)
        assert len(lines) == len(set(lines)) == 200
        counts += np.bincount([int(line[:4]) // 200 for line in lines], minlength=10)
    assert abs(counts - 400).max() < 100


def test_a_lossy_tokenizer_is_named(
    train_other: Callable[..., Path],
    data: Path,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources = Sources(find_files([corpus]))
    build_data(sources, tmp_path / "fine", tokenizer=data, held_out=0.5, workers=1)
    assert not caplog.records
    build_data(sources, tmp_path / "lossy", tokenizer=train_other(), held_out=0.5, workers=1)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "loses text in 150 of 150 documents, e.g. 'document" in message
    caplog.clear()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(corpus, "text")
    index_tars(
        [tmp_path / "a.tar"], tmp_path / "raw", tokenizer=tmp_path / "other.model", workers=1
    )
    assert "loses text" in caplog.text


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({}, ["runs of spaces", r"'\t'", r"'\n'", "'é'", "'ﬁ'"]),
        (
            {"normalization_rule_name": "identity"},
            ["runs of spaces", r"'\t'", r"'\n'", "'é'", "'ﬁ'"],
        ),
        ({"byte_fallback": True, "vocab_size": 330}, ["runs of spaces", r"'\t'", r"'\n'", "'ﬁ'"]),
        (
            {
                "byte_fallback": True,
                "vocab_size": 330,
                "normalization_rule_name": "nmt_nfkc_cf",
                "remove_extra_whitespaces": False,
            },
            [r"'\t'", r"'\n'", "'T'", "'ﬁ'"],
        ),
        (
            {
                "byte_fallback": True,
                "vocab_size": 330,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
            },
            [],
        ),
    ],
)
def test_what_a_tokenizer_loses_is_named(
    train_other: Callable[..., Path],
    settings: dict,
    lost: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = Tokenizer(train_other(**settings))
    tokenizer.warn_if_lossy(["The quick\tbrown  fox\n", "the fée, ﬁne"])
    for name in lost:
        assert name in caplog.text
    assert ("cannot write" in caplog.text) == bool(lost)
    assert "'q'" not in caplog.text


def test_a_tokenizer_without_eos_is_refused_before_anything_is_read(
    train_other: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"other.model has no <eos> \(its eos_id is -1\).*train it"
    ):
        build_data(
            Sources((tmp_path / "absent.txt",)),
            tmp_path / "data",
            tokenizer=train_other(eos_id=-1),
        )


def test_the_tokenizer_of_a_hugging_face_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="is not a sentencepiece model: give one, or a folder"):
        Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match="not Hugging Face's tokenizer.json"):
        Tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")
