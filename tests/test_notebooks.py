"""The notebooks run as they are; the one that is committed with outputs has those of such a run."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
EXECUTED = "what_a_memory_reads"  # its pictures are the point; the other is committed without

pytestmark = pytest.mark.filterwarnings("default")


def _read(path: Path) -> Any:
    return pytest.importorskip("nbformat").read(path, as_version=4)


def _kinds(cell: Any) -> set[str]:
    """Return the kinds of a cell's outputs; one print may come in several pieces."""
    return {output.output_type for output in cell.get("outputs", [])}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lines_are_short_and_only_one_notebook_has_outputs(path: Path) -> None:
    cells = _read(path).cells
    assert not [line for cell in cells for line in cell.source.splitlines() if len(line) > 100]
    outputs = [cell.outputs for cell in cells if cell.cell_type == "code"]
    assert any(outputs) == (path.stem == EXECUTED)


def test_outputs_are_there_and_name_no_machine() -> None:
    path = ROOT / f"docs/notebooks/{EXECUTED}.ipynb"
    cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(
        output.output_type == "display_data" or "data" in output
        for cell in cells
        for output in cell.outputs
    )
    shown = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in cells
        for output in cell.outputs
    )
    assert not re.search(r"(^|[\s'\"])/\w+/|site-packages|Warning", shown)
    assert path.stat().st_size < 250_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = _read(path)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    if path.stem == EXECUTED:
        for cell, committed in zip(notebook.cells, _read(path).cells, strict=True):
            assert _kinds(cell) == _kinds(committed)
