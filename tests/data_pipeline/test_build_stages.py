"""A build from web archives to shards: every document accounted for, killed at any time and resumed
to the same bytes.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.prepare.documents import Filters
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.prepare.workers import Watch, run_tasks
from tests.data_pipeline.conftest import WORDS
from tests.data_pipeline.test_build import texts_of

REPOSITORY = Path(__file__).parents[2]
SMALL = REPOSITORY.parent / "shared" / "data" / "warc" / "news_pages_small.warc.gz"
web = pytest.mark.skipif(not SMALL.exists(), reason="the sample data are not here")


def prose(words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(WORDS) + draw.choice(WORDS) for _ in range(words)]


def near_copy(words: list[str], seed: int, share: float) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(WORDS) if draw.random() < share else word for word in words]


def test_duplicates_go_and_never_straddle_the_split(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(120):
        words = prose(200, number)
        for copy, text in enumerate((words, words, near_copy(words, 1, 0.01))):
            (tmp_path / "text" / f"{copy}-{number}.txt").write_text(" ".join(text) + "\n")
    report = build_data(
        Sources(find_files([tmp_path / "text"])),
        tmp_path / "data",
        vocab_size=400,
        filters=Filters(near=True),
        deduplicate=True,
        held_out=20,
        test=10,
        workers=1,
    )
    splits = {name: texts_of(tmp_path / "data", name) for name in ("train", "heldout", "test")}
    assert (
        report["stages"]["exact_duplicate"]["documents"] == 120
        and report["stages"]["near_duplicate"]["documents"] >= 110
    )
    assert len(splits["heldout"]) == 20 and len(splits["test"]) == 10
    kept = sum(splits.values(), [])
    assert set(kept) >= {" ".join(prose(200, number)) + "\n" for number in range(120)} and len(
        set(kept)
    ) == len(kept)
    assert (
        len(kept)
        + report["stages"]["exact_duplicate"]["documents"]
        + report["stages"]["near_duplicate"]["documents"]
        == 360
    )
    with pytest.raises(
        ValueError, match="fall into the held-out split: lower --held-out and --test"
    ):
        build_data(
            Sources(find_files([tmp_path / "text"])),
            tmp_path / "other",
            vocab_size=400,
            held_out=300,
            test=300,
            workers=1,
        )


@web
def test_web_pages_become_articles_and_every_page_is_accounted_for(tmp_path: Path) -> None:
    filters = Filters("en", quality=True, near=True)
    sources = Sources((SMALL,), options={"extractor": "resiliparse"})
    report = build_data(
        sources,
        tmp_path / "data",
        vocab_size=1000,
        filters=filters,
        deduplicate=True,
        held_out=3,
        test=2,
        web=True,
    )
    stages = {name: stage["documents"] for name, stage in report["stages"].items()}
    assert stages["pages"] == report["archive"]["responses"] == 72
    assert stages["pages"] == stages["text"] + sum(
        number for name, number in stages.items() if name.startswith("page_")
    )
    kept = stages["text"] - sum(
        number for name, number in stages.items() if not name.startswith("page") and name != "text"
    )
    assert kept == report["documents"] and 45 <= kept <= 60 and stages["page_language"] == 12
    articles = [
        text
        for split in ("train", "heldout", "test")
        for text in texts_of(tmp_path / "data", split)
    ]
    assert any("Van Der Beek" in text for text in articles)
    assert not any("<p>" in text or "<div" in text for text in articles)
    assert verify_data(tmp_path / "data")["test"]["documents"] == 2
    assert load_index(tmp_path / "data").splits["heldout"].documents == 3


def test_an_item_that_hangs_or_kills_its_worker_is_left_out(tmp_path: Path) -> None:
    run_tasks(
        bad_task, [(tmp_path / "a", "sleep"), (tmp_path / "b", "die")], 2, "testing", seconds=0.5
    )
    assert [json.loads((tmp_path / name).read_text()) for name in "ab"] == [
        [0, 1, 2, 4],
        [0, 1, 2, 4],
    ]
    with pytest.raises(ValueError, match="no item 3: mend it"):
        run_tasks(bad_task, [(tmp_path / "c", "raise")], 1, "testing", seconds=5)
    with pytest.raises(RuntimeError, match="a worker process died with code -9"):
        run_tasks(bad_task, [(tmp_path / "d", "die again")], 1, "testing", seconds=5)


def bad_task(watch: Watch, out: Path, kind: str) -> None:
    from memshard.data_pipeline.prepare.workers import ItemTimeout

    done = []
    for number in range(5):
        try:
            with watch.item(number):
                if number == 3 and kind == "die again":
                    os.kill(os.getpid(), signal.SIGKILL)
                if number in watch.skip:
                    continue
                if number == 3 and kind == "sleep":
                    time.sleep(60)
                if number == 3 and kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == 3 and kind == "raise":
                    raise ValueError("no item 3: mend it")
                done.append(number)
        except ItemTimeout:
            continue
    out.write_text(json.dumps(done))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def killed_builds(arguments: list[str], out: Path, seconds: list[float]) -> int:
    """Run the build, killed with its children after each of `seconds`, then to its end; return how
    many runs were killed.
    """
    killed = 0
    for limit in [*seconds, 300.0]:
        command = [sys.executable, "-m", "memshard", "data", "build", *arguments, "--out", str(out)]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            assert process.wait(limit) == 0
            return killed
        except subprocess.TimeoutExpired:
            process.kill()  # its workers are left to notice that they are orphans
            process.wait()
            killed += 1
            if out.exists():  # only its end as a process was cut off
                return killed
    raise AssertionError("the build never ended")


def test_a_killed_build_of_text_resumes_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    files = sorted(corpus.iterdir())
    for name, part in (("a", files[:150]), ("b", files[150:])):
        lines = [json.dumps({"text": file.read_text()}) for file in part] * 10
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--vocab",
        "500",
        "--shard-bytes",
        "60000",
        "--dedup",
        "near",
    ]
    arguments += ["--held-out", "0.1"]
    begun = time.monotonic()
    assert not killed_builds(arguments, tmp_path / "whole", [])
    whole = time.monotonic() - begun
    draw = random.Random(time.time())
    assert (
        killed_builds(
            arguments,
            tmp_path / "killed",
            [draw.uniform(0.2, 0.7) * whole, draw.uniform(0.2, 0.7) * whole],
        )
        >= 1
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.slow
@web
def test_a_killed_build_of_archives_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    from tests.data_pipeline.test_warc import members

    parts = members()
    for number, begin in enumerate(range(0, len(parts), 15)):
        (tmp_path / f"{number}.warc.gz").write_bytes(b"".join(parts[begin : begin + 15]))
    arguments = [
        str(tmp_path / "*.warc.gz"),
        "--vocab",
        "600",
        "--shard-bytes",
        "60000",
        "--extractor",
        "resiliparse",
        "--workers",
        "2",
    ]
    begun = time.monotonic()
    assert not killed_builds(arguments, tmp_path / "whole", [])
    whole = time.monotonic() - begun
    draw = random.Random(time.time())
    for attempt in range(3):
        out = tmp_path / f"killed{attempt}"
        # The earliest first: on a machine that gets idle, a build may end before a late one.
        moments = sorted(draw.uniform(0.1, 0.7) * whole for _ in range(5))
        assert killed_builds(arguments, out, moments) >= 1
        assert contents(out) == contents(tmp_path / "whole")


def test_other_settings_redo_only_what_they_change(corpus: Path, tmp_path: Path) -> None:
    sources = Sources(find_files([corpus]))
    with pytest.raises(ValueError, match="--vocab 100000 is more"):
        build_data(sources, tmp_path / "data", vocab_size=100_000, workers=1)
    (unit,) = (tmp_path / ".data.work" / "units").iterdir()
    before = (unit / "texts").stat().st_mtime_ns
    with pytest.raises(ValueError, match="--vocab 200000 is more"):
        build_data(sources, tmp_path / "data", vocab_size=200_000, workers=1)
    assert (unit / "texts").stat().st_mtime_ns == before
    build_data(sources, tmp_path / "data", vocab_size=500, workers=1)
    build_data(sources, tmp_path / "again", vocab_size=500, tokenizer=tmp_path / "data", workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "again")


def test_list_files_and_globs(tmp_path: Path) -> None:
    for name in itertools.product("ab", "12"):
        (tmp_path / f"{''.join(name)}.txt").write_text("x")
    (tmp_path / "warc.paths").write_text("a/b.warc.gz\n\na/c.warc.gz\n")
    files = find_files(
        [str(tmp_path / "a*.txt"), tmp_path / "warc.paths", "pipe:cat x.warc"],
        prefix="https://data.commoncrawl.org/",
    )
    assert files[:2] == (tmp_path / "a1.txt", tmp_path / "a2.txt")
    assert files[2:] == (
        "https://data.commoncrawl.org/a/b.warc.gz",
        "https://data.commoncrawl.org/a/c.warc.gz",
        "pipe:cat x.warc",
    )


def test_a_full_disk_is_an_error_and_the_build_resumes(corpus: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "memshard",
        "data",
        "build",
        str(corpus),
        "--vocab",
        "500",
        "--out",
        str(tmp_path / "data"),
    ]
    limit = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000,) * 2); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    full = subprocess.run(
        [sys.executable, "-c", limit, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert full.returncode == 2 and not (tmp_path / "data").exists()
    assert full.stderr.startswith(f"memshard: error: {tmp_path}/.data.work/units/")
    assert "File too large" in full.stderr
    assert subprocess.run(arguments, cwd=REPOSITORY, capture_output=True).returncode == 0
    assert (
        verify_data(tmp_path / "data")["train"]["documents"]
        + load_index(tmp_path / "data").splits["heldout"].documents
        == 300
    )
