import pytest
import torch
from torch import Tensor

from memshard.models.kernels.backend import search_for
from memshard.models.kernels.plain_topk import candidate_pairs, product_search
from memshard.models.memory import product_topk as topk_module
from memshard.models.memory.product_topk import product_topk


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(topk_module, "search_for", lambda scores: product_search)
    elif search_for(torch.zeros(1)) is product_search:
        pytest.skip("no compiled search: no compiler, or MEMSHARD_KERNELS=plain")


@pytest.mark.parametrize(("k", "pairs"), [(1, 1), (16, 50), (32, 119)])
def test_few_pairs_need_a_look(k: int, pairs: int) -> None:
    assert len(candidate_pairs(k, torch.device("cpu"))[0]) == pairs


def _brute_force(first: list[float], second: list[float], k: int) -> list[tuple[int, int]]:
    """Sort all slots by sum, then by rank of i1, then of i2; ranks are by score, then by index."""

    def ranks(scores: list[float]) -> dict[int, int]:
        return {
            i: rank
            for rank, i in enumerate(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))
        }

    rank1, rank2 = ranks(first), ranks(second)
    slots = [(i, j) for i in range(len(first)) for j in range(len(second))]
    return sorted(
        slots,
        key=lambda slot: (-(first[slot[0]] + second[slot[1]]), rank1[slot[0]], rank2[slot[1]]),
    )[:k]


@pytest.mark.parametrize(
    ("keys", "k"), [(1, 1), (5, 1), (5, 5), (9, 4), (12, 12), (40, 32), (70, 5)]
)
@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_search_is_exact_and_settles_ties_as_documented(keys: int, k: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(keys * 1000 + levels)
    first, second = torch.randint(-levels, levels + 1, (2, 10, keys), generator=generator).float()
    scores, i1, i2 = product_topk(first, second, k)
    for row in range(len(first)):
        assert list(zip(i1[row].tolist(), i2[row].tolist(), strict=True)) == _brute_force(
            first[row].tolist(), second[row].tolist(), k
        )
    assert torch.equal(scores, first.gather(1, i1) + second.gather(1, i2))


@pytest.mark.parametrize("equal", [torch.zeros(3, 8), torch.full((3, 8), -torch.inf)])
def test_equal_sub_keys_read_the_lowest_slots(equal: Tensor) -> None:
    _, i1, i2 = product_topk(equal, equal, 8)
    assert torch.equal(i1 * 8 + i2, torch.arange(8).expand(3, -1))


def test_rows_are_searched_independently_of_their_neighbours() -> None:
    """A tie in one row must not change what another row, without ties, returns."""
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 10)
    alone = product_topk(scores[0, :1], scores[1, :1], 4)
    scores[:, 1:] = 0
    together = product_topk(scores[0], scores[1], 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("keys", "k"), [(7, 3), (64, 16), (256, 8), (512, 32), (1000, 100)])
def test_both_paths_find_the_same(keys: int, k: int) -> None:
    """Scores are rounded, so that some of them tie; zeros of both signs are equal."""
    scores = (
        torch.randn(2, 3, 50, 4, keys, generator=torch.Generator().manual_seed(k)) * 20
    ).round() / 20
    search = search_for(scores[0, 0])
    assert (scores == 0).any()
    strided = scores.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    heads_first = scores.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    for first, second in [
        *zip(*scores, strict=True),
        *zip(*strided, strict=True),
        *zip(*heads_first, strict=True),
    ]:
        assert torch.equal(search(first, second, k), product_search(first, second, k))


def test_scores_that_are_not_numbers_stay_inside_the_table() -> None:
    scores = torch.full((2, 3, 200), torch.nan)
    scores[:, 1, ::2] = torch.inf
    _, i1, i2 = product_topk(scores[0], scores[1], 8)
    assert min(i1.min(), i2.min()) >= 0 and max(i1.max(), i2.max()) < 200
