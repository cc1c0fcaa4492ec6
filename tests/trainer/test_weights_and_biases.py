"""What W&B is given, offline, is metrics.jsonl."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.watch.metrics import METRICS_FILE, read_metrics
from tests.trainer.tiny_run import train_run


def _uploads(folder: Path) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return run, project and lines of every file that would be uploaded, in the order
    of their starts.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    wandb.teardown()  # its process writes
    uploads = []
    for path in sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        store, run, project, lines = DataStore(), "", "", []
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
            if record.HasField("run"):
                run, project = record.run.run_id, record.run.project
            if record.HasField("history"):
                values = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                lines.append(
                    {key: value for key, value in values.items() if not key.startswith("_")}
                )
        store.close()
        uploads.append((run, project, lines))
    return uploads


def test_every_start_is_the_same_run_and_has_all_lines(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="not installed: wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, overrides = (
        tmp_path / "run",
        ("train.wandb=tiny", "train.eval_every=4", "train.save_every=2"),
    )
    train_run(recipe, folder, *overrides, stop_at=6)
    (folder / "checkpoints/step-00000006/COMMITTED").unlink()
    train_run(recipe, folder, *overrides)
    first, second = _uploads(folder)
    assert first[:2] == second[:2] == ((folder / "wandb/run_id").read_text(), "tiny")
    assert second[2] == read_metrics(folder / METRICS_FILE)
    assert {line["step"] for line in first[2]} == set(range(1, 7))


def test_a_missing_package_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else find(name, *rest),
    )
    assert main(["train", str(recipe), "train.wandb=tiny", "--run", str(tmp_path / "run")]) == 2
    assert (
        "train.wandb needs the package wandb: pip install 'memshard[wandb]'"
        in capfd.readouterr().err
    )
    assert not (tmp_path / "run").exists()
