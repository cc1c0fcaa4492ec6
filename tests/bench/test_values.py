"""`memshard bench values` measures every competitor that is installed, and says what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memshard.bench.values.report import FBGEMM, OURS
from memshard.bench.values.table import DENSE, PLAIN, SPARSE, Sizes, measure

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_table_that_copies_its_gradient_takes_more_memory() -> None:
    """A dense gradient of 32,768 x 256 is 34 MB beside 101 MB of values and moments,
    which both have.
    """
    result = measure(Sizes(32_768, 256, 16, (64,), rounds=1), [OURS, DENSE])
    ours, dense = result["tokens"][64][OURS], result["tokens"][64][DENSE]
    assert ours["ratio"] == 1 and dense["ratio"] > 1
    assert ours["forward_bytes_per_s"] == 64 * 16 * 256 * 4 / ours["forward"]
    assert 90e6 < result["peak_memory"][OURS] < result["peak_memory"][DENSE]


@pytest.mark.slow
def test_all_competitors(tmp_path: Path) -> None:
    pytest.importorskip("fbgemm_gpu")
    command = [
        sys.executable,
        "-m",
        "memshard",
        "bench",
        "values",
        "--quick",
        "--threads",
        "1",
        "--json",
        "--out",
        str(tmp_path / "v.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["table"]["tokens"]["256"]) == {OURS, PLAIN, SPARSE, DENSE, FBGEMM}
    assert len(result["layers"]) == 2 and not result["missing"]
    assert json.loads((tmp_path / "v.json").read_text()) == result
