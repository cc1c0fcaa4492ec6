import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from memshard.launch.cli import main as cli
from memshard.launch.cli.outcome import Stopped, usage_errors
from memshard.launch.cli.parser import Subparsers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "a.yaml").write_text("data: {path: shards}\n")
    return str(tmp_path / "a.yaml")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a command `work HOW [key=value ...]` that ends in each of the ways a command can end."""

    def run(args: argparse.Namespace) -> dict[str, object]:
        print("chatter")
        os.write(1, b"chatter of a C library\n")
        if args.how == "usage":
            with usage_errors():
                raise FileNotFoundError("shards/: no index\nbuild it")
        if args.how == "stop":
            raise Stopped("step 3 of 10; resume with the same command", {"step": 3})
        if args.how == "interrupt":
            raise KeyboardInterrupt
        if args.how == "bug":
            raise ValueError("inside\nthe loop")
        return {
            "loss": float("nan"),
            "path": Path("x"),
            "overrides": args.overrides,
            "steps": args.steps,
        }

    def add_parser(subparsers: Subparsers) -> None:
        parser = subparsers.add_parser("work")
        parser.add_argument("how")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--steps", type=int)
        parser.set_defaults(run=run)

    monkeypatch.setattr(cli, "COMMANDS", [SimpleNamespace(add_parser=add_parser)])
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


ENDS = [
    ("usage", 2, "memshard: error: shards/: no index build it"),
    ("stop", 75, "memshard: stopped: step 3 of 10; resume with the same command"),
    ("interrupt", 75, "memshard: stopped: interrupted; run the same command again to resume"),
    (
        "bug",
        1,
        "memshard: error: ValueError: inside the loop (run again with --debug for the traceback)",
    ),
]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(("how", "code", "line"), ENDS)
def test_each_end_has_its_exit_code_and_one_line(
    capfd: pytest.CaptureFixture[str], how: str, code: int, line: str
) -> None:
    assert cli.main(["work", how]) == code
    assert capfd.readouterr().err == f"{line}\n"


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("argv", [["--json", "work"], ["work", "--json"]])
@pytest.mark.parametrize(("how", "code", "line"), [*ENDS, ("done", 0, "")])
def test_json_is_all_that_reaches_standard_output(
    capfd: pytest.CaptureFixture[str], argv: list[str], how: str, code: int, line: str
) -> None:
    assert cli.main([*argv, how]) == code
    out, err = capfd.readouterr()
    result = json.loads(out)
    if how == "done":
        assert result == {"loss": None, "path": "x", "overrides": [], "steps": None}
    else:
        _, kind, message = line.split(": ", 2)
        assert result == {kind: message, **({"step": 3} if how == "stop" else {})}
    assert "chatter\n" in err and "C library" in err


@pytest.mark.usefixtures("work")
def test_other_ranks_repeat_nothing_but_their_own_crashes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["work", "usage", "--json"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "error" not in err
    assert cli.main(["work", "bug"]) == 1
    assert "memshard: error: rank 3: ValueError: inside the loop" in capfd.readouterr().err


@pytest.mark.usefixtures("work")
def test_overrides_may_stand_after_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "work", "done", "a=1", "--steps", "4", "b=2", "c=-3"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["overrides"], result["steps"]) == (["a=1", "b=2", "c=-3"], 4)


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (see memshard --help)"),
        (["wrok"], "invalid choice: 'wrok'"),
        (["work", "done", "--step", "3"], "unrecognized arguments: --step 3"),
        (
            ["work", "done", "--steps", "x"],
            "argument --steps: invalid int value: 'x' (see memshard work --help)",
        ),
        (["work", "done", "--steps", "3", "stray"], "unrecognized arguments: stray"),
    ],
)
def test_bad_usage_is_exit_2_and_one_line(
    capfd: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(argv) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_train_says_what_it_needs(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    assert "are required: RECIPE (see memshard train --help)" in capfd.readouterr().err
    assert cli.main(["train", "quickstrat"]) == 2
    err = capfd.readouterr().err
    assert "did you mean 'quickstart'?" in err and "`memshard config list`" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert all(word in script for word in ("generate", "length-penalty", "slurm"))
    if shell == "bash":
        ask = "COMP_WORDS=(memshard gen); COMP_CWORD=1; _shtab_memshard memshard gen memshard"
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}; echo ${{COMPREPLY[@]}}"],
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == ["generate"], done.stderr


def test_options_of_a_cluster_say_what_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["launch", "slurm", "--help"])
    text = " ".join(capfd.readouterr().out.split())
    assert "--interface TEXT network interface for NCCL and gloo, such as ib0" in text
    assert "as in the file" not in text


@pytest.mark.usefixtures("work")
def test_debug_adds_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["work", "bug", "--debug"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and err.endswith("memshard: error: ValueError: inside the loop\n")


def test_recipes_are_listed_with_a_sentence_each(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "config", "list"]) == 0
    recipes = json.loads(capfd.readouterr().out)
    assert recipes["transformer-gelu"] == "`transformer` with GELU"
    assert set(recipes) == {path.stem for path in (ROOT / "memshard/recipes").glob("*.yaml")}
    assert all(recipes.values())


def test_config_commands(capfd: pytest.CaptureFixture[str], recipe: str) -> None:
    assert cli.main(["config", "show", recipe, "model.layers=3"]) == 0
    assert "\n  layers: 3\n" in capfd.readouterr().out
    assert cli.main(["config", "diff", recipe, recipe]) == 0
    assert capfd.readouterr().out == ""
    assert cli.main(["config", "explain", "train.keep"]) == 0
    assert "train.keep: integer; default 2" in capfd.readouterr().out
    assert cli.main(["--json", "config", "explain", "train.kep"]) == 2
    assert json.loads(capfd.readouterr().out) == {
        "error": "unknown key 'train.kep'; did you mean 'train.keep'?"
    }


def test_the_installed_command_end_to_end(recipe: str) -> None:
    command = [sys.executable, "-m", "memshard", "config", "show", recipe, "--json"]
    done = subprocess.run([*command, "train.steps=5"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["steps"] == 5
    wrong = subprocess.run([*command, "train.stesp=5"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("memshard: error: ") and wrong.stderr.count("\n") == 1
