"""The trainer's small recipe, and its runs without any launcher."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.launch.runs import train_undisturbed
from tests.trainer.conftest import data as data
from tests.trainer.conftest import recipe as recipe


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs `long` and `short`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_distributed(train_undisturbed, 2, recipe, folder, timeout=300)
    return folder
