"""Images as bytes (Kitaev et al. 2020, section 5): train on them, and complete the lower halves of
held-out ones.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memshard.data_pipeline.format.index import INDEX_FILE, load_index
from memshard.data_pipeline.stream.records import HeldOutRecords, RecordStream
from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.clock import now
from memshard.experiments.common.repeated import mean_deviation, median_range, seeds
from memshard.experiments.common.training_runs import train_to_end
from memshard.lock import holding
from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.decode.generate import generate
from memshard.models.transformer import Transformer
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.evaluation.canvas import canvas
from memshard.trainer.loop import evaluate_run
from memshard.trainer.set_up import set_up

_SHOWN = 10
_COMMON = {
    "heads": 4,
    "pattern": ["local", "lsh"],
    "window": 64,
    "chunk": 64,
    "rounds": 2,
    "lr": 1e-3,
    "temperature": 0.9,
}
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"layers": 2, "dim": 32, "batch": 4, "steps": 10},
    "small": {"layers": 4, "dim": 192, "batch": 8, "steps": 3000},
    "full": {"layers": 12, "dim": 1024, "batch": 128, "steps": 100_000, "heads": 8, "lr": 3e-4},
}
_SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (1,), "small": (1, 2), "full": (1,)}
_TURNS = 3
"""Turns of decoding with cached states and without."""


def complete(point: dict[str, Any]) -> dict[str, Any]:
    """Train on the data folder point["data"] with the trainer, which can resume in point["run"];
    then measure and complete images.

    FileNotFoundError, with the command that builds the data, where there is none.
    """
    if not Path(point["data"], INDEX_FILE).exists():
        raise FileNotFoundError(
            f"there is no data folder {point['data']}: memshard data build IMAGES --images "
            f"--image-size 16 --out {point['data']}"
        )
    index = load_index(point["data"])
    if index.shape is None:
        raise ValueError(
            f"{point['data']} holds no images: build it with memshard data build IMAGES --images"
        )
    values = math.prod(index.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(point["run"], f"seed-{point['seed']}")
    with holding(folder, "wait", wait=True):
        run = set_up(_recipe(point, index.shape), folder, device)
        train_to_end(run)
    evaluation = evaluate_run(run)
    held_out = HeldOutRecords(point["data"], values)
    shown = min(_SHOWN, held_out.windows)
    batch = held_out.batch(0, shown)
    originals = torch.cat((batch.inputs[:, :1], batch.targets[:, :-1]), 1)[:, :values]
    model, half = run.model.eval(), values // 2
    rates = []
    # In turns, so that other work on the machine slows both ways of decoding.
    for _ in range(_TURNS):
        begun = now(device)
        lower = generate(
            model,
            originals[:, :half],
            values - half,
            temperature=point["temperature"],
            seed=point["seed"],
        )
        rates.append(
            [
                lower.numel() / (now(device) - begun),
                _uncached_rate(model, originals.to(device), half),
            ]
        )
    return {
        # The loss is a mean over predicted tokens, <eos> among them; its sum is divided
        # by the values.
        "bits": evaluation.loss
        / math.log(2)
        * evaluation.tokens
        / (held_out.windows * (values - 1)),
        "baseline_bits": channel_bits(point["data"], index.shape),
        "rates": rates,
        "shape": list(index.shape),
        "originals": originals.tolist(),
        # The model may also draw 256, the <eos>, which is no colour.
        "completed": torch.cat((originals[:, :half], lower.cpu().clamp(max=255)), 1).tolist(),
    }


def _recipe(point: dict[str, Any], shape: tuple[int, int, int]) -> Recipe:
    """Return the recipe of a point for images of [height, width, channels]."""
    mixer = MixerConfig(
        pattern=tuple(point["pattern"]),
        heads=point["heads"],
        window=point["window"],
        chunk=point["chunk"],
        rounds=point["rounds"],
    )
    steps = point["steps"]
    return Recipe(
        data=DataConfig(path=point["data"], length=math.prod(shape)),
        model=ModelConfig(
            layers=point["layers"],
            dim=point["dim"],
            mixer=mixer,
            position="axial",
            axial=shape,
            residual="reversible",
            tie_head=False,
        ),
        train=TrainConfig(
            steps=steps,
            batch=point["batch"],
            seed=point["seed"],
            eval_every=0,
            log_every=50,
            save_every=200,
        ),
        optimizer=OptimizerConfig(lr=point["lr"], warmup=min(200, steps // 2)),
    )


def channel_bits(data: str, shape: tuple[int, int, int]) -> float:
    """Return the bits a value of the held-out images takes under the training images' frequencies
    of values in each channel, with one added to each count.
    """
    values, channels = math.prod(shape), shape[2]
    stream = RecordStream(data, values, size=1, seed=0)
    # One added to each count (Laplace): a value that training never saw costs finite bits.
    counts = np.ones((channels, 256))
    # 5,000 images are millions of values, plenty for 256 frequencies a channel.
    for first in range(0, min(stream.samples_per_epoch, 5000), 500):
        images = _images(stream.batch(first, min(500, stream.samples_per_epoch - first)), values)
        for channel in range(channels):
            # Colours only: an <eos> would be number 256.
            counts[channel] += np.bincount(images[:, channel::channels].ravel(), minlength=256)[
                :256
            ]
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    held_out = HeldOutRecords(data, values)
    images = _images(held_out.batch(0, held_out.windows), values)
    return float(
        np.mean([bits[channel][images[:, channel::channels]].mean() for channel in range(channels)])
    )


def _images(batch: Any, values: int) -> np.ndarray:
    images: np.ndarray = torch.cat((batch.inputs[:, :1], batch.targets), 1)[:, :values].numpy()
    return images


@torch.no_grad()
def _uncached_rate(model: Transformer, images: Tensor, half: int, tokens: int = 4) -> float:
    """Return tokens/s where every new token takes a forward pass over all before it."""
    begun = now(images.device)
    # Four tokens of hundreds, each a whole forward pass: enough for a rate.
    for length in range(half, half + tokens):
        model(images[:, :length])
    return tokens * len(images) / (now(images.device) - begun)


def _points(scale: Scale) -> list[Point]:
    data = "data/smoke_images" if scale == "smoke" else "data/images"
    size = {**_COMMON, **_SIZES[scale], "data": data, "run": f"runs/reformer_images_{scale}"}
    return [{**size, "seed": seed} for seed in _SEEDS[scale]]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    (point, shown), results = rows[0], [result for _, result in rows]
    draw_grid(shown, folder / "images.png")
    height, width, channels = shown["shape"]
    cached, uncached = zip(*(turn for result in results for turn in result["rates"]), strict=True)
    ratios = [fast / slow for fast, slow in zip(cached, uncached, strict=True)]
    return (
        f"Images of {height} x {width} x {channels}, {point['layers']} layers of width "
        f"{point['dim']}, {point['steps']:,} steps of "
        f"{point['batch']}: {mean_deviation([result['bits'] for result in results], '.3f')} bits "
        "a value on held-out images "
        f"({seeds(len(results))}); {shown['baseline_bits']:.3f} without context (frequencies of "
        "each channel).\n"
        f"Decoding {len(shown['originals'])} images: {median_range(cached, '.0f')} tokens/s with "
        "cached states, "
        f"{median_range(uncached, '.1f')} with a forward pass a token, "
        f"{median_range(ratios, '.1f')} times as many "
        f"(medians of {len(cached)} interleaved turns, range).\n\n![held-out images: whole, upper "
        "half, completed](images.png)\n"
    )


def draw_grid(result: dict[str, Any], file: Path) -> None:
    """Draw held-out images in columns: whole, the given upper half, the model's completion."""
    shape = result["shape"]
    images, completed = (
        np.array(result[name], dtype=np.uint8).reshape(-1, *shape)
        for name in ("originals", "completed")
    )
    given = images.copy()
    # In raster order the second half of the values is the lower half of the image.
    given.reshape(len(given), -1)[:, given[0].size // 2 :] = 255
    framed = np.pad(
        np.stack((images, given, completed)),
        ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)),
        constant_values=255,
    )
    grid = np.concatenate([np.concatenate(list(row), 1) for row in framed], 0)
    figure = canvas(len(images), 3.2)
    axes = figure.subplots()
    axes.imshow(grid.squeeze(), cmap="gray", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks(
        [(row + 0.5) * grid.shape[0] / 3 for row in range(3)], ["whole", "given", "completed"]
    )
    axes.tick_params(length=0)
    figure.savefig(file)


EXPERIMENT = Experiment(
    what="images as bytes: bits a value, and lower halves of held-out images completed (needs a "
    "folder data/images)",
    points=_points,
    run=complete,
    report=_report,
    hours={"smoke": 0.02, "small": 2.0, "full": 2000.0},
)
