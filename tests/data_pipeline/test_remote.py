"""Data elsewhere: range requests over http, whole files through commands, a cache with
a limit, retries.
"""

import gzip
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memshard.data_pipeline import fetch as fetching
from memshard.data_pipeline.fetch import Unreachable, fetch, first_bytes, read_range
from memshard.data_pipeline.format import load_index, remote
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.format.remote import BlockCache, cache_folder
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream import IGNORE, TrainStream
from memshard.data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.conftest import ORDERS, build, largest_file, write_corpus
from tests.data_pipeline.range_server import Server, serving


@pytest.fixture
def server(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MEMSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.001)
    with serving(Path(shutil.copytree(data, tmp_path / "served"))) as server:
        yield server


def assert_same(one: TrainStream, other: TrainStream, first: int = 0, count: int = 200) -> None:
    assert one.fingerprint == other.fingerprint
    assert all(
        torch.equal(left, right)
        for left, right in zip(one.batch(first, count), other.batch(first, count), strict=True)
    )


def test_a_stream_over_http_is_the_local_one(
    data: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    for order in ORDERS:
        streams = [TrainStream(path, 24, 6, 0, order=order) for path in (server.url, data)]
        assert_same(streams[0], streams[1])
    assert Tokenizer(server.url).sha256 == load_index(data).tokenizer_sha256
    before = server.requests.copy()
    assert_same(TrainStream(server.url, 24, 6, 0), TrainStream(data, 24, 6, 0))
    assert {name for name in server.requests if server.requests[name] > before[name]} == {
        "index.json"
    }, "the rest is in the cache"


def test_a_rank_reads_only_what_its_rows_need(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 512)
    stream = TrainStream(server.url, 8, 4, 0)
    stream.batch(0, 1)
    shards = load_index(server.url).splits["train"].shards
    assert (
        0
        < sum(server.sent[shard.file] for shard in shards)
        < sum(shard.bytes for shard in shards) / 10
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_fetched_once_however_many_rows_come_from_it(
    data: Path, server: Server, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer blocks in memory, and fewer open, than rows go to and fro between."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(remote, "BLOCKS_IN_MEMORY", 1)
    monkeypatch.setattr(remote, "OPEN_BLOCKS", 3)
    elsewhere = TrainStream(server.url, 24, 6, 0, order=order)
    for first in (0, 300):
        assert_same(elsewhere, TrainStream(data, 24, 6, 0, order=order), first)
    for shard in load_index(data).splits["train"].shards:
        assert 1 <= server.requests[shard.file] <= -(-shard.bytes // 4096)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    blocks = os.path.realpath(cache_folder(server.url) / "blocks")
    assert sum(name.startswith(blocks) for name in opened) == 3


def test_refused_and_broken_transfers_are_tried_again(
    data: Path, server: Server, tmp_path: Path
) -> None:
    for name in ("index.json", "train-00000.tar", "train-00001.index.npy"):
        server.refuse[name], server.break_off[name] = 2, 1
    assert_same(TrainStream(server.url, 24, 6, 0), TrainStream(data, 24, 6, 0))
    server.break_off["train-00000.tar"] = 3
    assert (
        fetch(f"{server.url}/train-00000.tar", tmp_path).read_bytes()
        == (data / "train-00000.tar").read_bytes()
    )
    server.refuse["train-00000.tar"] = 100
    with pytest.raises(
        OSError, match=r"train-00000.tar could not be read, tried 5 times: HTTP Error 503"
    ):
        fetch(f"{server.url}/train-00000.tar", tmp_path)
    before = server.requests["absent"]
    with pytest.raises(OSError, match="absent could not be read, tried once: HTTP Error 404"):
        fetch(f"{server.url}/absent", tmp_path)
    assert server.requests["absent"] == before + 1


@pytest.mark.parametrize("name", ["index.json", "train-00000.index.npy", "tokenizer.model"])
def test_a_small_file_that_is_gone_is_asked_for_once(name: str, server: Server) -> None:
    """Five times before, with 15 seconds of waits: one retry was inside another."""
    (server.folder / name).unlink()
    with pytest.raises(OSError, match=rf"{name} could not be read, tried once: HTTP Error 404"):
        TrainStream(server.url, 24, 6, 0)
        Tokenizer(server.url)
    assert server.requests[name] == 1


@pytest.mark.parametrize("drip", ["body", "headers"])
def test_a_server_that_drips_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drip: str
) -> None:
    """A byte at a time would never be silence."""
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    server.drip = drip
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="train-00000.tar could not be read, tried 5 times: "):
        fetch(f"{server.url}/train-00000.tar", tmp_path)
    with pytest.raises(Unreachable, match="only .* bytes came in|no answer in"):
        read_range(f"{server.url}/train-00000.tar", 0, 5000)
    with pytest.raises(Unreachable):
        first_bytes(f"{server.url}/train-00000.tar", 5000)
    assert time.monotonic() - begun < 15
    server.drip = ""
    fetched = fetch(f"{server.url}/train-00000.tar", tmp_path).read_bytes()
    assert fetched == (server.folder / "train-00000.tar").read_bytes()


@pytest.mark.parametrize("length", ["many", "-5", "9" * 5000])
def test_a_length_that_is_no_number_is_not_believed(
    server: Server, tmp_path: Path, length: str
) -> None:
    server.length = length
    whole = (server.folder / "train-00000.tar").read_bytes()
    assert fetch(f"{server.url}/train-00000.tar", tmp_path).read_bytes() == whole
    assert read_range(f"{server.url}/train-00000.tar", 5, 500) == whole[5:500]


def test_an_outage_masks_nothing(data: Path, server: Server) -> None:
    """Neither in this stream nor, once the server is back, in the next steps."""
    stream = TrainStream(server.url, 24, 6, 0)
    for name in ("train-00000.tar", "train-00001.tar"):
        server.refuse[name] = 10**6
    with pytest.raises(Unreachable, match="tried 5 times: HTTP Error 503"):
        stream.batch(0, 200)
    server.refuse.clear()
    assert_same(stream, TrainStream(data, 24, 6, 0))


def test_what_is_cut_or_forbidden_is_told_from_an_outage(server: Server, tmp_path: Path) -> None:
    size = (server.folder / "train-00000.tar").stat().st_size
    with pytest.raises(OSError, match="bytes came instead of") as caught:
        read_range(f"{server.url}/train-00000.tar", size - 100, size + 100)
    assert not isinstance(caught.value, Unreachable)
    for command in ("exit 1", "echo no network >&2; exit 255"):
        with pytest.raises(Unreachable):
            fetch(f"pipe:{command}", tmp_path)


def test_a_shard_that_is_gone_is_masked_up_to_the_tolerance(server: Server) -> None:
    tolerant, strict = (
        TrainStream(server.url, 24, 6, 0, tolerance=1.0),
        TrainStream(server.url, 24, 6, 0),
    )
    (server.folder / "train-00001.tar").unlink()
    targets = tolerant.batch(0, tolerant.samples_per_epoch).targets
    assert 0 < (targets == IGNORE).sum() < targets.numel()
    with pytest.raises(RuntimeError, match="train-00001.tar.*404"):
        strict.batch(0, strict.samples_per_epoch)


def test_a_data_set_built_anew_at_its_url_is_read_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    TrainStream(server.url, 24, 6, 0).batch(0, 200)
    write_corpus(tmp_path / "text", seed=1)
    build(tmp_path / "text", tmp_path / "other")
    shutil.copytree(tmp_path / "other", server.folder, dirs_exist_ok=True)
    assert_same(TrainStream(server.url, 24, 6, 0), TrainStream(tmp_path / "other", 24, 6, 0))


def test_a_damaged_block_of_the_cache_is_fetched_once_more(
    data: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    TrainStream(server.url, 24, 6, 0).batch(0, 200)
    blocks = sorted((cache_folder(server.url) / "blocks").iterdir())
    for block in blocks:
        block.write_bytes(bytes(block.stat().st_size))
    assert_same(TrainStream(server.url, 24, 6, 0), TrainStream(data, 24, 6, 0))
    # The server's own damage is fetched once more and no oftener.
    (server.folder / "train-00000.tar").write_bytes(
        bytes((data / "train-00000.tar").stat().st_size)
    )
    for block in blocks:
        block.unlink(missing_ok=True)
    stream = TrainStream(server.url, 24, 6, 0, tolerance=1.0)
    assert (stream.batch(0, stream.samples_per_epoch).targets == IGNORE).any()
    with pytest.raises(RuntimeError, match="train-00000.tar.*differs from its checksum"):
        TrainStream(server.url, 24, 6, 0).batch(0, 200)


def test_a_new_cache_is_for_its_user_alone(server: Server, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache_folder(server.url)
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_verify_takes_a_url(data: Path, server: Server) -> None:
    assert verify_data(server.url) == verify_data(data) | {"data": server.url}
    (server.folder / "train-00000.tar").unlink()
    sidecar = server.folder / "train-00001.index.npy"
    sidecar.write_bytes(sidecar.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError) as caught:
        verify_data(server.url)
    for problem in (
        f"{server.url} is damaged",
        "train-00000.tar could not be read, tried once: HTTP Error 404",
        "train-00001.index.npy: content differs from its hash",
    ):
        assert problem in str(caught.value)


def test_the_cache_keeps_its_limit(
    data: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    monkeypatch.setenv("MEMSHARD_CACHE_BYTES", "20000")
    assert_same(TrainStream(server.url, 24, 6, 0), TrainStream(data, 24, 6, 0))
    kept = [file.stat().st_size for file in (cache_folder(server.url) / "blocks").iterdir()]
    assert 8192 <= sum(kept) <= 20_000 and max(kept) <= 4096
    assert server.sent["train-00000.tar"] > 20_000


@pytest.mark.parametrize("kind", ["pipe", "s3"])
def test_commands_bring_whole_files(
    data: Path, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("MEMSHARD_S3_COMMAND", f"cat {data}/$(basename {{url}})")
    url = "s3://bucket/folder" if kind == "s3" else f"pipe:cat {data}/{{file}} | cat"
    assert_same(TrainStream(url, 24, 6, 0), TrainStream(data, 24, 6, 0))
    assert Tokenizer(url).sha256 == load_index(data).tokenizer_sha256
    with pytest.raises(OSError, match=r"tried 5 times: the command ended with code 1"):
        fetch("pipe:false | cat", cache_folder(url))


def test_a_cut_pipe_is_noticed(data: Path, server: Server) -> None:
    cut = BlockCache(f"pipe:head -c 3000 {data}/{{file}}")
    with pytest.raises(OSError, match="3000 bytes came instead of"):
        cut.read("train-00000.tar", "", (data / "train-00000.tar").stat().st_size, 0, 100)


def test_sources_may_be_fetched(server: Server, tmp_path: Path) -> None:
    lines = "\n".join(
        f'{{"text": "document {number} of some words {number % 7} and more"}}'
        for number in range(200)
    )
    (server.folder / "a.jsonl").write_text(lines)
    server.break_off["a.jsonl"] = 1
    report = build_data(
        Sources((f"{server.url}/a.jsonl",)), tmp_path / "data", vocab_size=320, workers=1
    )
    assert report["documents"] == 200


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl?download=true", "a.jsonl.gz?sig=1", "download?file=7", "list.paths"],
)
def test_a_url_is_read_by_the_name_of_its_path_else_by_its_first_bytes(
    server: Server, tmp_path: Path, name: str
) -> None:
    lines = "".join(
        f'{{"text": "document {number} of some words {number % 7} and more"}}\n'
        for number in range(200)
    ).encode()
    for file in ("a.jsonl", "download"):
        (server.folder / file).write_bytes(lines)
    (server.folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (server.folder / "list.paths").write_text("a.jsonl?x=1\n")
    sources = Sources(find_files([f"{server.url}/{name}"], prefix=f"{server.url}/"))
    report = build_data(sources, tmp_path / "data", vocab_size=320, workers=1)
    assert report["files"] == 1 and report["documents"] == 200
    assert server.requests["download"] <= 2 * (name == "download?file=7")


def test_the_first_bytes_of_a_command_end_it(tmp_path: Path) -> None:
    command = f"(yes; echo 1 > {tmp_path / 'went_on'}) | cat"
    assert first_bytes(f"pipe:{command}", 6) == b"y\ny\ny\n"
    assert not (tmp_path / "went_on").exists()


def test_a_full_disk_is_neither_damage_nor_the_network(
    data: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    stream = TrainStream(server.url, 24, 6, 0)
    with largest_file(3000):
        assert_same(stream, TrainStream(data, 24, 6, 0))
        with pytest.raises(OSError, match="File too large") as caught:
            fetch(f"{server.url}/heldout-00000.tar", tmp_path)
    assert str(caught.value.filename) == str(tmp_path / "heldout-00000.tar")
    assert server.requests["heldout-00000.tar"] == 1
    (message,) = caplog.messages
    assert message.startswith("the cache is full")
