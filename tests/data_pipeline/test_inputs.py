"""Which files are inputs, and as what they are read: by name, else by how they begin; what is left
out is counted and named.
"""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.launch.cli.main import main
from tests.data_pipeline.conftest import write_corpus

RECORDS = [
    {"text": f"document {number} of some words {number % 7} and more"} for number in range(200)
]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)
WAT = (
    b"WARC/1.0\r\nWARC-Type: metadata\r\nWARC-Target-URI: http://a/\r\nContent-Type: "
    b'application/json\r\nContent-Length: 10\r\n\r\n{"a": "b"}\r\n\r\n'
)


def built(out: Path, *sources: str | Path, documents: str = "auto", prefix: str = "") -> dict:
    """Return the report of a small build."""
    return build_data(
        Sources(find_files(sources, prefix=prefix), documents), out, vocab_size=320, workers=1
    )


@pytest.mark.parametrize(
    "name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json", "a.json.gz", "part-0"]
)
def test_objects_a_line_are_parsed_whatever_the_name(tmp_path: Path, name: str) -> None:
    content = JSONL.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert built(tmp_path / "data", tmp_path / name)["documents"] == len(RECORDS)


@pytest.mark.parametrize("zipped", [False, True])
def test_commands_are_read_by_what_they_print(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    file.write_bytes(gzip.compress(JSONL.encode()) if zipped else JSONL.encode())
    (tmp_path / "b.py").write_text(f"print(open({str(tmp_path / 'c')!r}).read())")
    (tmp_path / "c").write_text(JSONL)
    show = "zcat" if zipped else "cat"
    for number, command in enumerate(
        [f"{show} {file} | head -150", f"cat {file}", f"python3 {tmp_path / 'b.py'}"]
    ):
        report = built(tmp_path / f"data{number}", f"pipe:{command}")
        assert report["documents"] == (200 if number else 150)


# mtime=0: names of tests, which have the bytes, must be the same in all processes of a run.
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.warc.wat.gz",
            gzip.compress(WAT, mtime=0),
            "part of a web archive that is not read.*WARC, WET or ARC files",
        ),
        ("a.warc.gz", gzip.compress(WAT, mtime=0), "holds metadata records.*name the WARC or WET"),
        ("wat", gzip.compress(WAT, mtime=0), "holds metadata records"),
        ("a.cdx.gz", b"x", "part of a web archive that is not read"),
        ("index", b" CDX N b a m s k r\n", "part of a web archive"),
        ("wat.paths", b"crawl/a.warc.wat.gz\n", "a.warc.wat.gz is part of a web archive"),
        ("a.csv", b"text,label\nsome text,1\n", "a table: write its texts as jsonl"),
        ("a.parquet", b"PAR1", "a table, which is not read: .*jsonl"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "compressed as only .gz is read: .*pipe:"),
        ("a.json", b'{\n"text": "some text"\n}', "line 1 is not JSON.*over several lines, `jq -c"),
        ("a.json", b'[{"text": "some"}, {"text": "te', "a.json is no JSON behind element 1 of its"),
        (
            "a.json",
            b'["some", "text"]',
            "element 1 is a str instead of an object.*array of objects",
        ),
        ("a.json", b'[{"text": "some"}]\n{"text": "b"}', "goes on behind the end of its array"),
        ("table", b"text,label\nsome text,1\n", "table is a table: write its texts as jsonl"),
        ("table.dat", b'3,"One, two",x\n4,Three,y\n5,Four,z\n', "table.dat is a table"),
        ("table", b"id\tText of it\n" + b"1\tsome text\n" * 9000, "table is a table"),
        ("page.html", b"<!DOCTYPE html>\n<p>Text</p>", "page.html is markup.*--documents file"),
        ("dump", b"<mediawiki xmlns='x'><page/>", "dump is markup"),
    ],
)
def test_what_is_not_read_is_refused_with_the_way_out(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        built(tmp_path / "data", tmp_path / name, prefix="https://host/")


def test_a_table_is_plain_text_for_those_who_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("".join(f"text {number},1\n" for number in range(300)))
    assert built(tmp_path / "data", tmp_path / "a.csv", documents="line")["documents"] == 300


def test_folders_say_what_they_pass_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    write_corpus(text, 40)
    (text / "0000.txt").rename(text / "0000.TXT")
    for name in ("a.csv", "b.CSV", "c.parquet", "d", "e.json.gz", ".hidden"):
        (text / name).write_text("x")
    (text / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(text / "fifo.txt")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "linked.txt").write_text("a document behind a link\n")
    (text / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "circle").symlink_to(text)
    for name in (".git", "site-packages"):
        (text / name).mkdir()
        (text / name / "a.txt").write_text("x")
    arguments = [
        "data",
        "build",
        str(text),
        str(text / "0001.txt"),
        "--out",
        str(tmp_path / "data"),
        "--vocab",
        "300",
    ]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["files"] == report["documents"] == 41
    assert report["files_passed_over"] == {
        ".csv": 2,
        ".parquet": 1,
        "without an ending": 1,
        ".json.gz": 1,
        "broken link": 1,
        "no regular file": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "excluded folder": 1,
        "named twice": 1,
    }
    assert "passed over in folders: 2 .csv, 1 " in capsys.readouterr().out


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds no file ending in .*but 2 .json, 1 .arrow: "):
        find_files([tmp_path])


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="p.txt is no regular file.*pipe:COMMAND"):
        find_files([tmp_path / "p.txt"])
    os.mkfifo(tmp_path / "p.paths")
    with pytest.raises(ValueError, match="p.paths is no regular file"):
        find_files([tmp_path / "p.paths"])
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("text")
    passed_over: Counter[str] = Counter()
    assert find_files([tmp_path / "*"], passed_over=passed_over) == (tmp_path / "a.txt",)
    assert passed_over == {"no regular file": 2, "broken link": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        find_files([tmp_path])


def test_a_bad_line_is_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = JSONL.splitlines()
    lines[3], lines[50], lines[70] = '{"text": ', '{"text": 5}', '{"text": null}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = built(tmp_path / "data", tmp_path / "a.jsonl")
    assert report["documents"] == 197 and report["documents_empty"] == 1
    assert report["faults"] == {"bad_line": 2}
    (message,) = [text for text in caplog.messages if "a.jsonl" in text]
    assert "a.jsonl, line 4 is not JSON" in message and "1 more lines" in message


def test_many_bad_lines_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL + '{"body": "x"}\n' * 20)
    message = r"a.jsonl, line 201 has no key 'text' \(it has: body\).*--text-key; 13 of 213 lines"
    with pytest.raises(ValueError, match=message):
        built(tmp_path / "data", tmp_path / "a.jsonl")


def test_a_build_without_text_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError) as caught:
        built(tmp_path / "data", tmp_path / "latin.txt")
    assert "not UTF-8 text: name its encoding" in str(caught.value)
    assert "{}" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["latin.txt"]
