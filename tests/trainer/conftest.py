"""A data folder that a run reads through in a few steps, and a recipe for it."""

from pathlib import Path

import pytest

from memshard.trainer.export.export import export
from tests.data_pipeline.conftest import build, write_corpus
from tests.trainer.tiny_run import RECIPE, train_run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_corpus(folder / "text", documents=8, seed=2)
    build(folder / "text", folder / "data", vocab_size=300, held_out=0.3)
    return folder / "data"


@pytest.fixture(scope="session")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(data=data))
    return path


@pytest.fixture(scope="session")
def run_and_export(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of one step, `run`, and its export, `export`; tests copy them."""
    folder = tmp_path_factory.mktemp("trained")
    train_run(recipe, folder / "run", "train.steps=1")
    export(folder / "run", folder / "export")
    return folder
