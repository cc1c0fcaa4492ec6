from dataclasses import replace
from typing import Any

import pytest

from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig, NgramConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.alternatives import (
    Site,
    changed_by,
    largest_batch,
    largest_micro_batch,
    remedies,
    suggestion,
    variants,
)
from memshard.trainer.cost.devices import CARDS
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.cost.step_time import step_time
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

MODEL = ModelConfig(
    layers=4,
    dim=256,
    mixer=MixerConfig(heads=8),
    memory=MemoryConfig(layers=(1,), keys=64, topk=8, heads=4),
)
RECIPE = Recipe(data=DataConfig(path="nowhere"), model=MODEL, train=TrainConfig(batch=64))
CARD = CARDS["v100-16g"]


def _site(memory: float, ranks: int = 1, node: int = 8) -> Site:
    return Site(replace(CARD, memory=memory), ranks, 1000, "fp16", node)


def test_largest_batches_fit_and_one_more_does_not() -> None:
    site = _site(estimate(RECIPE, 1, 1000, half=True).bytes.total * 0.6)
    size = largest_micro_batch(RECIPE, site)
    assert 0 < size < 64
    for micro_batch, fits in ((size, True), (size + 1, False)):
        assert (
            site.bytes(changed_by(RECIPE, {"train.micro_batch": micro_batch})) <= site.device.memory
        ) == fits
    small = changed_by(RECIPE, {"train.micro_batch": 4})
    batch = largest_batch(small, site)
    for more, fits in ((0, True), (1, False)):
        assert (
            site.bytes(changed_by(small, {"train.batch": batch + more})) <= site.device.memory
        ) == fits
    assert largest_micro_batch(RECIPE, _site(1e6)) == largest_batch(RECIPE, _site(1e6)) == 0


def test_variants_keep_less_and_take_longer() -> None:
    deep = replace(RECIPE, model=replace(MODEL, layers=32))
    none, selective, full, reversible = variants(deep, _site(1e10))
    assert none.bytes > selective.bytes > full.bytes > reversible.bytes
    assert none.seconds < selective.seconds < full.seconds == reversible.seconds
    chunked = replace(MODEL, memory=replace(MODEL.memory, query_norm="rms"))
    assert (
        len(
            list(
                variants(
                    Recipe(data=RECIPE.data, model=chunked, train=TrainConfig(chunk=64)),
                    _site(1e10),
                )
            )
        )
        == 4
    )


def test_what_is_suggested_fits() -> None:
    assert suggestion(RECIPE, _site(1e11)) == ({}, pytest.approx(_site(1e11).seconds(RECIPE)))
    deep = replace(RECIPE, model=replace(MODEL, layers=32))
    whole = _site(1e11, ranks=4).bytes(deep)
    for share in (0.7, 0.4, 0.25):
        site = _site(whole * share, ranks=4)
        chosen = suggestion(deep, site)
        assert chosen is not None and chosen[0]
        assert site.bytes(changed_by(deep, chosen[0])) <= site.device.memory, share
    assert suggestion(deep, _site(1e5)) is None


NGRAMS = replace(
    RECIPE,
    model=replace(
        MODEL, memory=MemoryConfig(), ngram=NgramConfig(layers=(0, 2), rows=1 << 19, value_dim=16)
    ),
)


@pytest.mark.parametrize("recipe", [RECIPE, NGRAMS], ids=["product keys", "n-grams"])
def test_every_remedy_works(recipe: Recipe) -> None:
    site = _site(_site(0).bytes(recipe) / 2)
    suggested = remedies(recipe, site)
    assert any("model.ngram.rows" in remedy for remedy in suggested) == (recipe is NGRAMS)
    assert any("ranks" in remedy for remedy in suggested)
    for remedy in suggested:
        words = remedy.partition(" (")[0].split()
        if "ranks" in remedy:
            assert replace(site, ranks=int(words[1])).fits(recipe), remedy
        else:
            pairs = (word.split("=") for word in words[1:])
            settings = {key: int(text) if text.isdigit() else text for key, text in pairs}
            assert site.fits(changed_by(recipe, settings)), remedy
    assert remedies(recipe, _site(1000)) == []


def test_time_of_a_step() -> None:
    def seconds(recipe: Recipe, ranks: int, precision: str = "fp16", node: int = 8) -> Any:
        return step_time(
            recipe, estimate(recipe, ranks, 1000, half=precision != "fp32"), CARD, precision, node
        )

    one, eight = seconds(RECIPE, 1), seconds(RECIPE, 8)
    assert one.network == 0 and eight.network > 0
    assert one.products == pytest.approx(8 * eight.products)
    assert seconds(RECIPE, 8, node=4).network > eight.network
    assert seconds(RECIPE, 1, "fp32").products == pytest.approx(one.products * 125 / 15.7)
    assert seconds(
        changed_by(RECIPE, {"train.checkpointing": "full"}), 1
    ).products == pytest.approx(one.products * 4 / 3)
    assert seconds(changed_by(RECIPE, {"tables.place": "host"}), 1).tables > one.tables
    with pytest.raises(
        ValueError, match="train.precision is bf16, which a v100-16g does not have: use fp32, fp16"
    ):
        seconds(RECIPE, 1, "bf16")


def test_an_optimizer_without_states_also_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(settings: dict[str, Any]) -> float:
        recipe = changed_by(RECIPE, settings)
        return step_time(recipe, estimate(recipe, 4, 1000), CARD, "fp32", node=8).update

    adam, kind = update({}), DENSE_KINDS["adamw"]
    assert update({"train.zero": 1}) == pytest.approx(adam / 4, rel=0.2)
    deepspeed = {"train.zero": 1, "train.engine": "deepspeed"}
    assert update({**deepspeed, "train.offload": True}) > update(deepspeed)
    monkeypatch.setitem(DENSE_KINDS, "adamw", replace(kind, state_bytes=0, update_bytes=12))
    assert update({}) == pytest.approx(adam * 12 / kind.update_bytes)
