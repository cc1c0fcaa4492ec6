"""DNAs become models or reasons, never surprises."""

import copy
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memshard.launch.cli.main import main
from memshard.models.context import Context
from memshard.models.decode.generate import generate
from memshard.models.program.mixer import ProgramMixer
from memshard.models.program.primitives import PRIMITIVES
from memshard.search.dna.causality import perturbed
from memshard.search.dna.compile import Compiled, Logits, Rejected, Shape, compile_dna
from memshard.search.dna.form import invalid, load, save
from memshard.search.dna.golden import golden
from memshard.search.dna.graph import graph
from memshard.search.dna.mutate import MUTATIONS, mutate
from memshard.search.dna.shapes import lower
from memshard.trainer.config.load import load_recipe
from tests.search.programs import HEAD_WIDTH, SHAPE, SOFTMAX, changed, compiled, line

GOLDEN = ("transformer", "transformer-pp", "primer-ez", "primer")
SOFTMAX_LINES = [line("EXP", 0), line("MASK", 2), line("RED_SUM", 3), line("DIVIDE", 3, 4)]
LEAKS = {
    "no mask": ([line("EXP", 0), line("RED_SUM", 2), line("DIVIDE", 2, 3)], {"leak"}),
    "mask after normalising": (
        [line("EXP", 0), line("RED_SUM", 2), line("DIVIDE", 2, 3), line("MASK", 4)],
        {"leak"},
    ),
    "sign of unmasked scores": (
        [
            line("SIGN", 0),
            line("RED_SUM", 2),
            line("EXP", 0),
            line("MASK", 4),
            line("MULTIPLY", 5, 3),
        ],
        {"leak"},
    ),
    "a scale for each position": ([*SOFTMAX_LINES, line("SCALE", 5)], {"length"}),
    "mean of masked scores": (
        [line("EXP", 0), line("MASK", 2), line("RED_MEAN", 3), line("DIVIDE", 3, 4)],
        {"length"},
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leaks_are_caught_and_explained(leak: str) -> None:
    lines, statuses = LEAKS[leak]
    result = compile_dna(changed("transformer", SOFTMAX, lines), SHAPE)
    assert isinstance(result, Rejected) and result.status in statuses and result.reason


@pytest.mark.parametrize("leak", [leak for leak in LEAKS if "position" not in leak])
def test_leaks_are_caught_without_the_rules(leak: str) -> None:
    lines, statuses = LEAKS[leak]
    rejected = perturbed(lower(graph(changed("transformer", SOFTMAX, lines)), 4))
    assert rejected is not None and rejected.status in statuses


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_programs_compile_into_the_band(name: str) -> None:
    program = compiled(golden(name, HEAD_WIDTH))
    model = program.build(0)
    assert sum(weight.numel() for weight in model.parameters()) == program.parameters
    assert SHAPE.parameters[0] <= program.parameters <= SHAPE.parameters[1]
    assert '"ATTEND"' in (program.config.program or "")


def test_the_transformer_of_the_paper_has_its_parameters() -> None:
    block = lower(graph(golden("transformer")), 64)
    assert block.width == 512 and block.parameters == 4 * 512**2 + 2 * 512 * 2048 + 4 * 512


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutations_never_crash_and_every_rejection_has_a_reason(count: int) -> None:
    draws = random.Random(1)
    names, outcomes = Counter[str](), Counter[str]()
    dna = golden("transformer", HEAD_WIDTH)
    for _ in range(count):
        child, name = mutate(dna, draws)
        names[name] += 1
        assert invalid(child) is None and child != dna and graph(child).hash != graph(dna).hash
        result = compile_dna(child, SHAPE)
        outcomes["ok" if isinstance(result, Compiled) else result.status] += 1
        assert isinstance(result, Compiled) or result.reason
    assert names.keys() == MUTATIONS.keys()
    assert outcomes["ok"] > count / 2 and outcomes["leak"] > 0 and outcomes["shape"] > 0


def test_a_graph_is_the_same_however_it_is_written() -> None:
    dna = golden("transformer", HEAD_WIDTH)
    other = copy.deepcopy(dna)
    other["subprograms"][8] = [line("ADD", 1, 0)]
    other["subprograms"][9] = [
        line("COS", 0),
        line("MAX", 0),
        line("C_MUL", 3, const=1),
        line("MAX", 3),
    ]
    assert graph(other).hash == graph(dna).hash
    other["subprograms"][9] = [line("MAX", 0), line("SQUARE", 2)]
    assert graph(other).hash != graph(dna).hash
    tokens = torch.arange(24)[None]
    first, second = (compiled(dna).build(3)(tokens), compiled(copy.deepcopy(dna)).build(3)(tokens))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", GOLDEN)
def test_source_computes_what_the_model_does(name: str) -> None:
    program = compiled(golden(name, HEAD_WIDTH))
    model = program.build(0)
    assert isinstance(model, Logits)
    mixer = model.model.blocks[0].mixer
    namespace: dict[str, Any] = {}
    exec(program.source, namespace)
    block: nn.Module = namespace["Block"]()
    assert len(list(block.parameters())) == len(list(mixer.parameters()))
    for name_here, weight in block.named_parameters():
        weight.data.copy_(mixer.get_parameter(f"values.{name_here.split('_')[-2]}"))
    x = torch.randn(2, 11, program.config.dim)
    ctx: Any = type("Plain", (), {"documents": None, "padding": None})
    torch.testing.assert_close(block(x), mixer(x, ctx)[0])


CACHED = {
    **{name: golden(name, HEAD_WIDTH) for name in GOLDEN},
    "sums, products, wide filters": changed(
        "transformer",
        2,
        [
            line("CUM_SUM", 0),
            line("TANH", 2),
            line("CUM_PROD", 3),
            line("CONV_7X1", 4, dim=2),
            line("DCONV_15X1", 5),
            line("CONV_3X1", 6),
        ],
    ),
    "nothing learnt": changed("transformer", 0, [line("CUM_SUM", 0), line("TANH", 2)]),
    "unusual attention": changed(
        "transformer",
        SOFTMAX,
        [
            line("TANH", 0),
            line("MASK", 2),
            line("ABS", 3),
            line("RED_SUM", 4),
            line("ABS_ROOT", 5),
            line("DIVIDE", 3, 6),
        ],
    ),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 1, 10], [1, 2, 17]])
def test_cached_decoding_equals_the_whole_text(name: str, chunks: list[int]) -> None:
    logits = compiled(CACHED[name]).build(0)
    assert isinstance(logits, Logits)
    model = logits.model.double()
    tokens = torch.randint(29, (2, 20), generator=torch.Generator().manual_seed(0))
    states, parts = model.init_states(2, 23), list[Tensor]()
    with torch.no_grad():
        _, ahead = model(torch.zeros(2, 3, dtype=torch.int64), None, states)
        assert ahead is not None
        states = [
            block.mixer.rollback(state, 3) for block, state in zip(model.blocks, ahead, strict=True)
        ]
        for chunk in tokens.split(chunks, dim=1):
            part, advanced = model(chunk, None, states)
            assert advanced is not None
            states = [
                block.mixer.reorder(state, torch.tensor([0, 1]))
                for block, state in zip(model.blocks, advanced, strict=True)
            ]
            parts.append(part)
        torch.testing.assert_close(
            torch.cat(parts, dim=1), model(tokens)[0], rtol=1e-12, atol=1e-12
        )


def test_a_program_without_a_cached_form_is_refused_with_the_reason() -> None:
    lines = [line("EXP", 0), line("MASK", 2), line("CUM_SUM", 3)]
    model = compiled(changed("transformer", SOFTMAX, lines)).build(0)
    assert isinstance(model, Logits)
    with pytest.raises(ValueError, match="CUM_SUM, looks back at rows of scores"):
        generate(model.model.eval(), torch.tensor([[1, 2, 3]]), 4)


def test_every_primitive_compiles_somewhere() -> None:
    compiled_with = Counter[str]()
    for op in PRIMITIVES:
        scores = [line("EXP", 0), line("MASK", 2)]
        for number, lines in (
            (8, [line("ADD", 0, 1), line("C_MUL", 2, const=1), line(op, 3, 0)]),
            (SOFTMAX, [*scores, line(op, 3, 0)]),
            (1, [line(3, 0), line("T_MAT_MUL", 0, 0), line("MASK", 3), line(op, 4, 0)]),
        ):
            dna = changed(
                "transformer",
                number,
                [
                    {**entry, "op": {"sub": 3} if entry["op"] == 3 else entry["op"]}
                    for entry in lines
                ],
            )
            result = compile_dna(dna, replace(SHAPE, parameters=(10_000, 10_000_000)))
            assert isinstance(result, Compiled) or result.status in (
                "shape",
                "leak",
                "length",
                "nonfinite",
            ), (op, result)
            compiled_with[op] += isinstance(result, Compiled)
    # All programs here have T_MAT_MUL, which makes the scores.
    assert [op for op in PRIMITIVES if not compiled_with[op]] == ["T_MAT_MUL"]


def test_branches_run_at_once_and_equal_one_after_another() -> None:
    """Nested branches and operands from outside a branch are compared with a program written
    without any.
    """
    dna = golden("transformer", HEAD_WIDTH)
    sub = [
        line("CONV_1X1", 0, dim=1),
        line("DCONV_3X1", 2),
        line("MULTIPLY", 3, 1),
        line("SCALE", 4),
    ]
    main = [line({"sub": 1}, 0, 0, branch=2), line("CONV_1X1", 2), line("ADD", 3, 0)]
    dna["subprograms"] = [main, [line({"sub": 2}, 0, 0, branch=4)], sub]
    dna["dims"] = [8, 8, 8, 8, 8, 8]
    program = lower(graph(dna), 1)
    torch.manual_seed(0)
    mixer = ProgramMixer(program).double()
    for weight in mixer.parameters():
        nn.init.normal_(weight)
    conv, filters, scales, last = mixer.parameters()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    branches = []
    for number in range(8):
        channels = slice(8 * number, 8 * number + 8)
        h = x @ conv[channels].T
        h = sum(
            torch.cat((torch.zeros(2, lag, 8, dtype=x.dtype), h[:, : 5 - lag]), 1)
            * filters.view(-1, 3)[channels, lag]
            for lag in range(3)
        )
        branches.append(h * x * scales[channels])
    expected = torch.cat(branches, -1) @ last.T + x
    torch.testing.assert_close(mixer(x, Context.of(x[..., 0]))[0], expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version 2"),
        ({"dims": [3, 1, 1, 1, 1, 1]}, "dims are"),
        ({"constants": [0.0]}, "constants are"),
        ({"subprograms": [[line("ADDD", 0)]]}, "unknown operation 'ADDD'"),
        ({"subprograms": [[line("ADD", 2)]]}, "two states below 2"),
        ({"subprograms": [[line({"sub": 0}, 0)]]}, "it may call"),
        ({"subprograms": [[]]}, "0 instructions"),
        ({"subprograms": [[line("ADD", 0, branch=3)]]}, "branch is 3"),
    ],
)
def test_what_is_no_dna_is_said(change: dict[str, Any], problem: str) -> None:
    result = compile_dna({**golden("transformer"), **change}, SHAPE)
    assert isinstance(result, Rejected) and result.status == "invalid" and problem in result.reason


def test_a_file_holds_a_dna(tmp_path: Path) -> None:
    dna = golden("primer")
    save(dna, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == dna
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b\.json: not a DNA"):
        load(tmp_path / "b.json")


def test_calls_that_multiply_are_cut_off() -> None:
    dna = golden("transformer")
    dna["subprograms"] = [
        [line({"sub": number + 1}, 0, 0), line({"sub": number + 1}, 2, 2)] for number in range(30)
    ] + [[line("SCALE", 0)]]
    result = compile_dna(dna, SHAPE)
    assert result == Rejected("invalid", "its calls, inlined, are more than a block may have")


def test_a_narrower_band_is_met_or_refused() -> None:
    for middle in (40_000, 400_000, 4_000_000):
        result = compile_dna(
            golden("transformer"),
            Shape(vocab=29, length=24, parameters=(middle * 3 // 4, middle * 5 // 4), layers=2),
        )
        assert (
            isinstance(result, Compiled) and middle * 3 // 4 <= result.parameters <= middle * 5 // 4
        )
    refused = compile_dna(
        golden("transformer"), Shape(vocab=29, length=24, parameters=(10, 20), layers=2)
    )
    assert isinstance(refused, Rejected) and refused.status == "band"


def test_a_winner_is_compiled_to_any_width_and_proved_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(golden("primer", 16), tmp_path / "winner.json")
    out, code = tmp_path / "program.json", tmp_path / "block.py"
    assert (
        main(
            [
                "search",
                "compile",
                str(tmp_path / "winner.json"),
                "--dim",
                "128",
                "--out",
                str(out),
                "--source",
                str(code),
            ]
        )
        == 0
    )
    assert "generates with a cache" in capsys.readouterr().out and "class Block" in code.read_text()
    assert load_recipe(
        "quickstart", [f"model.program={out}", "model.dim=128", "model.memory.layers=[]"]
    ).model.program
    assert main(["search", "compile", "transformer", "--dim", "20", "--out", str(out)]) == 2
    assert "choose a multiple of 8" in capsys.readouterr().err
    save(
        changed("transformer", SOFTMAX, LEAKS["mask after normalising"][0]), tmp_path / "leak.json"
    )
    assert (
        main(["search", "compile", str(tmp_path / "leak.json"), "--dim", "64", "--out", str(out)])
        == 2
    )
    assert "later positions" in capsys.readouterr().err
