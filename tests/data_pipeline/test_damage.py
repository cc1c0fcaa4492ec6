"""Damage at run time: a bad document becomes masked padding of its length, is named, and too many
of them end the run.
"""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.format.shards import read_sidecar
from memshard.data_pipeline.format.verify import verify_data
from memshard.data_pipeline.stream import IGNORE, HeldOutStream, TrainStream
from tests.data_pipeline.conftest import ORDERS, build

LENGTH, LANES = 24, 6


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def damage(folder: Path, document: int, split: str = "train") -> int:
    """Flip a bit in the middle of a document of the split's first shard; return its tokens."""
    shard = load_index(folder).splits[split].shards[0]
    offset, tokens, *_ = read_sidecar(folder, shard)[document].tolist()
    with (folder / shard.file).open("r+b") as stream:
        stream.seek(offset + tokens // 2 * 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return tokens


@pytest.mark.parametrize("order", ORDERS)
def test_a_bad_document_is_masked_and_nothing_else_changes(
    data: Path, copy: Path, order: Order, caplog: pytest.LogCaptureFixture
) -> None:
    lost = damage(copy, 5) + damage(copy, 17)
    good, bad = (
        TrainStream(data, LENGTH, LANES, 0, order=order),
        TrainStream(copy, LENGTH, LANES, 0, tolerance=0.1, order=order),
    )
    with caplog.at_level(logging.WARNING):
        whole, masked = good.batch(0, good.samples_per_epoch), bad.batch(0, good.samples_per_epoch)
    assert sorted(record.getMessage().partition(" of ")[0] for record in caplog.records) == [
        "train-00000.tar, document 17",
        "train-00000.tar, document 5",
    ]
    hidden = (masked.targets == IGNORE) & (whole.targets != IGNORE)
    assert lost - 4 * LENGTH <= int(hidden.sum()) <= lost + 2 + LENGTH
    # What is lost to damage is counted, and padding is not.
    assert bad.predicted(0, bad.samples_per_epoch) == (whole.targets != IGNORE).sum()
    assert torch.equal(masked.targets[~hidden], whole.targets[~hidden]) and torch.equal(
        masked.inputs[~hidden], whole.inputs[~hidden]
    )
    assert torch.equal(masked.documents, whole.documents) and torch.equal(
        masked.samples, whole.samples
    )
    eos = load_index(data).eos_id
    changed = masked.inputs != whole.inputs
    assert (masked.inputs[changed] == eos).all() and hidden[changed].all()
    parts = [
        TrainStream(copy, LENGTH, LANES, 0, tolerance=0.1, order=order).batch(first, 5)
        for first in range(0, 60, 5)
    ]
    assert torch.equal(torch.cat([part.targets for part in parts]), masked.targets[:60])


def test_past_the_tolerance_the_run_fails(copy: Path) -> None:
    for document in range(8):
        damage(copy, document)
    stream = TrainStream(copy, LENGTH, LANES, 0, tolerance=0.005)
    with pytest.raises(
        RuntimeError,
        match="are damaged, more than the .* tolerated, the last one train-00000.tar, document "
        ".*data verify",
    ):
        stream.batch(0, stream.samples_per_epoch)


def test_a_file_that_shrinks_or_goes_while_it_is_read(copy: Path, data: Path) -> None:
    stream, other = (
        TrainStream(copy, LENGTH, LANES, 0, tolerance=1.0),
        TrainStream(copy, LENGTH, LANES, 0, tolerance=1.0),
    )
    os.truncate(copy / "train-00000.tar", 6000)
    first = stream.batch(0, stream.samples_per_epoch)
    assert (first.targets == IGNORE).any() and (first.targets != IGNORE).any()
    (copy / "train-00001.tar").unlink()
    assert (other.batch(0, other.samples_per_epoch).targets == IGNORE).sum() > (
        first.targets == IGNORE
    ).sum()
    strict = TrainStream(data, LENGTH, LANES, 0, tolerance=0.0)
    assert (strict.batch(0, strict.samples_per_epoch).targets != IGNORE).all()


def test_a_data_set_that_is_built_anew_under_a_run_is_said(
    copy: Path, corpus: Path, tmp_path: Path
) -> None:
    """Nothing is damaged then, and `data verify` would find nothing."""
    stream = TrainStream(copy, LENGTH, LANES, 0)
    shutil.rmtree(copy)
    build(corpus, copy, vocab_size=400)
    with pytest.raises(RuntimeError, match="has been built anew since"):
        stream.batch(0, stream.samples_per_epoch)


def test_held_out_text_may_be_damaged_too(copy: Path) -> None:
    damage(copy, 1, "heldout")
    with pytest.raises(RuntimeError, match="heldout-00000.tar, document 1"):
        stream = HeldOutStream(copy, LENGTH)
        stream.batch(0, stream.windows)


def test_verify_finds_every_kind(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small"
    build(corpus, copy, shard_bytes=20_000)
    damage(copy, 3)
    (copy / "train-00001.tar").unlink()
    (copy / "heldout-00000.tar").write_bytes(b"")
    sidecar = np.load(copy / "train-00002.index.npy")
    np.save(copy / "train-00002.index.npy", sidecar[:-1])
    tar = (copy / "train-00003.tar").read_bytes()
    (copy / "train-00003.tar").write_bytes(tar[:-2048])
    with pytest.raises(ValueError) as caught:
        verify_data(copy)
    for problem in (
        "train-00000.tar: content differs from its hash (documents 3)",
        "train-00001.tar: is missing",
        "heldout-00000.tar: is empty",
        "train-00002.index.npy: content differs from its hash",
        f"train-00003.tar: has {len(tar) - 2048:,} bytes instead of {len(tar):,}",
    ):
        assert problem in str(caught.value)
