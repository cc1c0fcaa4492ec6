"""Existing tars of text: used as they are, in the order of token shards, tokenised by any
number of workers.
"""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.prepare.index_tars import index_tars
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream import IGNORE, HeldOutStream, TrainStream
from memshard.data_pipeline.stream.prefetch import Prefetched
from memshard.data_pipeline.stream.rank_share import rank_share
from memshard.data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.conftest import ORDERS

LENGTH, LANES = 24, 6


@pytest.fixture(scope="module")
def tars(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write the corpus as WebDataset samples of a text and something else, in the order in which a
    build reads it.
    """
    folder, files = tmp_path_factory.mktemp("tars"), sorted(corpus.iterdir())
    for number in range(3):
        with tarfile.open(folder / f"part-{number}.tar", "w") as archive:
            for file in files[number * 100 : number * 100 + 100]:
                for suffix, content in (("txt", file.read_bytes()), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{file.stem}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def raw(tars: list[Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "data"
    index_tars(tars, out, tokenizer=data, held_out=30, workers=1)
    return out


def test_raw_text_gives_the_stream_of_token_shards(
    raw: Path, corpus: Path, data: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    build_data(Sources(find_files([corpus])), tokens, tokenizer=data, held_out=30, workers=1)
    for order in ORDERS:
        one, other = (TrainStream(path, LENGTH, LANES, 0, order=order) for path in (raw, tokens))
        assert one.samples_per_epoch == other.samples_per_epoch
        for first in (0, 777, one.samples_per_epoch - 5):
            assert all(
                torch.equal(a, b)
                for a, b in zip(one.batch(first, 60), other.batch(first, 60), strict=True)
            )
    held = HeldOutStream(raw, LENGTH)
    assert held.words == HeldOutStream(tokens, LENGTH).words
    assert torch.equal(
        held.batch(0, held.windows).targets,
        HeldOutStream(tokens, LENGTH).batch(0, held.windows).targets,
    )
    assert verify_data(raw)["train"]["documents"] == 270 and (raw / "part-0.tar").is_symlink()


@pytest.mark.parametrize("damage", ["a header", "cut", "cut between members", "joined", "a number"])
def test_a_tar_that_is_not_whole_is_refused(
    damage: str, tars: list[Path], data: Path, tmp_path: Path
) -> None:
    """Members behind the damage would be left out in silence."""
    content = bytearray(tars[0].read_bytes())
    with tarfile.open(tars[0]) as archive:
        at = archive.getmembers()[100].offset
    if damage == "a header":
        content[at] ^= 1
    elif damage == "a number":
        content[at + 124 : at + 136] = b"not a number"
    elif damage == "joined":
        content += bytes(content)
    else:
        del content[at + (100 if damage == "cut" else 0) :]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar .*fetch it again"):
        index_tars([tmp_path / "a.tar"], tmp_path / "out", tokenizer=data, held_out=30, workers=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_workers_change_nothing(raw: Path, order: Order, workers: int) -> None:
    stream = TrainStream(raw, LENGTH, LANES, 0, order=order)
    last = stream.samples_per_epoch // LANES + 3
    for rank in range(2):
        share = LANES, rank, 2, 2
        for step, batches in enumerate(
            Prefetched(stream, last - 8, last, *share, workers), last - 8
        ):
            expected = rank_share(stream, step, *share)
            assert len(batches) == len(expected) == 2
            assert all(
                torch.equal(a, b)
                for got, wanted in zip(batches, expected, strict=True)
                for a, b in zip(got, wanted, strict=True)
            )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"size": str(1 << 45)}, "ends inside big.txt"),
        ({"GNU.sparse.size": str(1 << 45), "GNU.sparse.map": "0,1"}, "big.txt has holes"),
        # The map of the holes would be in the member.
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, "hostile.tar is no tar that can be"),
    ],
)
def test_sizes_that_a_tar_claims_are_not_believed(
    header: dict[str, str], said: str, data: Path, tmp_path: Path
) -> None:
    tar = tmp_path / "hostile.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("big.txt")
        member.size, member.pax_headers = 1, header
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match=said):
        index_tars([tar], tmp_path / "out", tokenizer=data, workers=1)


def test_damaged_raw_text_is_masked_and_found(tars: list[Path], data: Path, tmp_path: Path) -> None:
    copies = [tmp_path / tar.name for tar in tars]
    for copy, tar in zip(copies, tars, strict=True):
        copy.write_bytes(tar.read_bytes())
    index_tars(copies, tmp_path / "data", tokenizer=data, held_out=30, workers=1)
    content = bytearray(copies[1].read_bytes())
    for place in range(0, len(content), 50_000):
        content[place + 600] ^= 1
    copies[1].write_bytes(content)
    stream = TrainStream(tmp_path / "data", LENGTH, LANES, 0, tolerance=1.0)
    targets = stream.batch(0, stream.samples_per_epoch).targets
    assert 0 < (targets == IGNORE).sum() < targets.numel() / 2
    with pytest.raises(ValueError, match=r"part-1.tar: content differs from its hash \(documents"):
        verify_data(tmp_path / "data")


def test_a_tokenizer_that_is_not_the_data_sets_is_refused(
    tars: list[Path], data: Path, tmp_path: Path
) -> None:
    index_tars(tars, tmp_path / "data", tokenizer=data, held_out=30, workers=1)
    other = train_tokenizer(["some words of another text and other words"] * 9, 280)
    (tmp_path / "data/tokenizer.model").write_bytes(other)
    with pytest.raises(ValueError, match="tokenizer.model is not the tokenizer that the data set"):
        TrainStream(tmp_path / "data", LENGTH, LANES, 0)


def test_bad_tars_are_named(tars: list[Path], data: Path, tmp_path: Path) -> None:
    for tokenizer in (data, None):
        with pytest.raises(ValueError, match="ends in .text: name the text's ending with --member"):
            index_tars(tars, tmp_path / "data", suffix="text", tokenizer=tokenizer, workers=1)
    (tmp_path / "cut.tar").write_bytes(tars[0].read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.tar"):
        index_tars([tmp_path / "cut.tar"], tmp_path / "data", tokenizer=data, workers=1)
    (tmp_path / "part-0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two of the tars have the same name \(part-0.tar\)"):
        index_tars([tars[0], tmp_path / "part-0.tar"], tmp_path / "data", tokenizer=data, workers=1)


def test_a_tokenizer_may_be_trained_on_the_tars(tars: list[Path], tmp_path: Path) -> None:
    report = index_tars(tars, tmp_path / "data", vocab_size=450, held_out=0.1, workers=1)
    assert report["vocabulary"] == load_index(tmp_path / "data").vocab_size == 450
    assert report["splits"]["train"]["documents"] == 270 and os.listdir(tmp_path) == ["data"]
