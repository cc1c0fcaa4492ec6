"""`memshard plan --explain` counts what formulas written by hand say."""

import json

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.config.load import load_recipe
from memshard.trainer.cost.counted.rates import H200
from memshard.trainer.cost.counted.step import Explained, Part, explain

DIM, LAYERS, VOCABULARY, LENGTH, TOKENS = 1024, 12, 32_768, 1024, 16_384
HEADS, KEYS, READS, SLOTS = 4, 1024, 128, 1 << 20
BF16 = ("tables.dtype=bf16", "tables.rounding=stochastic", "model.memory.score_precision=tf32")


def _explained(*overrides: str, duplicates: float | None = None) -> Explained:
    return explain(load_recipe("wide", overrides), VOCABULARY, "bf16", H200, duplicates)


@pytest.fixture(scope="module")
def explained() -> Explained:
    return _explained()


def _named(parts: list[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


def test_a_dense_step_is_that_of_formulas(explained: Explained) -> None:
    dense = _named(explained.dense)
    weights = LAYERS * 12 * DIM**2 + VOCABULARY * DIM
    assert dense["matrix products"].flops == 6 * weights * TOKENS
    # Two products of half of the pairs forward, five backward.
    assert dense["attention"].flops == LAYERS * 7 * TOKENS * LENGTH * DIM
    # Log-softmax reads and writes the fp32 logits, its loss reads them; the gradients write one,
    # read two and write one, and in between read one.
    logits = 4 * TOKENS * VOCABULARY
    assert dense["loss"].bytes == pytest.approx(8 * logits, rel=1e-3)
    # In each layer two norms read the fp32 stream and write it; backward reads two and writes one.
    # The last norm is one more.
    stream = 4 * TOKENS * DIM
    assert dense["norms"].bytes == pytest.approx((2 * LAYERS + 1) * 5 * stream, rel=1e-2)
    # Weights and gradient, two moments: 28 bytes, and 12 for norm and clipping.
    assert dense["update of dense weights"].bytes == pytest.approx(40 * weights, rel=0.02)


def test_a_memory_is_that_of_formulas(explained: Explained) -> None:
    memory, half = _named(explained.memory), 256
    assert memory["query: matrix products"].flops == 6 * TOKENS * DIM * HEADS * 2 * half
    assert memory["scores"].flops == 2 * TOKENS * HEADS * 2 * KEYS * half
    reads = TOKENS * READS
    row, sums = 4 * DIM, 4 * TOKENS * DIM
    assert memory["reads"].bytes == reads * (row + 8) + sums
    # Queries, in fp32: the norm reads them twice and writes them, backward reads them and their
    # gradients twice and writes one.
    queries = 4 * TOKENS * HEADS * 2 * half
    assert memory["query: other elementwise"].bytes == pytest.approx(8 * queries, rel=0.35)
    # The gradient of the sums is cast to bf16, and gathered for each read.
    assert memory["gradient of their weights"].bytes == reads * (row + 8) + 2 * sums
    assert memory["gradients of rows"].bytes == reads * (row / 2 + 8)
    distinct = SLOTS * (1 - (1 - 1 / SLOTS) ** reads)
    # Values and two moments, read and written.
    assert memory["update of rows"].bytes == pytest.approx(distinct * DIM * 24, rel=1e-6)
    replaced = _named(explained.replaced)["matrix products"]
    assert replaced.flops == 6 * TOKENS * 8 * DIM**2


def test_narrow_tables_and_repeated_reads_cost_less(explained: Explained) -> None:
    narrow = _explained(*BF16)
    repeated = _explained(*BF16, duplicates=20)
    assert 1 < repeated.ratio < narrow.ratio < explained.ratio
    assert narrow.dense_seconds == explained.dense_seconds
    update = _named(repeated.memory)["update of rows"]
    assert update.bytes == TOKENS * READS / 20 * DIM * 2 * (2 + 8)


def test_the_command_prints_parts_rates_and_the_ratio(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "h200", "--explain", "--vocab", "32768"]) == 0
    out = capfd.readouterr().out
    assert "counted on one GPU, not measured" in out and "assumed rates: products 6e+14" in out
    assert main(["plan", "--device", "h200", "--explain", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)["explained"]
    assert f"{result['ratio']:.3f} times" in out
    assert f"{result['suggested_ratio']:.3f} times" in out
    assert result["suggested_ratio"] == pytest.approx(_explained(*BF16).ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe"),
        (["--explain"], "knows rates of h200-141g only, not of cpu"),
        (["quickstart", "model.memory.layers=[]", "--device", "h200", "--explain"], "with one"),
    ],
)
def test_what_is_not_counted_is_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capfd.readouterr().err
