"""Records (pairs, images): whole, each once an epoch, in batches of like length, the same on any
number of ranks.
"""

import gzip
import json
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.prepare.images import build_images
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream import IGNORE, Batch
from memshard.data_pipeline.stream.open_stream import open_held_out, open_train
from memshard.data_pipeline.stream.rank_share import rank_share
from memshard.data_pipeline.stream.reader import SplitReader
from memshard.data_pipeline.stream.records import HeldOutRecords, RecordStream
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.launch.cli.main import main
from tests.data_pipeline.conftest import WORDS
from tests.data_pipeline.test_build import texts_of

SAMPLES = Path(__file__).parents[3] / "shared" / "data"
BATCH = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    for side in ("source", "target"):
        lines = [
            f"{side} {number} " + " ".join(draw.choices(WORDS, k=draw.choice([2, 5, 20, 60])))
            for number in range(2000)
        ]
        (folder / f"{side}.txt").write_text("\n".join(lines) + "\n")
    sources = Sources((folder / "source.txt", folder / "target.txt"), documents="pairs")
    build_data(sources, folder / "data", vocab_size=400, held_out=30, workers=1)
    return folder / "data"


def record_of(batch: Batch, row: int) -> tuple[int, ...]:
    """Return a row's record: its first input and all it predicts."""
    real = batch.targets[row] != IGNORE
    assert not real.int().diff().gt(0).any(), "padding only at the end"
    return (int(batch.inputs[row, 0]), *batch.targets[row][real].tolist())


def test_pairs_come_back_whole(pairs: Path) -> None:
    index = load_index(pairs)
    assert index.kind == "pairs" and verify_data(pairs)["train"]["documents"] == 1970
    tokenizer, stream = Tokenizer(pairs), open_train(str(pairs), 400, BATCH, 0)
    epoch = [stream.batch(step * BATCH, BATCH) for step in range(stream.samples_per_epoch // BATCH)]
    records = [record_of(batch, row) for batch in epoch for row in range(BATCH)]
    assert max(Counter(records).values()) == 1 and len(records) == 1970 // BATCH * BATCH
    for record in records[:50]:
        assert record.count(index.eos_id) == 2 and record[-1] == index.eos_id
        source = tokenizer.decode(record[: record.index(index.eos_id)]).split()
        target = tokenizer.decode(record[record.index(index.eos_id) + 1 :]).split()
        assert (source[0], target[0]) == ("source", "target") and source[1] == target[1]
    assert [stream.tokens_read(step) for step in range(len(epoch))] == [
        int((batch.targets != IGNORE).sum()) for batch in epoch
    ]
    padding = 1 - sum(map(len, records)) / sum(batch.inputs.numel() + BATCH for batch in epoch)
    assert padding < 0.15, "buckets of like length"
    assert len({batch.inputs.shape[1] for batch in epoch[:20]}) > 3, (
        "batches of all lengths are mixed"
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_any_ranks_see_the_same_records(pairs: Path, ranks: int, micro_batch: int | None) -> None:
    stream = RecordStream(pairs, 400, BATCH, 1)
    last = stream.samples_per_epoch // BATCH
    for step in (0, 7, last - 1, last, 3 * last + 1):
        shares = [
            rank_share(RecordStream(pairs, 400, BATCH, 1), step, BATCH, rank, ranks, micro_batch)
            for rank in range(ranks)
        ]
        passes = [part for parts in zip(*shares, strict=True) for part in parts]
        rows = torch.cat([part.targets for part in passes])
        samples = torch.cat([part.samples for part in passes])
        assert torch.equal(rows[samples >= 0], stream.batch(step * BATCH, BATCH).targets)
        assert (rows[samples < 0] == IGNORE).all()


def test_long_records_are_left_out_not_cut(pairs: Path) -> None:
    lengths = RecordStream(pairs, 400, BATCH, 0)._reader.lengths
    stream = RecordStream(pairs, 60, BATCH, 0)
    assert stream.samples_per_epoch == int((lengths <= 61).sum()) // BATCH * BATCH
    eos = load_index(pairs).eos_id
    for step in range(0, stream.samples_per_epoch // BATCH, 7):
        batch = stream.batch(step * BATCH, BATCH)
        assert all(record_of(batch, row)[-1] == eos for row in range(BATCH))
    with pytest.raises(ValueError, match="less than train.batch 5000: lower it"):
        RecordStream(pairs, 400, 5000, 0)


def test_held_out_records(pairs: Path) -> None:
    held_out = open_held_out(str(pairs), 400)
    assert isinstance(held_out, HeldOutRecords) and held_out.windows == 30
    batch = held_out.batch(0, 33)
    assert (
        batch.samples.tolist() == [*range(30), -1, -1, -1] and (batch.targets[30:] == IGNORE).all()
    )
    assert (
        int((batch.targets != IGNORE).sum())
        == held_out.tokens
        == load_index(pairs).splits["heldout"].tokens - 30
    )


def test_bad_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\nfour\n")
    (tmp_path / "b.txt").write_text("eins\nzwei\ndrei\n")
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    with pytest.raises(ValueError, match="b.txt ends at line 3 and .*a.txt goes on"):
        build_data(Sources(files, documents="pairs"), tmp_path / "data", vocab_size=300, workers=1)
    with pytest.raises(ValueError, match="source and target files in turn"):
        build_data(
            Sources(files[:1], documents="pairs"), tmp_path / "data", vocab_size=300, workers=1
        )


def test_a_text_with_the_pair_mark_stays_one_document(tmp_path: Path) -> None:
    texts = [f"number {number} with a mark \x1e inside {number}\n" for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    build_data(
        Sources(find_files([tmp_path])), tmp_path / "data", vocab_size=300, held_out=4, workers=1
    )
    assert sorted(
        texts_of(tmp_path / "data", "train") + texts_of(tmp_path / "data", "heldout")
    ) == sorted(texts)


def test_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    pictures = {
        f"{number:03d}": draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for number in range(60)
    }
    (tmp_path / "in").mkdir()
    for name, pixels in pictures.items():
        image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "again.png").write_bytes((tmp_path / "in" / "000.png").read_bytes())
    files = [Path(file) for file in find_files([tmp_path / "in"], [".png"])]
    report = build_images(files, tmp_path / "data", size=8, held_out=6, workers=1)
    assert report["images"] == 60 and report["equal"] == 1
    index = load_index(tmp_path / "data")
    assert (index.kind, index.shape, index.vocab_size) == ("images", (8, 8, 3), 257)
    stream = open_train(str(tmp_path / "data"), 192, 6, 0)
    records = [record_of(stream.batch(sample, 1), 0) for sample in range(54)]
    assert {record[:-1] for record in records} <= {
        tuple(pixels.ravel().tolist()) for pixels in pictures.values()
    }
    assert len(set(records)) == 54 and all(record[-1] == 256 for record in records)
    verify_data(tmp_path / "data")


def images_in(folder: Path, **pictures: tuple[object, dict]) -> list[Path]:
    """Save pictures, each with its settings, beside some others, and return all files."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for number in range(9):
        image.new("RGB", (8, 8), (number, number, number)).save(folder / f"{number}.png")
    for name, (picture, settings) in pictures.items():
        picture.save(folder / name.replace("_", "."), **settings)
    return [Path(file) for file in find_files([folder], [".png", ".jpg"])]


def deep_png(colours: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a colour, [height, width, 3], which Pillow reads but cannot write."""
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", colours.shape[1], colours.shape[0], 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


def test_images_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    ramp = np.arange(64).reshape(8, 8) * 4
    deep = image.fromarray((ramp << 8).astype(np.uint16))
    pictures: dict[str, tuple[object, dict]] = {"deep_png": (deep, {})}
    for orientation in range(1, 9):
        exif = image.Exif()
        exif[0x0112] = orientation
        picture = image.fromarray((ramp + 1).astype(np.uint8))
        pictures[f"turned{orientation}_png"] = (picture, {"exif": exif})
    files = images_in(tmp_path / "in", **pictures)
    colours = np.repeat((ramp + 2)[:, :, None], 3, axis=2).astype(">u2") << 8
    (tmp_path / "colours.png").write_bytes(deep_png(colours.astype(">u2")))
    files.append(tmp_path / "colours.png")
    build_images(files, tmp_path / "data", size=8, gray=True, held_out=1, workers=1)
    records = []
    for split in ("train", "heldout"):
        reader = SplitReader(tmp_path / "data", split)
        starts = np.concatenate([[0], np.cumsum(reader.lengths)])
        order = np.arange(len(reader.lengths))
        records += reader.read(order, starts, starts[:-1], 64)[0].tolist()
    assert ramp.ravel().tolist() in records
    # As EXIF's table says where row 0 and column 0 are.
    for quarters in range(4):
        for shown in (ramp + 1, (ramp + 1).T):
            assert np.rot90(shown, quarters).ravel().tolist() in records
    # Those that show the same are equal only in pixels, not as files: each is there.
    assert (ramp + 2).ravel().tolist() in records
    assert len(records) == 9 + len(pictures) + 1


def test_a_report_of_images_says_what_was_passed_over(tmp_path: Path) -> None:
    images_in(tmp_path / "in")
    for name in ("a.GIF", "b.tiff", "c.tiff"):
        (tmp_path / "in" / name).write_bytes(b"x")
    command = ["data", "build", str(tmp_path / "in"), "--images", "--out", str(tmp_path / "data")]
    assert main([*command, "--held-out", "1"]) == 0
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["files_passed_over"] == {".gif": 1, ".tiff": 2}
    assert verify_data(tmp_path / "data")["train"]["documents"] == 8


def test_an_image_that_is_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = pytest.importorskip("PIL.Image")
    files = images_in(tmp_path / "in", large_png=(image.new("L", (100, 100)), {}))
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 1000)
    build_images(files, tmp_path / "data", held_out=4, workers=1)
    assert "large.png is no image that can be read" in caplog.text
    assert "exceeds limit" in caplog.text


def test_an_image_of_many_pixels_is_left_out_before_it_is_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = pytest.importorskip("PIL.Image")
    files = images_in(tmp_path / "in", many_png=(image.new("1", (8200, 8200)), {}))
    report = build_images(files, tmp_path / "data", size=8, held_out=4, workers=1)
    assert (report["images"], report["unreadable"]) == (9, 1)
    assert "many.png is no image that can be read (it has 67,240,000 pixels, more" in caplog.text


def test_images_that_cannot_be_read_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = pytest.importorskip("PIL.Image")
    files = images_in(tmp_path / "in", cut_png=(image.new("RGB", (64, 64)), {}))
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "cut.png").read_bytes()[:60])
    (tmp_path / "in" / "no.jpg").write_bytes(b"no image")
    files += [tmp_path / "in" / "no.jpg"]
    report = build_images(files, tmp_path / "data", size=8, held_out=4, workers=1)
    assert (report["images"], report["unreadable"]) == (9, 2)
    assert sum(split["documents"] for split in report["splits"].values()) == 9
    assert "is no image that can be read" in caplog.text and "it is left out" in caplog.text
    verify_data(tmp_path / "data")
    for number in range(10):
        (tmp_path / "in" / f"bad{number}.png").write_bytes(b"no image %d" % number)
    files += sorted((tmp_path / "in").glob("bad*"))
    with pytest.raises(ValueError, match="is no image that can be read"):
        build_images(files, tmp_path / "other", size=8, held_out=4, workers=1)


def test_an_image_that_its_disk_does_not_return_is_no_damaged_one(tmp_path: Path) -> None:
    """It would be left out of the data set for good."""
    files = images_in(tmp_path / "in")
    files[0].unlink()
    files[0].symlink_to(files[0].name)  # ELOOP
    with pytest.raises(OSError, match=files[0].name):
        build_images(files, tmp_path / "data", size=8, workers=1)


def test_only_pictures_are_opened_whatever_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow has gs run a file that begins as PostScript, also when it is called .png."""
    image = pytest.importorskip("PIL.Image")
    images_in(tmp_path / "in", **{f"{n}_png": (image.new("L", (9, 9), n), {}) for n in range(4)})
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "in/hostile.png").write_text(program)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/mark\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="hostile.png is no image that can be read"):
        build_images(sorted((tmp_path / "in").iterdir()), tmp_path / "data", workers=1)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("amount", ["0", "-3", "1.5", "nan", "inf"])
@pytest.mark.parametrize("images", [True, False])
def test_amounts_are_checked_before_anything_is_read(
    tmp_path: Path, amount: str, images: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    images_in(tmp_path / "in")
    (tmp_path / "in" / "a.txt").write_text("some text\n")
    options = ["--held-out", amount, "--out", str(tmp_path / "data"), *["--images"] * images]
    assert main(["data", "build", str(tmp_path / "in"), *options]) == 2
    assert f"--held-out is {float(amount)}; it is a share" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(not SAMPLES.exists(), reason="the sample data are not here")
def test_real_pairs_and_images(tmp_path: Path) -> None:
    names = [SAMPLES / "parallel" / f"multi30k_val.{language}.gz" for language in ("de", "en")]
    report = build_data(
        Sources(tuple(names), documents="pairs"),
        tmp_path / "pairs",
        vocab_size=2000,
        held_out=100,
        workers=1,
    )
    with gzip.open(names[0], "rt") as stream:
        assert report["documents"] == len(stream.readlines()) == 1014
    pytest.importorskip("PIL")
    with tarfile.open(SAMPLES / "images" / "cifar10_test_10000_jpg.tar.gz") as archive:
        # extract(filter=) came with Python 3.11.4, and extract without it warns from 3.12 on.
        for member in [member for member in archive if member.isfile()][:50]:
            file = tmp_path / "in" / member.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.extractfile(member).read())
    files = [Path(file) for file in find_files([tmp_path / "in"], [".jpg"])]
    assert (
        build_images(files, tmp_path / "images", held_out=5, workers=1)["splits"]["train"]["tokens"]
        == 45 * 3073
    )
