"""Text files as they come: encodings, single bad bytes, WikiExtractor's output with faults, and
files called texts that hold something else.
"""

import gzip
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from memshard.data_pipeline.prepare.inputs import Sources, find_files, pairs
from memshard.data_pipeline.prepare.inputs import jsonl as jsonl_module
from memshard.data_pipeline.prepare.inputs.encodings import LONGEST_LINE
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.prepare.workers import Watch
from memshard.launch.cli.main import main
from tests.data_pipeline.test_build import documents_of, texts_of

LINES = "".join(f"line {number} has été words — and {number * 7} more\n" for number in range(300))


def report_of(
    tmp_path: Path, *files: Path, encoding: str | None = None, documents: str = "auto"
) -> dict:
    options = {"encoding": encoding}
    return build_data(
        Sources(find_files(files), documents, options), tmp_path / "data", vocab_size=330, workers=1
    )


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("encoding", "mark", "named"),
    [
        ("utf-8", "\ufeff", None),
        ("utf-16-le", "\ufeff", None),
        ("utf-16-be", "\ufeff", None),
        ("utf-32-le", "\ufeff", None),
        ("utf-16-le", "", "utf-16-le"),
        ("utf-16-be", "", "utf-16-be"),
        ("utf-8", "", "latin-1"),
        ("cp1252", "", "cp1252"),
    ],
)
def test_text_is_read_in_the_encoding_of_its_mark_or_the_one_named(
    tmp_path: Path, zipped: bool, encoding: str, mark: str, named: str | None
) -> None:
    content = (mark + LINES).encode(encoding)
    file = tmp_path / ("a.txt.gz" if zipped else "a.txt")
    file.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    report = report_of(tmp_path, file, encoding=named, documents="line")
    assert report["documents"] == 300 and not any(report["faults"].values())
    texts = texts_of(tmp_path / "data", "train")
    assert texts and all(text + "\n" in LINES for text in texts)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "latin-1"])
def test_text_in_another_encoding_is_left_out_and_named(tmp_path: Path, encoding: str) -> None:
    """UTF-16 of English without a byte order mark is valid UTF-8, full of NULs."""
    (tmp_path / "b.txt").write_text(LINES, encoding="utf-8")
    text = LINES if encoding == "latin-1" else LINES.replace("é", "e").replace("—", "-")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding, "replace"))
    report = report_of(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", documents="line")
    assert report["files_not_utf8_first"] == [str(tmp_path / "a.txt")]
    assert report["documents"] == 300


def test_nuls_in_a_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\0" * 100 + "\n" + LINES, encoding="utf-8")
    report = report_of(tmp_path, tmp_path / "a.txt", documents="line")
    assert report["files_not_utf8"] == 0 and report["documents"] == 301


def test_a_bad_byte_costs_a_character_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = LINES.encode() * 5
    (tmp_path / "a.txt").write_bytes(content[:5000] + b"\xfc" + content[5000:])
    report = report_of(tmp_path, tmp_path / "a.txt", documents="line")
    assert report["documents"] == 1500 and report["faults"]["bad_character"] == 1
    (message,) = [text for text in caplog.messages if "a.txt" in text]
    assert "1 characters that are not UTF-8" in message and "--encoding" in message


def test_an_encoding_that_there_is_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("latin-99", "hex"):
        arguments = ["data", "build", "x", "--out", str(tmp_path / "o"), "--encoding", name]
        assert main(arguments) == 2
        assert f"{name} is no encoding of text" in capsys.readouterr().err


def test_pairs_are_read_in_the_encoding_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_bytes(LINES.replace("—", "-").encode("latin-1"))
    (tmp_path / "a.en").write_text(LINES, encoding="utf-8")
    files = (tmp_path / "a.de", tmp_path / "a.en")
    report = report_of(tmp_path, *files, encoding="latin-1", documents="pairs")
    assert report["documents"] == 300


def test_articles_without_an_end_and_text_between_them_are_kept_and_counted(
    tmp_path: Path,
) -> None:
    file = tmp_path / "wiki_00"
    file.write_text(
        'a header\n<doc id="1" url="u" title="One">\nOne\n\nBody of one.\n'
        '<doc id="2" url="u" title="Two">\nTwo\n\nBody of two.\n</doc>\n\n'
        'some text between\n</doc>\n<doc id="3" url="u" title="Three">\nThree\n</doc>\n\n'
    )
    texts, counts = documents_of(file)
    assert texts == [
        "a header\n",
        "One\n\nBody of one.\n",
        "Two\n\nBody of two.\n",
        "\nsome text between\n",
    ]
    assert counts == Counter(fault_doc_without_end=1, fault_text_outside_doc=2, empty=1, cut=0)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.ndjson", "a"])
def test_elements_of_an_array_are_documents(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_module, "READ_CHARACTERS", 50)
    records = [{"id": n, "text": f'number {n} "[{{' + "é" * n} for n in range(120)]
    for indent in (None, 1):
        content = json.dumps(records, indent=indent).encode()
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert documents_of(file)[0] == [record["text"] for record in records]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("name,text\nAnn,some text\nBob,other text\n", "a table"),
        ('{\n  "cells": [\n  ]\n}\n', "is not JSON"),
        ('{"content": "a"}\n{"content": "b"}\n', "has no key 'text'"),
        ("<html><p>Text</p></html>", "markup"),
        ("WARC/1.0\r\nWARC-Type: response\r\n\r\n", "a web archive"),
    ],
)
def test_what_is_called_a_text_and_is_structured_is_left_out_and_counted(
    tmp_path: Path, content: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "b.txt").write_text(LINES, encoding="utf-8")
    texts, counts = documents_of(tmp_path / "a.txt")
    assert texts == [] and counts["fault_structured_file"] == 1
    (message,) = caplog.messages
    assert "a.txt" in message and what in message and "--documents file" in message
    assert documents_of(tmp_path / "a.txt", "file")[0] == [content]


def test_objects_a_line_in_a_text_file_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "one"}\n{"text": "other"}\n')
    assert documents_of(tmp_path / "a.txt")[0] == ["one", "other"]


@pytest.mark.parametrize(
    "text",
    [
        "Roses are red, violets are blue,\nSugar is sweet, and so are you.\n" * 9,
        "1. Introduction\tof the thing\nA paragraph without a tab.\n",
        "\tif x:\n\t\treturn\n\telse:\n",
        "[1] J. Smith, A title, 1999.\n[2] A. Doe, Another one, 2001.\n",
        "{{Infobox}} A text that begins with braces.\n",
        "Hello, world\n",
        "<p>A paragraph</p>\n",
    ],
)
def test_prose_is_not_taken_for_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert documents_of(tmp_path / "a.txt")[0] == [text]


LONG = "a" * (LONGEST_LINE + 9)  # 70 KB of gzip; memory was six times as much as any line had


def test_a_line_without_an_end_is_a_bad_one_or_comes_in_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = tmp_path / "a.jsonl.gz"
    with gzip.open(bomb, "wt", compresslevel=1) as file:
        for text in ("one", LONG, "two"):
            file.write(f'{{"text": "{text}"}}\n')
    texts, counts = documents_of(bomb)
    assert texts == ["one", "two"] and counts["fault_bad_line"] == 1
    assert "a.jsonl.gz, line 2 has more than 67,108,864 characters" in caplog.text
    line = tmp_path / "a.txt"
    line.write_text(f"one\n{LONG}\ntwo\n")
    texts, _ = documents_of(line, "line")
    assert texts[0] == "one" and texts[-1] == "two" and "".join(texts[1:-1]) == LONG


def test_elements_lists_and_pairs_without_an_end_are_refused(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(f'[{{"text": "one"}}, {{"text": "{LONG}{LONG}"}}]')
    with pytest.raises(ValueError, match=r"a\.json is no JSON behind element 1 of its array, or"):
        documents_of(array)
    (tmp_path / "a.paths").write_text(LONG)
    with pytest.raises(ValueError, match=r"a\.paths has more than 67,108,864 characters"):
        find_files([tmp_path / "a.paths"])
    sides = [tmp_path / "a.en", tmp_path / "a.de"]
    sides[0].write_text("one\ntwo\n")
    sides[1].write_text(f"one\n{LONG}\n")
    with pytest.raises(ValueError, match=r"a\.de, line 2 has more than 67,108,864 characters"):
        list(pairs.read(sides, {}, Counter(), Watch()))


def test_hostile_tags_of_articles_take_no_time(tmp_path: Path) -> None:
    """140 KB took 13 seconds, and 1 MB minutes."""
    file = tmp_path / "wiki"
    file.write_text('<doc title="x">\nx\n</doc>\n<doc ' + 'title="' * 200_000 + "\ntext\n</doc>\n")
    began = time.process_time()
    assert documents_of(file, "wikiextractor")[0] == ["text\n"]
    assert time.process_time() - began < 5
