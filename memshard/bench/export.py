"""Memory and speed of exporting, and of evaluating from disk, a model with a large table.

    memshard bench export [--slots 524176] [--dim 1024] [--folder DIR]

Writes a checkpoint of random weights (a 2 GB table by default) in the format of a run, then exports
it and evaluates it, memory-mapped and in memory, each in a process of its own that samples its
anonymous memory (RssAnon) above what the interpreter with its libraries takes.
"""

import argparse
import math
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memshard.bench.common.peak_memory import in_new_process, resident
from memshard.data_pipeline.tokenizer import train_tokenizer
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.memory.disk_table import map_tables
from memshard.models.transformer import Transformer
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.checkpoint.save_load import save_checkpoint
from memshard.trainer.config.load import dump
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.export.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--slots", type=int, default=724**2, help="rows of the table")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write (default a temporary folder)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint, export it, evaluate the export in two ways."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        in_new_process(write_checkpoint, folder, args.slots, args.dim)
        return {
            "export, fp32": in_new_process(run_export, folder),
            "evaluation, memory-mapped": in_new_process(run_evaluation, folder, True),
            "evaluation, in memory": in_new_process(run_evaluation, folder, False),
        }


def show(result: dict[str, Any]) -> None:
    """Print a line for each process."""
    for what, row in result.items():
        numbers = ", ".join(f"{key} {value:,.1f}" for key, value in row.items())
        print(f"{what:<28}{numbers}")


class AnonymousPeak:
    """The most anonymous memory of this process above its start, sampled every 5 ms.

    Anonymous: pages of mapped files do not count, since the system may drop them at any time.
    """

    def __enter__(self) -> "AnonymousPeak":
        self.base = self.peak = resident("RssAnon") or 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begun
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident("RssAnon") or 0)

    @property
    def mb(self) -> float:
        return (self.peak - self.base) / 1e6


def write_checkpoint(folder: Path, slots: int, dim: int) -> None:
    """Write a checkpoint with a table of that size, whose random rows repeat every 65,536 rows."""
    lines = [
        # Squares modulo a prime: 411 different words, enough for sentencepiece to fill a vocabulary
        # of 512.
        " ".join(f"w{number * number % 977}" for number in range(line, line + 12))
        for line in range(400)
    ]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(lines, vocab_size=512))
    memory = MemoryConfig(layers=(1,), keys=math.isqrt(slots), heads=4, topk=32, key_dim=128)
    model = ModelConfig(
        vocab_size=512, layers=2, dim=dim, max_length=256, mixer=MixerConfig(heads=8), memory=memory
    )
    (folder / "config.yaml").write_text(
        dump(Recipe(data=DataConfig(path="none", length=256), model=model)),
        encoding="utf-8",
    )
    # The table leaves the model while it holds no memory: `to_empty` then allocates the dense part
    # alone, and the 2 GB exist once, in `tensors`.
    with torch.device("meta"):
        built = Transformer(model)
    map_tables(built, {"blocks.1.memory.values": lambda rows: rows})
    built.to_empty(device="cpu")
    initialize(built, 0)
    tensors = {
        f"model.{name}": tensor.detach()
        for name, tensor in (*built.named_parameters(), *built.named_buffers())
    }
    rows = memory.slots
    # Drawn once and repeated, since neither an export nor a lookup looks for equal rows.
    block = torch.randn(min(rows, 1 << 16), dim)
    tensors["model.blocks.1.memory.values.weight"] = block.repeat(-(-rows // len(block)), 1)[:rows]
    # The least that a run's checkpoint holds: no stream to go on with, and no moments.
    state = {"progress": {"step": 1}, "table_steps": {}, "stream": None}
    save_checkpoint(
        folder / "checkpoints/step-00000001",
        tensors,
        state,
        {name: (folder / name).read_bytes() for name in ("config.yaml", "tokenizer.model")},
    )


def run_export(folder: Path) -> dict[str, float]:
    """Export the run and return the memory that this took."""
    _warm_up()
    with AnonymousPeak() as peak:
        done = export(folder, folder / "export")
    return {"anonymous_mb": peak.mb, "seconds": peak.seconds, "file_mb": done.bytes / 1e6}


def run_evaluation(folder: Path, memmap: bool) -> dict[str, float]:
    """Pass random tokens through the exported model, 16 x 256 at a time."""
    _warm_up()
    batches = [
        torch.from_numpy(np.random.default_rng(number).integers(0, 512, (16, 256)))
        for number in range(5)
    ]
    with AnonymousPeak() as peak, torch.no_grad():
        loaded = load_model(folder / "export", memmap)
        # Not timed: it allocates, and touches the weights' pages for the first time. Later batches
        # still meet pages of the table that have not been read.
        loaded.model(batches[0])
        begun = time.perf_counter()
        for batch in batches[1:]:
            loaded.model(batch)
        speed = 4 * 16 * 256 / (time.perf_counter() - begun)
    return {"anonymous_mb": peak.mb, "tokens_per_s": speed}


def _warm_up() -> None:
    """Make torch allocate what every process with a matrix product needs, so it does not count."""
    torch.ones(64, 64) @ torch.ones(64, 64)
