import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from memshard.launch.cli.main import main
from memshard.launch.cli.plan import DEVICES
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.alternatives import (
    Site,
    changed_by,
    largest_batch,
    largest_micro_batch,
    suggestion,
    variants,
)
from memshard.trainer.cost.devices import CARDS, device_of
from memshard.trainer.cost.dry_run import rehearse
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.cost.step_time import step_time

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


def test_cards_are_the_choices() -> None:
    assert set(DEVICES) == {*CARDS, "cpu"}
    cpu = device_of("cpu", 2)
    assert cpu.memory > 1e8 and 1e8 < cpu.bandwidth < 1e13


@pytest.mark.parametrize(
    ("tensor", "memory", "layout"),
    [(1, None, "auto"), (2, 64, "columns"), (4, None, "tensor"), (8, 128, "rows")],
)
def test_1024_ranks_in_one_process_hold_what_is_estimated(
    tensor: int, memory: int | None, layout: Any
) -> None:
    recipe = replace(
        load_recipe("lample2019", []),
        parallel=ParallelConfig(tensor=tensor, memory=memory, layout=layout),
    )
    cost, parts = estimate(recipe, 1024, 30_000, half=True), rehearse(recipe, 1024, 30_000)
    assert not dist.is_initialized() and [part.rank for part in parts] == [0, 1023]
    dense = cost.parameters.dense - cost.parameters.split * (1 - 1 / tensor)
    for part in parts:
        assert part.dense == pytest.approx(dense, rel=1e-3)
        assert part.table == cost.table_part[0] * cost.table_part[1]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"parallel.tensor": 3}, "parallel.tensor is 3, which does not divide the number of ranks"),
        ({"parallel.memory": 24}, "parallel.memory is 24, which does not divide"),
        (
            {"parallel.tensor": 16},
            "model.mixer.heads is 8, which parallel.tensor, 16, does not divide",
        ),
        (
            {"parallel.tensor": 8, "parallel.memory": 4},
            "parallel.memory is 4 and parallel.tensor 8",
        ),
    ],
)
def test_what_does_not_divide_is_named(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        rehearse(changed_by(RECIPE, values), 1024, 1000)
    assert not dist.is_initialized()


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
        found = suggestion(deep, site)
        assert found is not None and found[0]
        assert site.bytes(changed_by(deep, found[0])) <= site.device.memory, share
    assert suggestion(deep, _site(1e5)) is None


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


def test_plan_of_many_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = "{layers: 3, dim: 64, memory: {layers: [1], keys: 64}}"
    (tmp_path / "a.yaml").write_text(
        f"data: {{path: nowhere}}\nmodel: {model}\ntrain: {{batch: 64}}\n"
    )
    recipe = str(tmp_path / "a.yaml")
    assert main(["plan", recipe, "--world", "1024", "--device", "h100-80g", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [part["rank"] for part in result["rehearsed"]] == [0, 1023] and result["seconds"][
        "total"
    ] > 0
    assert [variant["name"] for variant in result["variants"]][-1] == "reversible" and len(
        result["variants"]
    ) == 4
    assert main(["plan", recipe, "--world", "1024", "--device", "h100-80g"]) == 0
    out = capfd.readouterr().out
    assert (
        "some of the 1024 ranks have nothing to train on" in out
        and "rehearsed as rank 0 and rank 1023 of 1024" in out
    )
    assert main(["plan", recipe, "parallel.tensor=3", "--world", "8"]) == 2
    assert "parallel.tensor is 3" in capfd.readouterr().err
