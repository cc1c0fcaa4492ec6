"""Shell commands of a start: what every launcher runs, and torchrun's options."""

import shlex
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import memshard
from memshard.trainer.config.load import dump, load_recipe

CODE, RECIPE, LOGS = "code", "recipe.yaml", "log"
RENDEZVOUS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torchrun's restarts meet the addresses of dead processes (torch 2.13)."""


@dataclass(frozen=True)
class Start:
    """What to run: a recipe, its overrides, and the run's folder. code: a folder for PYTHONPATH, or
    None for what is installed.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: str
    code: str | None = None

    @property
    def train(self) -> list[str]:
        """The memshard command."""
        return ["memshard", "train", self.recipe, *self.overrides, "--run", self.folder]


def snapshot(recipe: str, overrides: list[str], folder: Path) -> Start:
    """Copy the code and the resolved recipe into the run's folder, so that a job that starts later,
    or again, runs what was launched.
    """
    resolved = dump(load_recipe(recipe, overrides))
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(resolved)
    code = folder / CODE
    shutil.rmtree(code, ignore_errors=True)
    shutil.copytree(
        Path(memshard.__file__).parent,
        code / "memshard",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return Start(str(folder / RECIPE), (), str(folder), str(code))


def torchrun_options(shutdown: int, torch_version: str | None = None) -> list[str]:
    """Options to pass SIGUSR2 on to the ranks and wait for their save; torch older than 2.13 does
    not have them.

    shutdown: seconds until ranks that do not end are killed. torch_version: by default the one
    installed here.
    """
    if tuple(int(part) for part in (torch_version or version("torch")).split(".")[:2]) < (2, 13):
        return []
    return [
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        f"--shutdown-timeout={shutdown}",
    ]


def shell(words: list[str]) -> str:
    """A command line."""
    return shlex.join(words)
