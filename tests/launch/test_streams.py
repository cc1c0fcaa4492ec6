"""Commands whose standard streams are closed, are pipes that nobody reads, or know few letters."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.config.load import load_recipe
from tests.data_pipeline.conftest import write_corpus
from tests.trainer.tiny_run import numbers, train_run

MEMSHARD = f"{sys.executable} -m memshard"


def _shell(line: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        # Buffered, as by default, standard error keeps what it could not write.
        env={**os.environ, "PYTHONUNBUFFERED": "", **variables},
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&- <&-", "> /dev/full", "2> /dev/full"])
def test_a_run_ends_well_without_its_streams(closed: str, recipe: Path, tmp_path: Path) -> None:
    """And what it prints lands in none of its files."""
    run = tmp_path / "run"
    done = _shell(f"{MEMSHARD} train {recipe} --run {run} train.steps=3 {closed}")
    assert done.returncode == 0, done.stderr
    assert len(numbers(run, "train/loss")) == 3 and len(committed(run / "checkpoints")) == 1
    assert "Error" not in done.stderr, done.stderr


def test_a_terminal_gets_text_and_no_control_sequences() -> None:
    """Names of files and what a stranger's model generates may hold those of the clipboard."""
    text = "a\x1b]52;c;eA==\x07b\x9b2J\tc\u3000\xe4"
    code = (
        "import logging, sys; from memshard.launch.cli.streams import prepare_streams\n"
        f"prepare_streams(); prepare_streams(); print({text!r})\n"
        f"logging.getLogger().warning({text!r})"
    )
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code],
            stdout=terminal,
            stderr=terminal,
            check=True,
        )
        shown = os.read(reader, 4096).decode()
    os.close(reader)
    spelled = "a\\x1b]52;c;eA==\\x07b\\x9b2J\tc\u3000\xe4"
    assert shown.split("\r\n") == [spelled, spelled, ""]


def test_a_data_set_is_built_without_standard_error(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=8, seed=2)
    out = tmp_path / "out"
    line = f"{MEMSHARD} data build {tmp_path}/text --vocab 300 --held-out 0.3 --out {out} 2>&-"
    assert _shell(line).returncode == 0
    assert (out / "index.json").exists()


@pytest.mark.parametrize("command", ["config explain", "config explain --json", "bench --list"])
def test_a_pipe_that_is_closed_ends_a_command_quietly(command: str) -> None:
    # The reader is gone before the command prints, however long that takes.
    done = _shell(f"{MEMSHARD} {command} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "141\n"
    # With --json the text for people goes there.
    assert "memshard:" not in done.stderr and ("--json" in command or done.stderr == "")


def test_a_run_whose_output_nobody_reads_goes_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = (
        f"{MEMSHARD} train {recipe} --run {run} train.steps=5 2>&1 | true; echo ${{PIPESTATUS[0]}}"
    )
    done = _shell(line)
    assert done.stdout == "0\n", done.stderr
    assert len(numbers(run, "train/loss")) == 5


def test_output_that_does_not_arrive_is_an_error() -> None:
    done = _shell(f"{MEMSHARD} config explain > /dev/full")
    assert done.returncode in (1, 2) and "No space left on device" in done.stderr


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    """At any moment from the package's first line on."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'memshard.launch.cli.parser': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        "from memshard.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "memshard: stopped: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_does_so_as_by_ctrl_c(
    number: signal.Signals, tmp_path: Path
) -> None:
    """It releases its lock, and its exit code says that it can go on."""
    command = ["data", "build", "pipe:sleep 10", "--out", str(tmp_path / "data")]
    process = subprocess.Popen([sys.executable, "-m", "memshard", *command], stderr=subprocess.PIPE)
    lock = tmp_path / ".data.work/lock"
    while not (lock.parent / "units").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and not lock.exists()
    assert b"memshard: stopped: interrupted; run the same command again to resume" in error


def test_a_terminal_that_is_closed_costs_no_step(recipe: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    ours, theirs = os.openpty()
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "memshard", "train", recipe, "--run", run, "train.steps=100000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        # The terminal becomes the session's, as a login's is.
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )
    os.close(theirs)
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or len(numbers(run, "train/loss")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
            os.set_blocking(ours, False)
            with suppress(BlockingIOError):
                os.read(ours, 1 << 16)  # a terminal that nobody reads would stop the run
        os.close(ours)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    (checkpoint,) = committed(run / "checkpoints")
    assert int(checkpoint.name[5:]) == max(numbers(run, "train/loss"))


def test_files_of_a_run_in_a_latin_locale_are_read_in_every_other(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    if shutil.which("localedef") is None:
        pytest.skip("no localedef")
    made = tmp_path / "locales"
    made.mkdir()
    locale = made / "en_US.ISO-8859-1"
    if subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", locale]).returncode:
        pytest.skip("no description of ISO-8859-1")
    latin = {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(made), "PYTHONUTF8": "0"}
    # In bytes of that locale, as its shell would give them.
    folder = os.fsencode(tmp_path) + b"/d\xfc"
    shutil.copytree(os.fsencode(data), folder)
    command = f"{MEMSHARD} train {recipe} --run {tmp_path}/run train.steps=2 data.path="
    done = subprocess.run(
        ["bash", "-c", command.encode() + folder],
        capture_output=True,
        env={**os.environ, **latin},
    )
    assert done.returncode == 0, done.stderr
    for config in (tmp_path / "run/config.yaml", *tmp_path.glob("run/checkpoints/*/config.yaml")):
        assert load_recipe(config).data.path.endswith("/dü")
    resumed = train_run(tmp_path / "run/config.yaml", tmp_path / "run", f"data.path={data}")
    assert resumed["step"] == 2
