"""What a checkpoint, an export, a recipe or a list says runs no command and connects to nothing,
unless the command line does.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.launch.cli.main import main
from memshard.launch.launchers.start import snapshot
from memshard.trainer.config.load import load_recipe
from memshard.trainer.export.export import export
from tests.data_pipeline.conftest import write_corpus
from tests.trainer.test_bad_input import refused
from tests.trainer.tiny_run import rewrite_config, train_run

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Bait:
    """A command that leaves a mark, and an address that notes who connects."""

    mark: Path
    listener: socket.socket
    data: Path

    @property
    def names(self) -> dict[str, str]:
        """What must be allowed, and the name that a file has in it."""
        return {
            "commands": f"pipe:touch {self.mark}; cat {self.data}/{{file}}",
            "connections": f"http://127.0.0.1:{self.listener.getsockname()[1]}/data",
        }

    def untouched(self) -> bool:
        """Tell whether nothing has run and nobody has connected."""
        try:
            self.listener.accept()
        except BlockingIOError:
            return not self.mark.exists()
        return False


@pytest.fixture
def bait(tmp_path: Path, data: Path) -> Iterator[Bait]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield Bait(tmp_path / "mark", listener, data)


def _hostile(run_and_export: Path, tmp_path: Path, name: str) -> None:
    """Copies of a run and an export that say that their data is `name`."""
    shutil.copytree(run_and_export, tmp_path, dirs_exist_ok=True)
    for folder in (
        tmp_path / "run",
        tmp_path / "run/checkpoints/step-00000001",
        tmp_path / "export",
    ):
        rewrite_config(
            folder,
            lambda text: "\n".join(
                f"  path: {json.dumps(name)}" if line.startswith("  path: ") else line
                for line in text.splitlines()
            ),
        )
    (tmp_path / "hosts").write_text("n1 slots=2\n")


COMMANDS = {
    "eval of a run": ("eval", "{at}/run"),
    "eval of a checkpoint": ("eval", "{at}/run/checkpoints/step-00000001"),
    "eval of an export": ("eval", "{at}/export"),
    "train of a run's folder": ("train", "{at}/run"),
    "train of its recipe": ("train", "{at}/run/config.yaml", "--run", "{at}/other"),
    "launch local": ("launch", "local", "{at}/run", "--ranks", "1"),
    "launch slurm": ("launch", "slurm", "{at}/run", "--dry-run"),
    "launch deepspeed": ("launch", "deepspeed", "{at}/run", "--hostfile", "{at}/hosts"),
}
HARMLESS = {
    "generate": ("generate", "{at}/run", "--prompt", "a", "--max-tokens", "2"),
    "export": ("export", "{at}/run", "{at}/out"),
    "import": ("import", "{at}/export", "{at}/out"),
    "plan": ("plan", "{at}/run"),
    "config": ("config", "show", "{at}/run"),
    "doctor": ("doctor", "{at}/run"),
    "eval of other data": ("eval", "{at}/export", "--data", "{data}"),
}


@pytest.mark.parametrize("need", ["commands", "connections"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_file_says_needs_leave(
    command: str,
    need: str,
    bait: Bait,
    run_and_export: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _hostile(run_and_export, tmp_path, bait.names[need])
    argv = [word.format(at=tmp_path) for word in COMMANDS[command]]
    # Leave to connect is none to run commands.
    for leave in ([], ["--allow", "connections"])[: 2 if need == "commands" else 1]:
        message = refused(capfd, *argv, *leave)
        assert f"config.yaml: data.path is '{bait.names[need]}'" in message
        assert f"says --allow {need}" in message
    assert bait.untouched() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("need", ["commands", "connections"])
@pytest.mark.parametrize("command", HARMLESS)
def test_other_commands_do_not_read_the_data(
    command: str, need: str, bait: Bait, run_and_export: Path, tmp_path: Path, data: Path
) -> None:
    _hostile(run_and_export, tmp_path, bait.names[need])
    assert main([word.format(at=tmp_path, data=data) for word in HARMLESS[command]]) == 0
    assert bait.untouched()


def test_the_command_line_gives_leave(bait: Bait, run_and_export: Path, tmp_path: Path) -> None:
    name = bait.names["commands"]
    _hostile(run_and_export, tmp_path, name)
    assert main(["eval", str(tmp_path / "export"), "--allow", "commands"]) == 0
    assert bait.mark.exists()
    bait.mark.unlink()
    assert main(["eval", str(tmp_path / "export"), "--data", name]) == 0
    assert bait.mark.exists()


@pytest.mark.parametrize("need", ["commands", "connections"])
@pytest.mark.parametrize(
    "text",
    [
        "data: {{path: {name}}}",
        "data: {{path: x, mixture: {{{name}: 1, x: 1}}}}",
        "base: parent.yaml\nmodel: {{layers: 2}}",
    ],
)
def test_a_recipe_needs_leave_and_an_override_none(
    text: str, need: str, bait: Bait, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, file = bait.names[need], tmp_path / "mine.yaml"
    (tmp_path / "parent.yaml").write_text(f"data: {{path: {json.dumps(name)}}}\n")
    file.write_text(text.format(name=json.dumps(name)))
    assert f"says --allow {need}" in refused(capfd, "train", file, "--run", tmp_path / "run")
    assert bait.untouched()
    typed = ["data.path=" + name, "data.mixture={}"]
    assert load_recipe(file, typed, None).data.path == name
    assert load_recipe(file, [], "commands").data


def test_sending_numbers_away_needs_leave(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {recipe}\ntrain: {{wandb: theirs}}\n")
    assert "mine.yaml: train.wandb is 'theirs'" in refused(
        capfd, "train", file, "--run", tmp_path / "run"
    )
    assert load_recipe(file, [], "connections").train.wandb == "theirs"
    assert load_recipe(file, ["train.wandb=mine"], None).train.wandb == "mine"


def test_a_script_passes_leave_on_to_the_recipe_it_stores(bait: Bait, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {path: here}\n")
    for typed, allow in ((["data.path=" + bait.names["commands"]], "commands"), ([], None)):
        start = snapshot(
            Namespace(
                recipe=str(tmp_path / "mine.yaml"),
                overrides=typed,
                folder=str(tmp_path / "run"),
                allow=None,
            )
        )
        assert start.train[-2:] == (["--allow", allow] if allow else ["--run", start.folder])
        assert load_recipe(start.recipe, [], allow)


@pytest.mark.parametrize(
    ("prefix", "line"),
    [
        ("", "{commands}"),
        ("", "{connections}"),
        ("", "s3://bucket/x.txt"),
        ("pipe:cat ", "/dev/null; touch {mark}"),
        ("https://localhost", ".example.com/x.txt"),
        ("https://localhost", "@127.0.0.1/x.txt"),
        ("http", "s://localhost/x.txt"),
    ],
)
def test_a_list_needs_leave(
    prefix: str, line: str, bait: Bait, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "of.paths"
    file.write_text(line.format(mark=bait.mark, **bait.names) + "\n")
    message = refused(
        capfd, *("data", "build", file, "--prefix", prefix, "--out", tmp_path / "data")
    )
    assert f"a line of {file} is" in message and "says --allow co" in message
    assert bait.untouched() and not (tmp_path / "data").exists()
    assert len(find_files([file], prefix=prefix, allow="commands")) == 1


def test_a_list_may_name_local_files_and_those_below_the_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "of.paths").write_text("crawl/a.txt\n../b.txt\n")
    for prefix in ("https://data.example.com/", "s3://bucket/x/"):
        assert find_files([tmp_path / "of.paths"], prefix=prefix) == (
            f"{prefix}crawl/a.txt",
            f"{prefix}../b.txt",
        )
    (tmp_path / "here.paths").write_text(f"{tmp_path}/a.txt\n")
    assert find_files([tmp_path / "here.paths"]) == (tmp_path / "a.txt",)


def test_a_file_whose_name_looks_like_a_command_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found in a folder, by a pattern, or put on the command line by the shell's own `*`."""
    write_corpus(tmp_path / "text", documents=40)
    monkeypatch.chdir(tmp_path / "text")
    name = "pipe:touch PWNED; cat 0001.txt"
    Path(name).write_text("a file of an odd name " * 50)
    for source in (".", "*.txt*", "p*"):
        if source == "p*":
            files: tuple[Path | str, ...] = find_files([source, "0000.txt", "0002.txt"])
        else:
            files = find_files([source])
        out = tmp_path / f"out{len(source)}"
        build_data(Sources(files), out, vocab_size=300, workers=1)
        assert not Path("PWNED").exists()
    message = refused(capfd, "data", "build", name, "--out", tmp_path / "out")
    assert f"write ./{name} for the file" in message
    assert find_files([f"./{name}"]) == (Path(name).absolute(),)


def test_python_files_in_the_folder_that_a_command_is_started_in_are_not_run(
    tmp_path: Path,
) -> None:
    """Workers begin with `python -c`, which looks there first; but a user's script does import what
    is beside it.
    """
    mark = tmp_path / "ran"
    for name in ("multiprocessing", "pickle", "struct", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close(); raise SystemExit")
    script = tmp_path / "scripts/text.py"
    script.parent.mkdir()
    script.write_text("import words\nfor line in range(2000): print(line, words.TEXT)")
    (script.parent / "words.py").write_text("TEXT = 'words of a text.'")
    start = "import sys; from memshard.__main__ import main; sys.exit(main())"
    command = f"pipe:{sys.executable} {script}"
    arguments = ["--documents", "line", "--vocab", "270", "--out", "data", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "data", "build", command, command, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_a_run_in_a_folder_called_like_a_command(
    run_and_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch PWNED;"
    shutil.copytree(run_and_export / "run", name)
    assert main(["generate", name, "--prompt", "a", "--max-tokens", "2"]) == 0
    (tmp_path / "pipe:touch PWNED; cat {file}").mkdir()
    (tmp_path / "pipe:touch PWNED; cat {file}/index.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text('data: {path: "pipe:touch PWNED; cat {file}"}\n')
    assert main(["plan", "mine.yaml"]) == 2  # that index is damaged
    assert not Path("PWNED").exists()


def test_an_export_tells_nothing_of_the_machine(recipe: Path, tmp_path: Path, data: Path) -> None:
    secret = "https://user:hunter2@example.com/data?X-Amz-Signature=cafe"
    train_run(recipe, tmp_path / "first", "train.steps=1")
    folder = tmp_path / "run"
    train_run(recipe, folder, "train.steps=1", f"init_from={tmp_path / 'first'}")
    rewrite_config(
        folder / "checkpoints/step-00000001",
        lambda text: text.replace(
            "  mixture: {}", f"  mixture:\n    {json.dumps(secret)}: 1.0"
        ).replace("  wandb: null", "  wandb: our-secret-project"),
    )
    export(folder, tmp_path / "out", huggingface=True)
    told = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*"))
    for word in ("hunter2", "cafe", "our-secret-project", str(tmp_path), str(data), "/home/"):
        assert word.encode() not in told, word


def test_what_has_no_data_asks_for_it(
    run_and_export: Path, tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(run_and_export / "export"), str(tmp_path / "back")]) == 0
    for path in (run_and_export / "export", tmp_path / "back"):
        assert "give --data DIR" in refused(capfd, "eval", path)
        assert main(["eval", str(path), "--data", str(data)]) == 0
    message = refused(capfd, "train", run_and_export / "export", "--run", tmp_path / "run")
    assert "give data.path=DIR" in message


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.model"])
@pytest.mark.parametrize("memmap", [[], ["--memmap"]])
def test_every_file_of_an_export_is_compared_with_its_hash(
    name: str,
    memmap: list[str],
    run_and_export: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(run_and_export / "export", tmp_path / "export"))
    whole = (folder / name).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole.replace(b"e", b"a", 1)):
        (folder / name).write_bytes(content)
        message = refused(capfd, "generate", folder, "--prompt", "a", *memmap)
        assert f"export is damaged (ValueError: {name} does not match its hash)" in message


def test_a_number_of_an_exports_configuration_that_changed_is_noticed(
    run_and_export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers builds the model from it, and would compute other logits without a word."""
    config = pytest.importorskip("memshard.trainer.export.remote.configuration_memshard")
    folder = Path(shutil.copytree(run_and_export / "export", tmp_path / "export"))
    fields = json.loads((folder / "config.json").read_text())
    config.MemshardConfig(**fields)
    fields["model"]["memory"]["topk"] -= 1
    (folder / "config.json").write_text(json.dumps(fields))
    said = "the model in config.json does not match its hash"
    assert said in refused(capfd, "generate", folder, "--prompt", "a")
    with pytest.raises(ValueError, match=said):
        config.MemshardConfig(**fields)
