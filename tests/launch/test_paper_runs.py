"""The paper's runs on 32 GPUs, as far as they go without one: planned, dry-run, rendered."""

import json
import subprocess
from pathlib import Path

import pytest

from memshard.launch.cli.main import main


@pytest.mark.parametrize(
    ("recipe", "card", "dim"),
    [("lample2019-32x16g", "v100-16g", 1024), ("lample2019-32x32g", "v100-32g", 1600)],
)
def test_32_gpu_recipes(
    recipe: str, card: str, dim: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, "--world", "32", "--device", card, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (
        result["fits"]
        and result["precision"] == "fp16"
        and result["parameters"]["table"] == 2**20 * dim
    )
    assert [part["table"] for part in result["dry_run"]] == [2**20 * dim // 32] * 2
    kept = {variant["name"]: variant["bytes"] for variant in result["variants"]}
    assert (
        kept["reversible"]
        == result["bytes"]["total"]
        < kept["checkpointing full"]
        < kept["checkpointing none"]
    )
    facts = {
        "nodes": 4,
        "gpus": 8,
        "partition": "gpu",
        "constraint": card,
        "interface": "ib0",
        "time": "24:00:00",
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(facts))
    assert (
        main(["launch", "slurm", recipe, "--cluster", str(tmp_path / "cluster.yaml"), "--dry-run"])
        == 0
    )
    script = capfd.readouterr().out
    assert (
        f"\n#SBATCH --constraint={card}\n" in script
        and "\n#SBATCH --nodes=4\n" in script
        and f"memshard train {recipe} " in script
    )
    (tmp_path / "submit.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "submit.sh")]).returncode == 0


def test_the_wide_model_on_small_cards_is_told_what_to_change(
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "plan",
        "lample2019-32x32g",
        "model.residual=pre",
        "train.micro_batch=64",
        "--world",
        "32",
        "--device",
        "v100-16g",
    ]
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert (
        "does not fit" in out
        and "set train.zero=1" not in out
        and "set train.micro_batch=16" in out
    )
    assert "suggested on 32 x v100-16g: train.micro_batch=16 (about" in out
