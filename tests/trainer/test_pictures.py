import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memshard.trainer.evaluation.pictures import loss_curve, usage_map

image = pytest.importorskip("matplotlib.image")


def write_metrics(path: Path, steps: int = 20) -> Path:
    lines = [
        json.dumps({"step": step, "train/loss": 5 - step / 10}) for step in range(1, steps + 1)
    ]
    lines.insert(10, json.dumps({"step": 10, "eval/loss": 4.2}))
    path.write_text("\n".join(lines) + "\n")
    return path


def picture(path: Path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels: np.ndarray = image.imread(path)
    height, width = pixels.shape[:2]
    assert 1000 <= width <= 2000 and 500 <= height <= 1200
    return pixels[..., :3]


def purple_share(pixels: np.ndarray) -> float:
    """Return the share of the picture in the darkest colour of the map, which stands for the least
    read slots.
    """
    return float((np.abs(pixels - np.array([0.267, 0.005, 0.329])).max(-1) < 0.02).mean())


@pytest.mark.parametrize("name", ["a$\\frac{$b", "${{$", "\udcff"])
def test_a_name_that_is_no_formula_and_no_unicode_is_drawn(name: str, tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "a.jsonl")
    loss_curve({name: file}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_a_strangers_matplotlibrc_in_the_current_folder_changes_no_picture(tmp_path: Path) -> None:
    """With `text.usetex` it would run LaTeX on a preamble of his."""
    file = write_metrics(tmp_path / "a.jsonl")
    loss_curve({"run": file}, tmp_path / "usual.png")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    draw = (
        "from memshard.trainer.evaluation.pictures import loss_curve\n"
        "loss_curve({'run': 'a.jsonl'}, 'his.png')"
    )
    subprocess.run([sys.executable, "-P", "-c", draw], cwd=tmp_path, check=True)
    assert (tmp_path / "his.png").read_bytes() == (tmp_path / "usual.png").read_bytes()


def test_a_pipe_called_matplotlibrc_is_not_waited_for(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "matplotlibrc")
    draw = (
        "from memshard.trainer.evaluation.pictures import loss_curve\n"
        f"loss_curve({{'run': {str(file)!r}}}, 'loss.png')"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", draw],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{tmp_path}/matplotlibrc is no regular file: remove it" in ended.stderr


def test_loss_curves_of_several_runs(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "a.jsonl")
    loss_curve({"with": file, "without": str(file)}, tmp_path / "loss.png")
    assert (picture(tmp_path / "loss.png") < 0.9).any()


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "a.jsonl")
    loss_curve({"run": file}, tmp_path / "whole.png")
    file.write_text('{"step": 1, "tra\n' + file.read_text() + '{"step": 21, "tra')
    loss_curve({"run": file}, tmp_path / "damaged.png")
    assert (tmp_path / "damaged.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_no_losses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl has no train/loss"):
        loss_curve({"run": tmp_path / "empty.jsonl"}, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="no metrics files"):
        loss_curve({}, tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        loss_curve({"run": tmp_path / "missing.jsonl"}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("keys", [1, 7, 128, 1100])
def test_usage_map(keys: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(3, keys * keys)
    usage_map(counts, keys, tmp_path / "usage.png", title="layer 4")
    picture(tmp_path / "usage.png")


def test_unread_slots_are_told_from_slots_read_once(tmp_path: Path) -> None:
    shares = []
    for read in (0, 32, 64):
        counts = np.zeros((64, 64))
        counts[:read] = 1
        usage_map(counts.ravel(), 64, tmp_path / "usage.png")
        shares.append(purple_share(picture(tmp_path / "usage.png")))
    none, half, full = shares
    assert none < 0.01 and full > 0.2
    assert half == pytest.approx(full / 2, rel=0.05)


def test_rows_of_the_map_are_first_sub_keys(tmp_path: Path) -> None:
    counts = np.zeros((64, 64))
    counts[:16] = 1
    usage_map(counts.ravel(), 64, tmp_path / "usage.png")
    pixels = picture(tmp_path / "usage.png")
    half = len(pixels) // 2
    assert purple_share(pixels[:half]) > 10 * purple_share(pixels[half:])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones(10), "expected one number for each of 4 x 4 = 16 slots"),
        (np.full(16, -1), "not negative"),
        (np.full(16, np.nan), "finite"),
    ],
)
def test_bad_counts(counts: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        usage_map(counts, 4, tmp_path / "usage.png")
    assert not (tmp_path / "usage.png").exists()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from memshard.trainer.evaluation.pictures import usage_map\n"
        "try: usage_map([1], 1, 'x.png')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "pip install 'memshard[eval]'" in done.stdout, done.stderr
