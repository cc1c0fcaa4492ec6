"""Every benchmark runs by `memshard bench NAME`, and no command of the docs has another name."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from memshard.bench.catalogue import BENCHMARKS
from memshard.experiments.common import catalogue
from memshard.launch.cli.bench import _BenchmarkParser
from memshard.launch.cli.main import main

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")]

SMALLEST = {
    "product-topk": "--tokens 8 --heads 1 --keys 16 --topk 4 --rounds 1",
    "lsh": "--lengths 1024 --rounds 1",
    "million-tokens": "--tokens 1024 --dim 32 --heads 2 --layers 1",
    "reversible": "--layers 1 --dim 32 --length 16 --batch 2 --rounds 1 --time-layers 1",
    "fast-weights": "--rounds 1",
    "ngram-hash": "--vocabulary 64 --rows 100 --batch 1 --length 16 --rounds 1",
    "primer": "--rounds 1",
    "candidates": "--count 4 --seeds 1",
    "duplicates": "--documents 2000",
    "export": "--slots 1024 --dim 16",
    "against": f"{ROOT} {ROOT} --only table --rounds 1 --steps 1",
}


def test_the_list_and_a_missing_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == list(BENCHMARKS)
    assert main(["bench"]) == 2
    assert f"name a benchmark: {', '.join(BENCHMARKS)}" in capfd.readouterr().err
    assert main(["bench", "valeus"]) == 2
    assert "'values'" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["--list"], ["--help"], ["values", "--help"]])
def test_listing_benchmarks_does_not_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom memshard.launch.cli.main import main\n"
        f"try: main(['bench', *{arguments}])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_help_of_every_benchmark_names_its_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", name, "--help"])
    assert re.search(r"--out (FILE|DIR)", capsys.readouterr().out)


def test_commands_in_the_docs_exist() -> None:
    """Every `memshard bench NAME` and `memshard reproduce NAME` that is written anywhere names one
    that exists.
    """
    known = {"bench": set(BENCHMARKS), "reproduce": set(catalogue.names())}
    places = {"NAME", "..."}
    wrong, seen = [], 0
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for command, name in re.findall(r"\bmemshard (bench|reproduce) +([\w./-]+)", text):
            studies = name.endswith("/...") and any(
                other.startswith(name[:-3]) for other in known[command]
            )
            seen += 1
            if not (name in known[command] | places or name.startswith("--") or studies):
                wrong.append(f"{path.relative_to(ROOT)}: memshard {command} {name}")
        wrong += [
            f"{path.relative_to(ROOT)}: {module}; write memshard bench NAME"
            for module in re.findall(r"-m memshard\.bench[\w.]*|memshard/bench/\w[\w./]*", text)
        ]
    assert not wrong, "\n".join(wrong)
    assert seen > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_runs_at_its_smallest_size(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It prints something for people, and writes JSON to a file."""
    out = tmp_path / "result.json"
    assert main(["bench", name, *SMALLEST[name].split(), "--out", str(out)]) == 0
    assert capfd.readouterr().out.strip() and json.loads(out.read_text())


def test_another_checkout_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "against", str(tmp_path), str(tmp_path)]) == 2
    assert "is no checkout: it has no folder memshard" in capfd.readouterr().err


def test_a_gpu_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "values-gpu"]) == 2
    assert "memshard bench values measures the CPU" in capfd.readouterr().err


@pytest.mark.parametrize("name", BENCHMARKS)
def test_defaults_are_among_what_is_taken(name: str) -> None:
    """`memshard bench` refuses numbers below 1 of options that do not say otherwise."""
    parser = _BenchmarkParser(benchmark=BENCHMARKS[name])
    import_module(BENCHMARKS[name].module).add_arguments(parser)
    for action in parser._actions:
        for value in action.default if isinstance(action.default, list) else [action.default]:
            if isinstance(value, int) and action.type is not None:
                assert parser._get_value(action, str(value)) == value, action.dest
