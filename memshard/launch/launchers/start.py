"""The command that every launcher starts: `memshard train` with a recipe and a run folder."""

import argparse
import hashlib
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import memshard
from memshard.data_pipeline.fetch import Allowed
from memshard.io import check_free, whole_folder
from memshard.launch.cli.train import run_folder, train_command

CODE, RECIPE, LOGS = "code", "recipe.yaml", "log"
_PACKAGE = Path(memshard.__file__).parent
_CONTENT = "[0-9a-f]{16}"
SUBMIT, HOSTFILE, DEEPSPEED_ENV = "submit.sh", "hostfile", "deepspeed_env"
RENDEZVOUS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torchrun's restarts meet the addresses of dead processes (torch 2.13)."""


@dataclass(frozen=True)
class Start:
    """A command to start: a recipe, its overrides, and the run's folder. code: a folder for
    PYTHONPATH, or None for the installed package. allow: what the recipe's file may ask for.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: str
    code: str | None = None
    allow: Allowed | None = None

    @property
    def train(self) -> list[str]:
        """The memshard command."""
        return train_command(self.recipe, self.overrides, self.folder, self.allow)


def installed(args: argparse.Namespace) -> Start:
    """Return the start that runs the installed code and the recipe as it is; ValueError if the
    recipe is wrong.
    """
    from memshard.trainer.config.load import load_recipe

    load_recipe(args.recipe, args.overrides, args.allow)
    return Start(args.recipe, tuple(args.overrides), str(run_folder(args)), allow=args.allow)


def snapshot(args: argparse.Namespace) -> Start:
    """Copy the code and the resolved recipe into the run's folder, so that a job that starts later,
    or again, runs what was launched; return the start that runs them.
    """
    from memshard.trainer.config.load import dump, load_recipe, needs

    folder = run_folder(args)
    recipe = load_recipe(args.recipe, args.overrides, args.allow)
    code = folder / CODE
    # A copy each, by content; earlier versions had one, which was written over.
    ours = re.compile(rf"{memshard.__name__}|{_CONTENT}(\.[0-9a-f]{{8}}\.partial)?")
    if not code.is_dir() or not all(ours.fullmatch(name) for name in os.listdir(code)):
        # Not of an earlier launch, which would be written over.
        check_free(
            folder,
            (CODE, RECIPE, SUBMIT, HOSTFILE, DEEPSPEED_ENV),
            "choose another folder with --run",
        )
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    # Resolved: a bundled recipe or a file may change before the job starts, and overrides
    # are in it.
    (folder / RECIPE).write_text(dump(recipe), encoding="utf-8")
    # The code as well: a queued job would otherwise run whatever the checkout has hours later.
    # Launched again, the run gets another copy: its job may be running, and be queued again.
    copied = code / _hash_of_code()
    if not copied.is_dir():
        with whole_folder(copied) as partial:
            shutil.copytree(
                _PACKAGE, partial / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")
            )
    # The overrides of this command line, which needed no leave, are in a file now.
    return Start(str(folder / RECIPE), (), str(folder), str(copied), needs(recipe))


def _hash_of_code() -> str:
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*")):
        if file.is_file() and file.parent.name != "__pycache__":
            digest.update(f"{file.relative_to(_PACKAGE)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def torchrun_options(shutdown: int, torch_version: str | None = None) -> list[str]:
    """Return the options that pass SIGUSR2 on to the ranks and wait for their save; none for torch
    older than 2.13, which lacks them.

    shutdown: seconds until ranks that do not end are killed. torch_version: by default the one
    installed here.
    """
    # Numbers, since "2.9" comes after "2.13" as text.
    if tuple(int(part) for part in (torch_version or version("torch")).split(".")[:2]) < (2, 13):
        return []
    return [
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2",
        f"--shutdown-timeout={shutdown}",
    ]


def shell(words: list[str]) -> str:
    """Return the words as one shell command line."""
    return shlex.join(words)
