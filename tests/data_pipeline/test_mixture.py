"""Mixtures and carried lanes: exact shares, and the same whatever the ranks and restarts."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream import IGNORE, TrainStream
from memshard.data_pipeline.stream.mixture import PERIOD, MixtureStream
from memshard.data_pipeline.stream.open_stream import open_train
from memshard.data_pipeline.stream.rank_share import rank_share
from tests.data_pipeline.conftest import ORDERS, build, write_corpus

LENGTH, LANES, SEED = 24, 12, 3


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    write_corpus(folder / "text", 90, seed=5)
    build_data(
        Sources(find_files([folder / "text"])),
        folder / "data",
        tokenizer=data,
        held_out=0.1,
        workers=1,
    )
    return folder / "data"


def mixture(
    data: Path,
    other: Path,
    by_epochs: bool = False,
    weights: tuple[float, float] = (3, 1),
    order: Order = "auto",
) -> MixtureStream:
    shares = dict(zip((str(data), str(other)), weights, strict=True))
    stream = open_train(
        str(data), LENGTH, LANES, SEED, mixture=shares, by_epochs=by_epochs, order=order
    )
    assert isinstance(stream, MixtureStream)
    return stream


@pytest.mark.parametrize("order", ORDERS)
def test_shares_are_exact_and_samples_come_in_each_corpus_order(
    data: Path, other: Path, order: Order
) -> None:
    stream = mixture(data, other, order=order)
    corpora = stream.corpora(0, 3 * PERIOD)
    assert (np.bincount(corpora.reshape(3, PERIOD)[1]) == [768, 256]).all() and len(
        set(corpora[:20])
    ) == 2
    batch = stream.batch(0, 2000)
    for number, folder in enumerate((data, other)):
        rows = torch.from_numpy(np.flatnonzero(corpora[:2000] == number))
        alone = TrainStream(folder, LENGTH, LANES, SEED, order=order).batch(0, len(rows))
        assert torch.equal(batch.inputs[rows], alone.inputs)
    assert batch.samples.tolist() == list(range(2000))
    for step in (0, 100):
        rows = batch.targets[step * LANES : (step + 1) * LANES]
        assert stream.tokens_read(step) == (rows != IGNORE).sum()


def test_epochs_set_the_shares(data: Path, other: Path) -> None:
    stream = mixture(data, other, by_epochs=True, weights=(1, 4))
    read = stream.epochs(stream.samples_per_epoch)
    assert read == pytest.approx([1, 4], rel=0.03)


@pytest.mark.parametrize("order", ORDERS)
def test_any_restart_and_ranks_see_the_same_mixture(data: Path, other: Path, order: Order) -> None:
    whole = mixture(data, other, order=order).batch(0, 3000)
    draw = random.Random(1)
    for _ in range(15):
        step, ranks = draw.randrange(3000 // LANES), draw.choice([1, 2, 3, 4, 6])
        micro_batch = draw.choice([None, 1])
        shares = [
            rank_share(mixture(data, other, order=order), step, LANES, rank, ranks, micro_batch)
            for rank in range(ranks)
        ]
        for name in ("inputs", "targets", "samples"):
            rows = torch.cat(
                [getattr(part, name) for parts in zip(*shares, strict=True) for part in parts]
            )
            assert torch.equal(rows, getattr(whole, name)[step * LANES : (step + 1) * LANES])


def test_mixtures_that_cannot_be(data: Path, other: Path, corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path / "foreign", vocab_size=480)
    with pytest.raises(ValueError, match="different tokenizers.*--tokenizer"):
        mixture(data, tmp_path / "foreign")
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a finite weight above 0"):
            mixture(data, other, weights=(1, weight))
    for weights, place in (((1, 1e-4), 2), ((1e-300, 1), 1), ((2048, 1), 2), ((1e308, 1e-308), 2)):
        with pytest.raises(ValueError, match=rf"folder {place} of data.mixture has a share of"):
            mixture(data, other, weights=weights)
    assert mixture(data, other, weights=(1023, 1)).quotas.tolist() == [1023, 1]
    assert mixture(data, other).fingerprint != mixture(data, other, weights=(1, 1)).fingerprint


def test_state_carried_by_lane_survives_restarts_on_other_ranks(data: Path) -> None:
    """The state is a running hash of everything a lane has seen since its epoch began, kept in a
    row a lane, as recurrent state would be.
    """

    def advance(states: torch.Tensor, stream: TrainStream, step: int, ranks: int) -> None:
        for rank in range(ranks):
            for batch in rank_share(stream, step, LANES, rank, ranks, 2):
                real = batch.samples >= 0
                lanes = batch.samples[real] % LANES
                carried = torch.where(stream.continues(batch.samples[real]), states[lanes], 7)
                for column in batch.inputs[real].unbind(1):
                    carried = (carried * 31 + column) % 1_000_003
                states[lanes] = carried

    stream = TrainStream(data, LENGTH, LANES, SEED)
    steps = 2 * stream.samples_per_epoch // LANES + 3
    alone, moved = torch.zeros(2, LANES, dtype=torch.long)
    draw = random.Random(0)
    for step in range(steps):
        advance(alone, stream, step, 1)
        if draw.random() < 0.1:
            stream = TrainStream(data, LENGTH, LANES, SEED)
        advance(moved, stream, step, draw.choice([1, 2, 3, 4, 5, 6, 8]))
        assert torch.equal(alone, moved)
    last = stream.samples_per_epoch * 2
    rows = (
        stream.batch(last, 3 * LANES)
        .inputs.reshape(3, LANES, LENGTH)
        .transpose(0, 1)
        .reshape(LANES, -1)
    )
    expected = torch.full((LANES,), 7)
    for column in rows.unbind(1):
        expected = (expected * 31 + column) % 1_000_003
    assert torch.equal(alone, expected), "the third epoch begins afresh"
