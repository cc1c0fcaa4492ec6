"""From sources to a data folder: what counts as a document, what bad input says, and the same bytes
each time.
"""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.prepare.inputs.files import Sources, find_files, reader
from memshard.data_pipeline.prepare.inputs.kinds import MAX_DOCUMENT
from memshard.data_pipeline.prepare.workers import Watch
from memshard.data_pipeline.stream.reader import SplitReader
from memshard.data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.conftest import WORDS, build, largest_file, write_corpus

REPOSITORY = Path(__file__).parents[2]
WIKIPEDIA = REPOSITORY.parent / "shared" / "data" / "text" / "wikipedia_en_extract.txt.gz"


def documents_of(
    file: Path, documents: str = "auto", **options: str
) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    sources = Sources((file,), documents, options)
    read = reader(sources.source_of(file))
    return list(read((file,), sources.settings, counts, Watch())), counts


def texts_of(folder: Path, split: str) -> list[str]:
    """Return the documents of a split, decoded."""
    import numpy as np

    tokenizer, reader = Tokenizer(folder), SplitReader(folder, split)
    starts = np.concatenate([[0], np.cumsum(reader.lengths)])
    order = np.arange(len(reader.lengths))
    rows = [
        reader.read(order, starts, starts[i : i + 1], int(reader.lengths[i]))[0][0] for i in order
    ]
    assert all(row[-1] == tokenizer.eos_id and tokenizer.eos_id not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_every_document_comes_back_exactly_once(corpus: Path, data: Path) -> None:
    train, held_out = texts_of(data, "train"), texts_of(data, "heldout")
    written = sorted(file.read_text(encoding="utf-8") for file in corpus.iterdir())
    assert sorted(train + held_out) == written
    assert 0.05 < len(held_out) / len(written) < 0.2
    index = load_index(data)
    for name, texts in (("train", train), ("heldout", held_out)):
        split = index.splits[name]
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.words == sum(len(text.split()) for text in texts)
    assert len(index.splits["train"].shards) > 1


def test_rebuild_is_byte_identical(corpus: Path, data: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "again")
    files = {file.name: file.read_bytes() for file in data.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}


def test_equal_texts_never_straddle_the_split(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text" / "a", 60)
    write_corpus(tmp_path / "text" / "b", 60)
    build(tmp_path / "text", tmp_path / "data", held_out=0.3)
    held_out = texts_of(tmp_path / "data", "heldout")
    assert not set(held_out) & set(texts_of(tmp_path / "data", "train"))
    assert all(count == 2 for count in Counter(held_out).values())


def test_a_tiny_corpus_still_has_a_held_out_document(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 3)
    build(tmp_path / "text", tmp_path / "data", vocab_size=290, held_out=1e-9)
    splits = load_index(tmp_path / "data").splits
    assert (splits["train"].documents, splits["heldout"].documents) == (2, 1)


def test_large_vocabularies_use_uint32(corpus: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=8)) for _ in range(80_000)]
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("\n".join(words[number::40] * 2))
    build(tmp_path, tmp_path / "data", vocab_size=66_000, shard_bytes=1 << 28)
    assert load_index(tmp_path / "data").dtype == "uint32"
    assert sorted(texts_of(tmp_path / "data", "train"))[0] in {
        file.read_text() for file in tmp_path.glob("*.txt")
    }
    verify_data(tmp_path / "data")


def test_directories_are_read_in_order_without_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.py", "c.bin", ".git/x.txt", "site-packages/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with gzip.open(tmp_path / "a" / "c.txt.gz", "wt") as stream:
        stream.write("zipped")
    relative = [
        file.relative_to(tmp_path).as_posix() for file in find_files([tmp_path, tmp_path / "b.txt"])
    ]
    assert relative == ["b.txt", "a/b.py", "a/c.txt.gz", "a/z.md"]
    assert (
        find_files([tmp_path], [".bin"]) == find_files([tmp_path], ["bin"]) == (tmp_path / "c.bin",)
    )
    assert documents_of(tmp_path / "a" / "c.txt.gz")[0] == ["zipped"]


def test_kinds_of_documents(tmp_path: Path) -> None:
    wiki = tmp_path / "wiki_00"
    wiki.write_text(
        '<doc id="1" url="?curid=1" title="Only &amp; title">\nOnly &amp; title\n\n\n</doc>\n'
        '<doc id="2" url="?curid=2" title="Two">\nTwo\n\nBody of two.\n\n</doc>\n<doc id="3" '
        'url="" title="Three">\nCut off'
    )
    assert documents_of(wiki) == (["Two\n\nBody of two.\n", "Cut off\n"], Counter(empty=1, cut=0))
    assert len(documents_of(wiki, documents="file")[0]) == 1

    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"\xef\xbb\xbfone\r\n\n two \nthree")
    assert documents_of(lines, documents="line")[0] == ["one", " two ", "three"]
    assert documents_of(lines)[0] == ["one\r\n\n two \nthree"]

    records = tmp_path / "records.jsonl"
    records.write_text(
        '{"text": "a\\r\\nb\\u2028", "body": "x"}\n\n{"text": "", "body": "y"}\n{"text": '
        '"\\ud800", "body": "z"}\n'
    )
    assert documents_of(records) == (["a\r\nb\u2028"], Counter(empty=1, invalid=1, cut=0))
    assert documents_of(records, text_key="body")[0] == ["x", "y", "z"]


def test_long_documents_are_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    text = (
        "".join(f"line {number} of many\n" for number in range(10_000))
        + "x" * (2 * MAX_DOCUMENT)
        + "\nend"
    )
    file.write_text(text)
    documents, counts = documents_of(file)
    assert "".join(documents) == text and counts["cut"] == 1
    assert max(map(len, documents)) <= MAX_DOCUMENT
    assert documents[0].endswith("\n") and len(documents[0]) > MAX_DOCUMENT - 30


def test_of_one_long_text_about_the_share_is_held_out(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8)) + "\n" for _ in range(12_000)]
    (tmp_path / "one.txt").write_text("".join(lines))
    report = build(tmp_path / "one.txt", tmp_path / "data", held_out=0.01)
    held_out, train = (report["splits"][name]["text_bytes"] for name in ("heldout", "train"))
    assert 0.008 < held_out / (held_out + train) < 0.012
    assert report["splits"]["heldout"]["documents"] == 2 and report["documents_cut"] == 1
    documents = texts_of(tmp_path / "data", "train") + texts_of(tmp_path / "data", "heldout")
    assert sorted("".join(documents).splitlines(keepends=True)) == sorted(lines)


def test_whole_documents_and_wanted_numbers_are_not_cut_finer(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 50)
    (tmp_path / "text" / "long.txt").write_text("some long line\n" * 6000)
    report = build(tmp_path / "text", tmp_path / "data", held_out=0.01)
    assert report["documents"] == 52
    (tmp_path / "one.txt").write_text("".join(f"line {number}\n" for number in range(30_000)))
    report = build(tmp_path / "one.txt", tmp_path / "other", vocab_size=300, held_out=2)
    assert report["documents"] == 5


def test_little_held_out_text_is_said(
    corpus: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(corpus, tmp_path / "enough", held_out=0.5)
    assert not caplog.records
    report = build(corpus, tmp_path / "data", held_out=1)
    tokens = report["splits"]["heldout"]["tokens"]
    assert tokens < 1000
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"the heldout split has {tokens} tokens" in message and "--held-out" in message


def test_files_that_are_not_utf8_are_skipped_and_counted(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    (tmp_path / "text" / "latin.txt").write_bytes(b"fine at first " * 1000 + b"caf\xe9" * 2)
    report = build(tmp_path / "text", tmp_path / "data")
    assert report["files_not_utf8"] == 1 and report["files_not_utf8_first"][0].endswith("latin.txt")
    assert report["documents"] == 300


def bad_input(tmp_path: Path, content: bytes, name: str = "bad.jsonl") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', r"bad.jsonl, line 2 is not JSON"),
        (
            "bad.jsonl",
            b'{"content": "x", "id": 1}\n',
            r"bad.jsonl, line 1 has no key 'text' \(it has: content, id\).*--text-key",
        ),
        (
            "bad.jsonl",
            b'["x"]\n',
            r"element 1 is a str instead of an object with the key 'text'",
        ),
        ("bad.jsonl", b'{"text": 5}\n', r"line 1 has under 'text' no text but int.*--text-key"),
        (
            "bad.txt.gz",
            gzip.compress(b"some text " * 1000, mtime=0)[:-20],
            r"bad.txt.gz is a damaged gzip file.*fetch it again",
        ),
        ("bad.txt.gz", b"no gzip at all", r"bad.txt.gz is a damaged gzip file"),
        ("empty.txt", b"", r"the corpus is empty: 1 files .*1 empty"),
        (
            "latin.txt",
            b"caf\xe9",
            r"the corpus is empty: 1 files \(1 not UTF-8 text: .*--encoding.*, e.g. .*latin.txt\)",
        ),
        ("one.txt", b"a single document\n", r"the corpus is one document.*--documents line"),
        (
            "two.jsonl",
            b'{"text": "aa bb cc"}\n{"text": "dd ee"}\n',
            r"--vocab 500 is more than this text supports: .*at most \d+",
        ),
    ],
)
def test_bad_input_names_file_and_fix(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    source = bad_input(tmp_path, content, name)
    with pytest.raises(ValueError, match=message) as caught:
        build(source, tmp_path / "new" / "data")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "new"])
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {".data.work"}, (
        "only finished stages may stay"
    )


def test_bad_settings_name_the_option(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        find_files([tmp_path / "absent"])
    with pytest.raises(ValueError, match="holds no file ending in .txt.*--suffix"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="--held-out is 1.5"):
        build(corpus, tmp_path / "data", held_out=1.5)
    with pytest.raises(ValueError, match="--shard-bytes is 0"):
        build(corpus, tmp_path / "data", shard_bytes=0)
    with pytest.raises(ValueError, match="fall into the held-out split: lower --held-out"):
        build(corpus, tmp_path / "data", held_out=0.999999999)
    with pytest.raises(ValueError, match="does not begin with '<doc '.*--documents"):
        documents_of(bad_input(tmp_path, b"plain", "plain.txt"), documents="wikiextractor")


def test_an_existing_folder_is_never_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    build(corpus, tmp_path / "data")  # an empty folder is fine
    before = (tmp_path / "data" / "index.json").read_bytes()
    with pytest.raises(ValueError, match="exists already: choose another --out"):
        build(corpus, tmp_path / "data")
    assert (tmp_path / "data" / "index.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "memshard", *map(str, arguments)]
    return subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)


def test_command_line(corpus: Path, tmp_path: Path) -> None:
    built = command("data", "build", corpus, "--out", tmp_path / "data", "--vocab", 500, "--json")
    report = json.loads(built.stdout)
    assert report["vocabulary"] == 500
    assert report["splits"]["train"]["documents"] + report["splits"]["heldout"]["documents"] == 300
    verified = command("data", "verify", tmp_path / "data")
    assert verified.returncode == 0 and "every hash and count is right" in verified.stdout
    (tmp_path / "data" / "train-00000.tar").unlink()
    missing = command("data", "verify", tmp_path / "data")
    again = command("data", "build", corpus, "--out", tmp_path / "data")
    for failed, message in (
        (missing, "train-00000.tar: is missing"),
        (again, "exists already: choose another --out"),
    ):
        assert (
            failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
        )


@pytest.mark.skipif(not WIKIPEDIA.exists(), reason="the sample data are not here")
def test_real_wikipedia(tmp_path: Path) -> None:
    with gzip.open(WIKIPEDIA, "rt", encoding="utf-8") as stream:
        sample = stream.read(3_000_000)
    (tmp_path / "wiki_00").write_text(sample, encoding="utf-8")
    report = build(tmp_path / "wiki_00", tmp_path / "data", vocab_size=4000, held_out=0.02)
    documents, counts = documents_of(tmp_path / "wiki_00")
    assert sorted(
        texts_of(tmp_path / "data", "train") + texts_of(tmp_path / "data", "heldout")
    ) == sorted(documents)
    assert (
        len(documents) > 500 and counts["empty"] > 500
    )  # most articles of this sample are a title only
    assert "<doc " not in "".join(documents) and "</doc>" not in "".join(documents)
    assert report["splits"]["train"]["bytes_per_token"] > 3


def test_every_file_is_on_the_disk_before_a_data_set_has_its_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would leave empty files in a folder that looks whole."""
    synced = set()
    sync = os.fsync

    def record(descriptor: int) -> None:
        facts = os.fstat(descriptor)
        synced.add((facts.st_ino, facts.st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    build(corpus, tmp_path / "data")
    files = [file.stat() for file in (tmp_path / "data").iterdir()]
    assert {(facts.st_ino, facts.st_size) for facts in files} <= synced


def test_a_disk_that_fills_up_while_shards_are_written_is_named(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(5):
        letters = "".join(draw.choices("abcdefghijklmnop", k=50_000))
        (tmp_path / f"{number}.txt").write_text(letters)
    with largest_file(260_000), pytest.raises(OSError, match="File too large") as caught:
        build(tmp_path, tmp_path / "data", vocab_size=290, shard_bytes=1 << 28)
    assert str(caught.value.filename).startswith(f"{tmp_path}/.data.work/data-")
    assert not list((tmp_path / ".data.work").glob("data-*/*.partial"))
    build(tmp_path, tmp_path / "data", vocab_size=290, shard_bytes=1 << 28)
