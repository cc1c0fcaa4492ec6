from dataclasses import replace
from typing import Any

import pytest
import torch

from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig, NgramConfig
from memshard.models.memory.table import externalize_tables
from memshard.models.transformer import Transformer
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.estimate import check_fits, estimate
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.parameters import count_parameters, state_bytes
from memshard.trainer.cost.this_machine import device_named, peak_flops
from tests.trainer.cost.models import MEMORY, MODEL, NGRAM


def test_segments_hold_one_piece() -> None:
    """Losses and states of 16 pieces are held, of which one is computed again."""
    model = replace(
        MODEL,
        memory=MemoryConfig(),
        dim=32,
        position="none",
        mixer=MixerConfig(heads=2, kind="delta", features="dpfp"),
    )
    assert state_bytes(model) == model.layers * (
        2 * 32 * 16 * 4 + 8
    )  # matrices, and the document of the last token
    recipe = Recipe(data=DataConfig(path="", length=1024), model=model, train=TrainConfig(batch=1))
    whole = estimate(recipe, 1, 100).bytes
    pieces = estimate(replace(recipe, train=replace(recipe.train, segments=16)), 1, 100).bytes
    assert pieces.activations == 8 * 1024 + 16 * state_bytes(model)
    assert pieces.workspace == pytest.approx((whole.workspace + whole.activations) / 16)


@pytest.mark.parametrize("tie_head", [False, True])
def test_parameters_are_the_models(tie_head: bool) -> None:
    config = replace(
        MODEL, tie_head=tie_head, memory=replace(MEMORY, layers=(0, 2), share=True, gate=True)
    )
    state = torch.get_rng_state()
    parameters = count_parameters(config)
    assert torch.equal(state, torch.get_rng_state())
    model = Transformer(config)
    tables = externalize_tables(model)
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters.dense, parameters.table, parameters.tables) == (
        dense,
        tables[0].weight.numel(),
        1,
    )
    assert parameters.active == dense - 64 * 64 - (0 if tie_head else 100 * 64)


def test_paper_size_model_by_hand() -> None:
    memory = MemoryConfig(layers=(5,), keys=1024)
    recipe = Recipe(
        data=DataConfig(path="nowhere", length=512),
        model=ModelConfig(layers=16, dim=1024, memory=memory, mixer=MixerConfig(heads=16)),
        train=TrainConfig(batch=256, micro_batch=4),
        parallel=ParallelConfig(layout="rows"),
    )
    cost = estimate(recipe, 32, 50_000)
    assert cost.parameters.table == 2**30 and cost.tables["memory"].part == (2**15, 1024)
    assert (
        cost.bytes.table_rows == 2**15 * 1024 * 4
        and cost.bytes.table_moments == 2 * cost.bytes.table_rows
    )
    dense = (
        50_000 * 1024 + 512 * 1024 + 16 * 4 * 1024**2 + 15 * 8 * 1024**2 + 1024 * 1024 + 1024 * 1024
    )
    assert cost.parameters.dense == pytest.approx(dense, rel=0.001)
    assert (cost.micro_batch, cost.micro_batches, cost.tokens_per_step) == (4, 2, 256 * 512)
    assert cost.flops_per_token == pytest.approx(
        6 * (dense - 512 * 1024 + 16 * 512 * 1024 + 128 * 1024), rel=0.001
    )
    assert estimate(recipe, 33, 50_000).tables["memory"].part[0] * 33 >= 2**20


@pytest.mark.parametrize("share", [False, True])
def test_tables_of_two_kinds_are_the_models(share: bool) -> None:
    config = replace(MODEL, ngram=replace(NGRAM, share=share))
    parameters, tables = count_parameters(config), externalize_tables(Transformer(config))
    groups = config.table_groups
    assert [group.section for group in groups] == ["memory", "ngram"]
    assert parameters.tables == len(tables) == sum(group.tables for group in groups)
    assert parameters.table == sum(table.weight.numel() for table in tables)
    for group in groups:
        of_group = {table.slots for table in tables if table.dim == group.value_dim}
        assert set(group.slots) == of_group
    # Layers that share a table read the same rows of it.
    assert groups[1].lookups == 2 and groups[1].layers_of_a_table == (2 if share else 1)
    few = 10 * groups[1].reads * groups[1].tables / sum(groups[1].slots)
    assert groups[1].touched(10) == pytest.approx(few, rel=0.06)


def test_a_published_table_by_hand() -> None:
    """One of 320,001,536 rows of 160 values, of which a token reads 16."""
    ngram = NgramConfig(layers=(2,), rule="qwen", rows=20_000_000, value_dim=160)
    recipe = Recipe(
        data=DataConfig(path="nowhere", length=512),
        model=ModelConfig(dim=1024, ngram=ngram),
        train=TrainConfig(batch=64, micro_batch=4),
    )
    cost, without = (
        estimate(replace(recipe, model=model), 8, 248_320)
        for model in (recipe.model, ModelConfig(dim=1024))
    )
    table = cost.tables["ngram"]
    assert table.group.slots == (320_001_536,) and table.part == (40_000_192, 160)
    assert cost.bytes.table_rows == 40_000_192 * 160 * 4
    # Each distinct row comes once; its gradient (fp32) and row number go once.
    assert cost.lookup_traffic == pytest.approx(16 * 7 / 8 * (160 * 8 + 4), rel=1e-3)
    tokens = 64 * 512 / 8
    # A row and a weight, where its gradient begins, and that.
    assert cost.bytes.reads == pytest.approx(tokens * 16 * (8 + 8 + 160 * 4), rel=1e-3)
    # Key and value projections of 2,560 read values; norms and the convolution multiply, too.
    flops = cost.flops_per_token - without.flops_per_token
    assert flops == pytest.approx(6 * 2 * 2560 * 1024, rel=1e-2)
    assert without.tables == {} and without.lookup_traffic == 0


def test_flops_of_attention_and_lookup_count() -> None:
    longer = flops_per_token(MODEL, 64) - flops_per_token(MODEL, 32)
    assert longer == 6 * 3 * 32 * 64
    wider = replace(MODEL, memory=replace(MEMORY, topk=16))
    assert flops_per_token(wider, 64) - flops_per_token(MODEL, 64) == 6 * 4 * 8 * 64


RECIPE = Recipe(
    data=DataConfig(path="nowhere"),
    model=replace(MODEL, max_length=None),
    train=TrainConfig(batch=64),
)


def test_a_table_that_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    check_fits(RECIPE, 1, 100, torch.device("cpu"))
    huge = replace(
        RECIPE, model=replace(MODEL, max_length=None, memory=replace(MEMORY, keys=100_000))
    )
    with pytest.raises(
        ValueError,
        match=r"the value table needs 7,68\d\.\d GB a rank .*lower model.memory.keys, or use more "
        r"ranks",
    ):
        check_fits(huge, 1, 100, torch.device("cpu"))
    ngram = NgramConfig(layers=(0,), rows=1 << 33, value_dim=64)
    huge = replace(RECIPE, model=replace(RECIPE.model, memory=MemoryConfig(), ngram=ngram))
    with pytest.raises(ValueError, match="lower model.ngram.rows, or use more ranks"):
        check_fits(huge, 1, 100, torch.device("cpu"))


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(RECIPE, model=replace(MODEL, max_length=None, memory=replace(MEMORY, keys=128)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(ValueError, match=r"needs .* GB are available"):
        check_fits(small, 1, 100, torch.device("cpu"))


def test_zero_splits_the_moments_down_to_the_largest_parameter() -> None:
    recipe = Recipe(
        data=DataConfig(path="nowhere"),
        model=replace(MODEL, vocab_size=1000),
        train=TrainConfig(batch=64, zero=1),
    )
    parameters = count_parameters(replace(MODEL, vocab_size=1000))
    assert parameters.largest == 64 * 1000
    assert estimate(recipe, 2, 0).bytes.dense_moments == parameters.dense * 4
    assert estimate(recipe, 64, 0).bytes.dense_moments == 64_000 * 8
    assert (
        estimate(replace(recipe, train=TrainConfig(batch=64)), 64, 0).bytes.dense_moments
        == parameters.dense * 8
    )


def test_deepspeed_splits_masters_and_moments_and_offload_moves_them() -> None:
    def of(half: bool, **settings: Any) -> tuple[Any, Any]:
        train = TrainConfig(batch=64, engine="deepspeed", **settings)
        cost = estimate(
            Recipe(
                data=DataConfig(path="nowhere"), model=replace(MODEL, vocab_size=1000), train=train
            ),
            4,
            0,
            half,
        )
        return cost.bytes, cost.host

    dense = count_parameters(replace(MODEL, vocab_size=1000)).dense
    sums = 2 * 2 * dense
    first, _ = of(True, zero=1)
    assert first.dense == dense * (2 + 1 + 2 + 1 + 2) + sums
    second, _ = of(True, zero=2)
    assert first.dense - second.dense == dense * 2 * 3 / 4
    device, host = of(True, zero=2, offload=True)
    assert host.dense == dense * 4 and device.dense == second.dense - host.dense - sums / 2
    assert of(False, zero=0)[0].dense == dense * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_a_plausible_number_of_this_machine(dtype: torch.dtype) -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), dtype) < 1e14


def test_this_machine_as_a_device() -> None:
    cpu = device_named("cpu", 2)
    assert cpu.memory > 1e8 and 1e8 < cpu.bandwidth < 1e13
