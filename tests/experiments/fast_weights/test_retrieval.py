"""The retrieval tasks: readings equal the delta rule, and the rules differ as published."""

import torch
import torch.nn.functional as F

from memshard.experiments.fast_weights.capacity import _unfinished
from memshard.experiments.fast_weights.retrieval import (
    PublishedFavor,
    Retriever,
    sample_pairs,
    train,
)
from memshard.experiments.fast_weights.update import _together
from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.feature_maps import FeatureMap


def test_retrieval_reads_what_the_delta_rule_has_written() -> None:
    """Values and gradients of readings that never build the memory are those of the memory that
    `delta_rule` returns.
    """
    torch.manual_seed(0)
    model = Retriever(12, "dpfp-1", "delta").double()
    keys, values = sample_pairs(12, 24, 3, True, torch.Generator().manual_seed(0))
    queries = keys[:, :5]
    k, q = model.keys_and_queries(keys, values, queries)
    beta = model.strengths(keys, values)
    _, memory = delta_rule(
        k[:, None], k[:, None], F.one_hot(values, 12).double()[:, None], beta[:, None]
    )
    read, expected = model(keys, values, queries), q @ memory[:, 0]
    torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), model.parameters()) for y in (read, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_delta_rule_updates_what_the_sum_rule_only_adds_to() -> None:
    """Figure 3 has losses after 300 steps of 0.0065 and, for the sum rule, a plateau of 0.1."""
    point = {"symbols": 20, "features": "dpfp-1", "replace": True, "steps": 300, "seed": 1}
    assert (
        train(point | {"rule": "delta"})["loss"]
        < 0.02
        < 0.07
        < train(point | {"rule": "sum"})["loss"]
    )


def test_a_seed_that_has_ended_keeps_its_last_loss() -> None:
    assert _together([{100: 0.5, 200: 0.1}, {100: 0.4, 200: 0.3, 300: 0.2}]) == {
        100: [0.5, 0.4],
        200: [0.1, 0.3],
        300: [0.1, 0.2],
    }
    assert _together([{}, {100: 0.4}]) == {100: [0.4]} and _together([{}, {}]) == {}


def test_a_run_is_cut_short_by_its_last_step_unless_that_solves_it() -> None:
    ends = {(200, 0.5): True, (200, 0.0005): False, (100, 0.5): False, (200, None): True}
    for end, cut in ends.items():
        assert _unfinished({"steps": 200}, {"curve": [(100, 0.6), end]}) is cut


def test_favor_is_a_softmax_of_its_projections_and_the_published_form_underflows() -> None:
    torch.manual_seed(0)
    stable, paper = (
        FeatureMap("favor", 64, width=64),
        PublishedFavor(64, width=64, normalise="sum"),
    )
    paper.directions = stable.directions
    x = torch.randn(10, 64, dtype=torch.float64)
    torch.testing.assert_close(stable(x * 64**0.25), paper(x))
    long = torch.randn(10, 64) * 2
    assert stable(long).isfinite().all() and not paper(long).isfinite().all()
