"""The data folder: stock webdataset reads it, and damage is found and named."""

import gc
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.shards import read_sidecar
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.stream import TrainStream


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change it as one who may leave out its own hash, as folders of older versions do."""
    fields = json.loads((folder / "index.json").read_text())
    del fields["sha256"]
    change(fields)
    (folder / "index.json").write_text(json.dumps(fields))


def believe(folder: Path, *names: str) -> None:
    """Write the hashes of a training shard's files, and its size, into the index."""
    tar, sidecar = ((folder / name).read_bytes() for name in names)
    facts = {
        "bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "sidecar_sha256": hashlib.sha256(sidecar).hexdigest(),
    }
    edit_index(folder, lambda fields: fields["splits"]["train"]["shards"][0].update(facts))


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # webdataset leaves its files to the garbage collector
def test_stock_webdataset_reads_the_shards(data: Path) -> None:
    split = load_index(data).splits["train"]
    urls = [str(data / shard.file) for shard in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()
    lengths = np.concatenate([sample["lengths.npy"] for sample in samples])
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert tokens.dtype == np.uint16 and lengths.dtype == np.uint32
    assert (len(lengths), len(tokens)) == (split.documents, split.tokens)
    assert (tokens[np.cumsum(lengths) - 1] == load_index(data).eos_id).all()
    assert len({sample["__key__"] for sample in samples}) == len(samples) < split.documents / 8
    sidecars = np.concatenate([read_sidecar(data, shard) for shard in split.shards])
    assert (sidecars[:, 1] == lengths).all()


def test_verify_passes_a_good_folder(data: Path) -> None:
    assert verify_data(data)["train"]["tokens"] == load_index(data).splits["train"].tokens


def test_not_a_data_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a data folder.*memshard data build"):
        load_index(tmp_path)


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00000.index.npy", "tokenizer.model"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_index(copy)


def test_a_truncated_shard_is_named_wherever_it_is_cut(copy: Path) -> None:
    shard = copy / "train-00000.tar"
    content = shard.read_bytes()
    for size in range(0, len(content), 3000):
        shard.write_bytes(content[:size])
        with pytest.raises(
            ValueError,
            match=rf"train-00000.tar has {size:,} bytes but index.json says {len(content):,}",
        ):
            TrainStream(copy, 16, 4, 0)


def test_verify_covers_the_report(copy: Path) -> None:
    """Its hash is in the index, but no part of the data's fingerprint: it names files of the
    machine that built the data.
    """
    before = load_index(copy).fingerprint
    report = copy / "report.json"
    report.write_text(report.read_text().replace('"documents": ', '"documents": 1', 1))
    with pytest.raises(ValueError, match="report.json: content differs from its hash"):
        verify_data(copy)
    report.unlink()
    with pytest.raises(ValueError, match="report.json: is missing"):
        verify_data(copy)
    index = json.loads((copy / "index.json").read_text())
    del index["report_sha256"], index["sha256"]
    (copy / "index.json").write_text(json.dumps(index))
    verify_data(copy)  # of an older version
    assert load_index(copy).fingerprint == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"text_bytes": ', '"text_bytes": 1'),
        ('"words": ', '"words": 1'),
        ('"eos_id": 1', '"eos_id": 2'),
        ('"eos_id": 1', '"eos_id": 1, "eos_id": 2'),
        ('"vocab_size": ', '"vocab_size": 1'),
    ],
)
def test_a_number_of_the_index_that_changed_is_noticed(before: str, after: str, copy: Path) -> None:
    """Bits per byte, say, would be wrong, and nothing else in the folder tells."""
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace(before, after, 1))
    for reads in (load_index, verify_data):
        with pytest.raises(ValueError, match="index.json is damaged .its content differs from"):
            reads(copy)


def test_verify_finds_every_changed_file(copy: Path) -> None:
    for name, place in (
        ("train-00000.tar", 5000),
        ("heldout-00000.index.npy", -1),
        ("tokenizer.model", 100),
    ):
        content = bytearray((copy / name).read_bytes())
        content[place] ^= 1
        (copy / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        verify_data(copy)
    for name in ("train-00000.tar", "heldout-00000.index.npy", "tokenizer.model"):
        assert f"{name}: content differs from its hash" in str(caught.value)
    assert "train-00001" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "a/b.tar", "..", "", "C:\\x", 5])
def test_path_tricks_are_refused(copy: Path, name: object) -> None:
    edit_index(copy, lambda fields: fields["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(ValueError, match="only plain names inside the folder"):
        load_index(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda fields: fields.update(format=99),
            r"has format 99 and this memshard reads up to 1: update memshard",
        ),
        (lambda fields: fields.update(format="x"), r"unknown format 'x'"),
        (lambda fields: fields.pop("format"), r"index.json is damaged"),
        (
            lambda fields: fields["splits"].pop("heldout"),
            r"index.json is damaged \(splits are \['train'\]",
        ),
        (
            lambda fields: fields.update(dtype="float32"),
            r"index.json is damaged \(dtype is 'float32'",
        ),
        (
            lambda fields: fields["splits"]["train"].update(tokens=1),
            r"tokens of split train do not add up",
        ),
        (
            lambda fields: fields["splits"]["train"]["shards"][0].pop("sha256"),
            r"index.json is damaged.*sha256",
        ),
    ],
)
def test_a_wrong_index_is_explained(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_index(copy, change)
    with pytest.raises(ValueError, match=message):
        load_index(copy)


def test_a_cut_index_is_explained(copy: Path) -> None:
    (copy / "index.json").write_text((copy / "index.json").read_text()[:100])
    with pytest.raises(ValueError, match="index.json is damaged"):
        load_index(copy)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [-1, 1 << 40, (1 << 63) - 1])
def test_absurd_places_and_sizes_are_refused(column: int, value: int, copy: Path) -> None:
    """Totals and hashes fit, so that only the numbers themselves give them away."""
    file = copy / "train-00000.index.npy"
    entries = np.load(file)
    entries[0, column] = value
    np.save(file, entries)
    with np.errstate(over="ignore"):
        total = int(entries[:, 1].sum())

    def change(fields: dict[str, Any]) -> None:
        split = fields["splits"]["train"]
        split["tokens"] += total - split["shards"][0]["tokens"]
        split["shards"][0].update(
            tokens=total, sidecar_sha256=hashlib.sha256(file.read_bytes()).hexdigest()
        )

    edit_index(copy, change)
    with pytest.raises(
        ValueError, match="points outside train-00000.tar|are damaged|do not add up|damaged"
    ):
        TrainStream(copy, 16, 4, 0).batch(0, 4)


def test_a_sidecar_whose_header_promises_too_much_is_refused(copy: Path) -> None:
    path = copy / "train-00000.index.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (10**15, 3)}
        )
        file.write(bytes(48))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_index(
        copy, lambda fields: fields["splits"]["train"]["shards"][0].update(sidecar_sha256=sha256)
    )
    with pytest.raises(ValueError, match="damaged|does not list"):
        TrainStream(copy, 16, 4, 0)


def npy(header: bytes, content: bytes = bytes(64)) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def npy_of(array: np.ndarray, **keywords: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **keywords)
    return stream.getvalue()


PICKLE = npy_of(np.array([[Path("a")] * 3], dtype=object))
HOSTILE_ARRAYS = {
    "a pickle": PICKLE,
    "nothing": b"",
    "2 EB": npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,), }"),
    "less than nothing": npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-5,), }"),
    "brackets": npy(b"[" * 9000),
    "signs": npy(b"-" * 9000),
    "no header": npy(b"{[1]: 2}"),
    "no dtype": npy(b"{'descr': (), 'fortran_order': False, 'shape': (8,), }"),
    "fractions": npy_of(np.ones((1, 3))),
    "names": npy_of(np.array(["a", "b"])),
    "fields": npy_of(np.zeros(3, dtype=[("a", "<u2")])),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_hostile_arrays_in_shards_and_sidecars_are_named(name: str, copy: Path) -> None:
    """Their hashes fit; numpy raised errors of six types, none with the name of a file."""
    shard = load_index(copy).splits["train"].shards[0]
    (copy / shard.sidecar).write_bytes(HOSTILE_ARRAYS[name])
    believe(copy, shard.file, shard.sidecar)
    with pytest.raises(ValueError, match=rf"{shard.sidecar} is damaged"):
        verify_data(copy)
    with pytest.raises(ValueError, match=rf"{shard.sidecar} is damaged"):
        TrainStream(copy, 16, 4, 0)


def members_of(content: bytes, kind: bytes = tarfile.REGTYPE, mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name in ("tokens.npy", "lengths.npy"):
            member = tarfile.TarInfo(f"a.{name}")
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return stream.getvalue()


HOSTILE_TARS = {name: members_of(content) for name, content in HOSTILE_ARRAYS.items()} | {
    "a bomb": members_of(bytes(20 << 20), mode="w:gz"),
    "links": members_of(b"", tarfile.SYMTYPE),
    "hard links": members_of(b"", tarfile.LNKTYPE),
    "pipes": members_of(b"", tarfile.FIFOTYPE),
    "folders": members_of(b"", tarfile.DIRTYPE),
    "half a sample": members_of(npy_of(np.zeros(3, dtype=np.uint16)))[:1024] + bytes(10240),
    "rows": members_of(npy_of(np.zeros((2, 2), dtype=np.uint16))),
    "no tar": b"hello" * 999,
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_tars_are_named_by_verify(name: str, copy: Path) -> None:
    shard = load_index(copy).splits["train"].shards[0]
    (copy / shard.file).write_bytes(HOSTILE_TARS[name])
    entries = np.zeros((shard.documents, 3), dtype=np.int64)
    entries[0, 1] = shard.tokens
    np.save(copy / shard.sidecar, entries)
    # As long as it was, so that the sidecar's places fit.
    with (copy / shard.file).open("ab") as file:
        file.truncate(shard.bytes)
    believe(copy, shard.file, shard.sidecar)
    with pytest.raises(ValueError, match=rf"{shard.file}: is no shard of tokens"):
        verify_data(copy)


@pytest.mark.parametrize("entry", [0, 2])
def test_a_sidecar_with_a_flipped_bit_is_refused(entry: int, copy: Path) -> None:
    """In an offset or a checksum it contradicts nothing, and would mask a sound document."""
    path = copy / "train-00000.index.npy"
    entries = np.load(path)
    entries[0, entry] ^= 4
    np.save(path, entries)
    with pytest.raises(ValueError, match=r"train-00000\.index\.npy is damaged \(its content"):
        TrainStream(copy, 16, 4, 0)
