"""Orders of sequences: permutations by number, packing by histogram, every token once, and what
each order promises of its rows.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.stream import IGNORE, Batch, TrainStream
from memshard.data_pipeline.stream.open_stream import resolve_order
from memshard.data_pipeline.stream.order import best_fit, joined
from memshard.data_pipeline.stream.order.packing import pack
from memshard.data_pipeline.stream.order.permutation import ROUNDS, permuted
from tests.data_pipeline.conftest import ORDERS, write_numbered

LENGTH, LANES = 16, 6


def naive_permutation(number: int, size: int, seed: int, epoch: int, window: int) -> int:
    """Return what `permuted` returns, in Python's integers."""
    keys = np.random.Philox(
        key=np.array([seed, (1 << 42) + epoch], dtype=np.uint64),
        counter=np.array([0, window, 0, 0], dtype=np.uint64),
    ).random_raw(ROUNDS)
    low = next(base for base in range(1, size + 1) if base**2 >= size)
    bases = (size + low - 1) // low, low

    def mixed(digit: int, key: int) -> int:
        bits = (digit ^ key) * 0xBF58476D1CE4E5B9 % 2**64
        return (bits ^ bits >> 32) * 0x94D049BB133111EB % 2**64 >> 32

    while True:
        digits = [number // low, number % low]
        for turn, key in enumerate(keys.tolist()):
            side = turn % 2
            digits[side] = (digits[side] + mixed(digits[1 - side], key)) % bases[side]
        number = digits[0] * low + digits[1]
        if number < size:
            return number


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_a_permutation_has_every_number_once_and_is_its_naive_twin(size: int) -> None:
    images = permuted(np.arange(size), size, 3, 1, 2)
    assert np.array_equal(np.sort(images), np.arange(size))
    for number in {0, size // 2, size - 1}:
        assert images[number] == naive_permutation(number, size, 3, 1, 2)
    assert np.array_equal(permuted(np.arange(size)[::-1], size, 3, 1, 2), images[::-1])


def test_a_permutation_scatters_like_a_random_one() -> None:
    """Neighbours, and the same number under the next key, land anywhere: distances have the mean
    and deviation of two random places, and the images of a range fill all parts evenly.
    """
    size = 30_000
    images = permuted(np.arange(size), size, 0, 0, 0)
    others = [permuted(np.arange(size), size, *keys) for keys in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for one, other in [(images[1:], images[:-1])] + [(images, other) for other in others]:
        distance = np.abs(one - other) / size
        assert abs(distance.mean() - 1 / 3) < 0.005 and abs(distance.std() - 18**-0.5) < 0.005
    counts = np.bincount(images[:3000] * 30 // size, minlength=30)
    assert ((counts - 100) ** 2 / 100).sum() < 60  # chi squared of 29 degrees, p = .0006


def test_permutations_never_change_between_releases() -> None:
    """A resumed run must read on where it stopped, so these numbers are part of the format."""
    assert permuted(np.arange(8), 8, 0, 0, 0).tolist() == [5, 4, 2, 1, 6, 0, 7, 3]
    assert permuted(np.arange(4), 10**9, 5, 2, 1).tolist() == [
        43921429,
        173885901,
        101024350,
        201224663,
    ]


def naive_rooms(sizes: list[int], capacity: int) -> list[int]:
    """Return the room left in every bin after best-fit decreasing, item by item."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 2, 7, 25, 129])
def test_packing_by_histogram_is_best_fit_decreasing(capacity: int) -> None:
    draw = random.Random(capacity)
    for count in (0, 1, 5, 300):
        sizes = [
            draw.randint(1, draw.choice([capacity, max(capacity // 4, 1)])) for _ in range(count)
        ]
        places, bins = pack(np.bincount(sizes, minlength=capacity + 1), capacity)
        rooms, items = [capacity] * bins, iter(sorted(sizes, reverse=True))
        for number, first, each in places:
            for item in range(number):
                rooms[first + item // each] -= next(items)
        assert next(items, None) is None and sorted(rooms) == naive_rooms(sizes, capacity)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A data folder of numbered tokens, and the lengths of its documents, some of many rows."""
    draw = random.Random(0)
    lengths = [draw.choice([1, 2, 3, 16, 17, 18, 33, draw.randint(1, 300)]) for _ in range(400)]
    folder = tmp_path_factory.mktemp("numbered") / "data"
    write_numbered(folder, lengths)
    return folder, lengths


@pytest.fixture(params=["one window", "several"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as small data are read, and once in as many windows and packs as large ones have."""
    if request.param == "several":
        monkeypatch.setattr(joined, "WINDOW_TOKENS", 2000)
        monkeypatch.setattr(joined, "BLOCK_TOKENS", 500)
        monkeypatch.setattr(best_fit, "BLOCK_TOKENS", 100)


def epoch_of(stream: TrainStream, number: int = 0) -> Batch:
    return stream.batch(number * stream.samples_per_epoch, stream.samples_per_epoch)


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("order", ORDERS)
def test_every_token_is_predicted_once_an_epoch(
    numbered: tuple[Path, list[int]], order: Order
) -> None:
    folder, lengths = numbered
    starts = np.cumsum([1, *lengths])
    stream = TrainStream(folder, LENGTH, LANES, 0, order=order)
    for number in (0, 3):
        epoch = epoch_of(stream, number)
        real = epoch.targets != IGNORE
        predicted = epoch.targets[real].numpy()
        assert len(predicted) == len(set(predicted.tolist()))
        # A token is predicted from the one before it, or is the first of its document.
        follows = predicted == epoch.inputs[real].numpy() + 1
        assert np.isin(predicted[~follows], starts).all()
        lost = set(range(1, sum(lengths) + 1)) - set(predicted.tolist())
        if order == "best-fit":
            # Those that begin a row, and no others: they are read all the same.
            assert lost <= set(starts.tolist()) & set(epoch.inputs[:, 0].tolist())
        else:
            lanes = LANES if order == "contiguous" else 1
            assert len(lost) <= (LENGTH + 1) * lanes
        assert stream.predicted(number * stream.samples_per_epoch, len(epoch.inputs)) == len(
            predicted
        )


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("order", ORDERS)
def test_documents_tell_where_each_begins(numbered: tuple[Path, list[int]], order: Order) -> None:
    folder, lengths = numbered
    batch = epoch_of(TrainStream(folder, LENGTH, LANES, 0, order=order))
    of_token = np.repeat(np.arange(len(lengths)), lengths)
    documents = of_token[np.maximum(batch.inputs.numpy() - 1, 0)]
    real = batch.inputs.numpy() > 0
    changes = (documents[:, 1:] != documents[:, :-1]) & real[:, 1:]
    assert np.array_equal(np.diff(batch.documents.numpy(), axis=1) != 0, changes)


@pytest.mark.usefixtures("windows")
def test_best_fit_rows_begin_with_a_document_or_go_on_in_a_long_one(
    numbered: tuple[Path, list[int]],
) -> None:
    folder, lengths = numbered
    starts = np.cumsum([1, *lengths[:-1]])
    stream = TrainStream(folder, LENGTH, LANES, 0, order="best-fit")
    epoch = epoch_of(stream)
    first = epoch.inputs[:, 0].numpy()
    document = np.searchsorted(starts, first, side="right") - 1
    into = first - starts[document]
    assert (into % LENGTH == 0).all()
    assert (np.array(lengths)[document[into > 0]] > LENGTH + 1).all()
    assert isinstance(stream.order, best_fit.BestFit)
    tokens = int((epoch.inputs > 0).sum()) + int((epoch.targets[:, -1] != IGNORE).sum())
    padding = 1 - tokens / (len(epoch.inputs) * (LENGTH + 1))
    assert stream.order.padding == pytest.approx(padding, abs=1e-9) and padding < 0.02


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("order", ["shuffled", "best-fit"])
def test_permuted_orders_know_no_batch(numbered: tuple[Path, list[int]], order: Order) -> None:
    one, other = (TrainStream(numbered[0], LENGTH, lanes, 0, order=order) for lanes in (6, 35))
    assert one.fingerprint == other.fingerprint
    assert torch.equal(epoch_of(one, 1).inputs, epoch_of(other, 1).inputs)
    assert not one.continues(torch.arange(50)).any()


@pytest.mark.parametrize("order", ["shuffled", "best-fit"])
def test_rows_of_a_long_document_are_scattered(tmp_path: Path, order: Order) -> None:
    write_numbered(tmp_path / "data", [200 * LENGTH] * 20)
    stream = TrainStream(tmp_path / "data", LENGTH, LANES, 0, order=order)
    epoch = epoch_of(stream).inputs[:, 0].numpy() // (200 * LENGTH)
    follow = (epoch[1:] == epoch[:-1]).mean()
    assert follow == pytest.approx(1 / 20, abs=0.02)


def test_an_order_that_is_none_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match="data.order is random; choose one of contiguous, shuf"):
        TrainStream(data, LENGTH, LANES, 0, order="random")  # type: ignore[arg-type]


def test_the_default_is_shuffled_unless_rows_have_to_go_on(data: Path) -> None:
    assert resolve_order(str(data), "auto") == "shuffled"
    assert resolve_order(str(data), "auto", {str(data): 1.0}) == "shuffled"
    assert resolve_order(str(data), "auto", carry_state=True) == "contiguous"
