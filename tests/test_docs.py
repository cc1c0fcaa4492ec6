"""What README and docs print below a command is what the command prints."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshard.launch.cli.main import main

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+\.\d+")


def _shown(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the commands after `$ ` in code blocks, with the lines below them."""
    text = page.read_text("utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            yield command, lines


SHOWN = [
    pytest.param(command, lines, id=f"{page.name}: {command}")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for command, lines in _shown(page)
]
COMMANDS = [case for case in SHOWN if case.values[0].startswith("memshard ")]
SCRIPTS = [case for case in SHOWN if case not in COMMANDS]


def _check(shown: list[str], printed: list[str], tolerance: float) -> None:
    """Check that the lines were printed in this order; `...` stands for any, a last ` ...` for the
    rest of a line. Numbers with a point may differ by the tolerance, relative.
    """
    rest = iter(printed)
    for line in shown:
        if line.strip() == "...":
            continue
        text = line.removesuffix(" ...")
        numbers = [float(number) for number in NUMBER.findall(text)]
        for other in rest:
            other = other if text == line else other[: len(text)]
            if NUMBER.sub("#", other) == NUMBER.sub("#", text) and numbers == pytest.approx(
                [float(number) for number in NUMBER.findall(other)], rel=tolerance
            ):
                break
        else:
            raise AssertionError(f"not printed, or not in this order: {line!r} in {printed}")


@pytest.mark.parametrize(("command", "lines"), COMMANDS)
def test_commands_print_what_the_pages_show(
    command: str, lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)[1:]) == 0
    _check(lines, capfd.readouterr().out.splitlines(), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "lines"), SCRIPTS)
def test_scripts_print_what_the_pages_show(script: str, lines: list[str], work: Path) -> None:
    """Losses differ in the third digit between processors."""
    words = shlex.split(script)
    program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    paths = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
    done = subprocess.run(
        [sys.executable, *program, *paths],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _check(lines, done.stdout.splitlines(), 0.01)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all scripts: one goes on where another ended."""
    return tmp_path_factory.mktemp("scripts")
