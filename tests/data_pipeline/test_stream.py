"""The order is a pure function of (seed, epoch, index): ranks, micro-batches and restarts cannot
change it.
"""

import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.stream import IGNORE, Batch, HeldOutStream, TrainStream
from memshard.data_pipeline.stream.order.documents import epoch_order
from memshard.data_pipeline.stream.rank_share import deal_rows, rank_share
from memshard.data_pipeline.stream.reader import SplitReader
from tests.data_pipeline.conftest import ORDERS, build, write_corpus

LENGTH, LANES, SEED = 24, 12, 7


def opened(
    data: Path, order: Order, length: int = LENGTH, lanes: int = LANES, seed: int = SEED
) -> TrainStream:
    return TrainStream(data, length, lanes, seed, order=order)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> Order:
    order: Order = request.param
    return order


@pytest.fixture
def stream(data: Path, order: Order) -> TrainStream:
    return opened(data, order)


@pytest.fixture
def contiguous(data: Path) -> TrainStream:
    return opened(data, "contiguous")


def assert_equal(one: Batch, other: Batch) -> None:
    for name, left, right in zip(Batch._fields, one, other, strict=True):
        assert left.dtype == right.dtype == torch.int64 and torch.equal(left, right), name


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_any_ranks_and_micro_batches_see_the_same_global_batches(
    data: Path, order: Order, stream: TrainStream, ranks: int, micro_batch: int
) -> None:
    for step in (0, 1, 5):
        shares = [
            rank_share(opened(data, order), step, LANES, rank, ranks, micro_batch)
            for rank in range(ranks)
        ]
        rows = joined([part for parts in zip(*shares, strict=True) for part in parts])
        real = rows.samples >= 0
        assert_equal(Batch(*(field[real] for field in rows)), stream.batch(step * LANES, LANES))
        assert (rows.targets[~real] == IGNORE).all()


def passes(batch: int, ranks: int, micro_batch: int | None) -> list[list[int]]:
    """Return the rows of each pass over all ranks."""
    dealt = [deal_rows(batch, rank, ranks, micro_batch) for rank in range(ranks)]
    found = []
    for parts in zip(*dealt, strict=True):
        assert len({part.size for part in parts}) == 1, "equal shapes"
        assert all(len(part.rows) <= part.size <= (micro_batch or batch) for part in parts)
        found.append([row for part in parts for row in part.rows])
    return found


@pytest.mark.parametrize("batch", range(1, 30))
def test_a_pass_has_the_same_rows_on_any_number_of_ranks(batch: int) -> None:
    """Also where neither the ranks nor the micro-batches divide the batch."""
    for together in range(1, 26):
        alone = [
            [*range(first, min(first + together, batch))] for first in range(0, batch, together)
        ]
        for ranks in range(1, together + 1):
            if together % ranks == 0:
                assert passes(batch, ranks, together // ranks) == alone


@pytest.mark.parametrize("batch", range(1, 20))
def test_one_micro_batch_is_a_contiguous_share(batch: int) -> None:
    """The first ranks have equal shares, the others what is left."""
    for ranks in range(1, 9):
        share = -(-batch // ranks)
        for rank in range(ranks):
            rows = range(batch)[rank * share : (rank + 1) * share]
            for micro_batch in (None, share, batch):
                (part,) = deal_rows(batch, rank, ranks, micro_batch)
                assert [*part.rows] == [*rows] and part.size == share


def test_resume_at_any_sample_equals_a_continuous_run(
    data: Path, order: Order, stream: TrainStream
) -> None:
    total = 2 * stream.samples_per_epoch + 5
    whole = stream.batch(0, total)  # crosses two epoch ends in one call
    assert whole.samples.tolist() == list(range(total))
    draw = np.random.default_rng(0)
    for first in [
        0,
        stream.samples_per_epoch - 1,
        stream.samples_per_epoch,
        *draw.integers(0, total - 30, 20).tolist(),
    ]:
        fresh = opened(data, order).batch(first, 30)
        assert_equal(fresh, Batch(*(tensor[first : first + 30] for tensor in whole)))
    assert_equal(joined([stream.batch(first, 1) for first in range(total)]), whole)


def test_an_epoch_holds_every_token_at_most_once_and_nearly_all(
    data: Path, contiguous: TrainStream
) -> None:
    stream = contiguous
    reader = SplitReader(data, "train")
    order = np.arange(len(reader.lengths))
    starts = np.concatenate([[0], np.cumsum(reader.lengths)])
    corpus = reader.read(order, starts, np.array([0]), int(starts[-1]))[0][0]
    documents = [tuple(corpus[begin:end]) for begin, end in itertools.pairwise(starts)]
    assert len(set(documents)) == len(documents)  # each text begins with its number

    epoch = stream.batch(0, stream.samples_per_epoch)
    assert len(corpus) - (LENGTH + 1) * LANES <= epoch.inputs.numel() < len(corpus)
    by_lane = epoch.inputs.reshape(-1, LANES, LENGTH).transpose(0, 1).reshape(LANES, -1).tolist()
    seen: Counter[tuple[int, ...]] = Counter()
    for lane in by_lane:
        ends = [place + 1 for place, token in enumerate(lane) if token == reader.index.eos_id]
        seen.update(tuple(lane[begin:end]) for begin, end in itertools.pairwise(ends))
    assert set(seen) <= set(documents) and max(seen.values()) == 1
    assert sum(seen.values()) >= len(documents) - 2 * LANES  # all but those at the ends of lanes


def test_rows_of_a_lane_continue_each_other(contiguous: TrainStream) -> None:
    stream = contiguous
    this, following = stream.batch(0, LANES), stream.batch(LANES, LANES)
    assert torch.equal(this.inputs[:, 1:], this.targets[:, :-1])
    assert torch.equal(this.targets[:, -1], following.inputs[:, 0])


def test_documents_and_positions(data: Path, contiguous: TrainStream) -> None:
    stream = contiguous
    batch = stream.batch(0, 200)
    ended = batch.inputs == SplitReader(data, "train").index.eos_id
    within = ended.cumsum(1) - ended.long()  # <eos> belongs to the document it ends
    assert torch.equal(batch.documents - batch.documents[:, :1], within) and within.max() > 0
    # A lane's next row goes on with the same number, or one more where the last token ended a
    # document.
    before, after = batch.documents[:-LANES, -1], batch.documents[LANES:, 0]
    assert torch.equal(after, before + ended[:-LANES, -1]) and 0 < int(
        (after - before).sum()
    ) < len(before)
    assert torch.equal(batch.positions, torch.arange(LENGTH).expand(200, -1))


def test_epochs_and_seeds_differ(data: Path, order: Order, stream: TrainStream) -> None:
    epoch = stream.samples_per_epoch
    first, second = stream.batch(0, epoch).inputs, stream.batch(epoch, epoch).inputs
    other = opened(data, order, seed=SEED + 1).batch(0, epoch).inputs
    for one in (second, other):
        assert (one == first).all(1).float().mean() < 0.1
    assert_equal(stream.batch(5 * epoch, 3), opened(data, order).batch(5 * epoch, 3))


def test_fingerprint_covers_all_that_decides_the_order(
    data: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    build(corpus, tmp_path / "other", vocab_size=501)
    fingerprints = []
    for order in ORDERS:
        assert opened(copy, order).fingerprint == opened(data, order).fingerprint
        streams = [
            opened(data, order),
            opened(tmp_path / "other", order),
            opened(data, order, length=LENGTH + 1),
            opened(data, order, seed=SEED + 1),
            # Only contiguous lanes depend on the batch.
            *([opened(data, order, lanes=LANES + 1)] if order == "contiguous" else []),
        ]
        fingerprints += [stream.fingerprint for stream in streams]
    assert len(set(fingerprints)) == len(fingerprints) == 13


@pytest.mark.parametrize(("documents", "lanes"), [(1, 4), (7, 2), (5000, 3), (100_000, 4)])
def test_order_is_a_permutation_far_from_the_file_order(documents: int, lanes: int) -> None:
    order = epoch_order(documents, lanes, seed=1, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(documents))
    if documents >= 5000:
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01
        places = np.corrcoef(order, np.arange(documents))[0, 1]
        assert abs(places) < 0.1


def test_order_never_changes_between_releases() -> None:
    """A resumed run must read on where it stopped, so these numbers are part of the format."""
    assert epoch_order(12, 2, seed=0, epoch=0).tolist() == [10, 3, 8, 2, 1, 4, 6, 0, 9, 11, 5, 7]
    assert epoch_order(100_000, 4, seed=3, epoch=1)[:6].tolist() == [
        24491,
        44867,
        61938,
        24472,
        44901,
        90115,
    ]


def test_fewer_documents_than_lanes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 12, seed=3)
    build(tmp_path / "text", tmp_path / "data", vocab_size=300)
    stream = TrainStream(tmp_path / "data", 8, 16, 0)
    assert stream.samples_per_epoch >= 16 and stream.batch(0, 16).inputs.shape == (16, 8)
    with pytest.raises(
        ValueError,
        match="too few for one step of train.batch 16 x data.length 5000.*lower train.batch or "
        "data.length",
    ):
        TrainStream(tmp_path / "data", 5000, 16, 0)


def test_bad_settings_name_the_key(data: Path) -> None:
    for settings, key in (
        ((0, 1, 0), "data.length"),
        ((8, 0, 0), "train.batch"),
        ((8, 1, -1), "train.seed"),
    ):
        with pytest.raises(ValueError, match=key):
            TrainStream(data, *settings)
    with pytest.raises(ValueError, match="train.eval_tokens"):
        HeldOutStream(data, 8, 0)


@pytest.mark.parametrize("length", [1, 7, 64, 100_000])
def test_held_out_predicts_every_token_after_the_first_once(data: Path, length: int) -> None:
    reader = SplitReader(data, "heldout")
    starts = np.concatenate([[0], np.cumsum(reader.lengths)])
    text = reader.read(np.arange(len(reader.lengths)), starts, np.array([0]), int(starts[-1]))[0][0]
    stream = HeldOutStream(data, length)
    split = reader.index.splits["heldout"]
    assert (stream.tokens, stream.text_bytes, stream.words) == (
        len(text) - 1,
        split.text_bytes,
        split.words,
    )
    batch = stream.batch(0, stream.windows + 3)
    predicted = batch.targets != IGNORE
    assert torch.equal(batch.targets[predicted], torch.from_numpy(text[1:]))
    assert torch.equal(batch.inputs[predicted], torch.from_numpy(text[:-1]))
    assert (
        batch.samples.tolist() == [*range(stream.windows), -1, -1, -1] and not predicted[-3:].any()
    )
    assert predicted[: stream.windows].any(1).all(), "no window without a prediction"


def test_held_out_in_parts_and_cut(data: Path) -> None:
    whole, cut = HeldOutStream(data, 16), HeldOutStream(data, 16, max_tokens=100)
    assert (cut.tokens, cut.windows, cut.text_bytes, cut.words) == (100, 7, None, None)
    assert (cut.batch(0, 9).targets != IGNORE).sum() == 100
    assert torch.equal(cut.batch(0, 6).targets, whole.batch(0, 6).targets)
    assert_equal(
        joined([whole.batch(start, 5) for start in range(0, whole.windows, 5)][:-1]),
        whole.batch(0, (whole.windows - 1) // 5 * 5),
    )
    assert HeldOutStream(data, 16, max_tokens=10**9).words == whole.words
