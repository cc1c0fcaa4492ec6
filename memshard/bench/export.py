"""Memory and speed of exporting, and of evaluating from disk, a model with a large table.

    python -m memshard.bench.export [--slots 524288] [--dim 1024] [--folder DIR]

Writes a checkpoint of random weights (a 2 GB table by default) in the format of a run, then exports
it and evaluates it, memory-mapped and in memory, each in a process of its own that samples its
anonymous memory (RssAnon) above what the interpreter with its libraries takes. Prints one JSON line
each.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]
    )


class Peak:
    """The most anonymous memory above the start, sampled every 5 ms."""

    def __enter__(self) -> "Peak":
        self.base = self.peak = anonymous()
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
            self.peak = max(self.peak, anonymous())

    @property
    def mb(self) -> float:
        return (self.peak - self.base) / 1e6


def write_checkpoint(folder: Path, slots: int, dim: int) -> None:
    """A checkpoint with a table of that size, its rows random numbers repeated every 65,536
    rows.
    """
    import torch

    from memshard.data_pipeline.tokenizer import train_tokenizer
    from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
    from memshard.models.initialize import initialize
    from memshard.models.memory.disk_table import map_tables
    from memshard.models.transformer import Transformer
    from memshard.trainer.checkpoint.save_load import save_checkpoint
    from memshard.trainer.config.load import dump
    from memshard.trainer.config.recipe import DataConfig, Recipe

    lines = [
        " ".join(f"w{number * number % 977}" for number in range(line, line + 12))
        for line in range(400)
    ]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(lines, vocab_size=512))
    memory = MemoryConfig(layers=(1,), keys=math.isqrt(slots), heads=4, topk=32, key_dim=128)
    model = ModelConfig(
        vocab_size=512, layers=2, dim=dim, max_length=256, mixer=MixerConfig(heads=8), memory=memory
    )
    (folder / "config.yaml").write_text(
        dump(Recipe(data=DataConfig(path="none", length=256), model=model))
    )
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
    block = torch.randn(min(rows, 1 << 16), dim)
    tensors["model.blocks.1.memory.values.weight"] = block.repeat(-(-rows // len(block)), 1)[:rows]
    state = {"progress": {"step": 1}, "table_steps": {}, "stream": None}
    save_checkpoint(
        folder / "checkpoints/step-00000001",
        tensors,
        state,
        [folder / "config.yaml", folder / "tokenizer.model"],
    )


def run_export(folder: Path) -> dict[str, float | str]:
    from memshard.trainer.export.export import export

    with Peak() as peak:
        done = export(folder, folder / "export")
    return {
        "what": "export, fp32",
        "anonymous_mb": peak.mb,
        "seconds": peak.seconds,
        "file_mb": done.bytes / 1e6,
    }


def run_evaluation(folder: Path, memmap: bool) -> dict[str, float | str]:
    """Random tokens through the model, 16 x 256 at a time."""
    import torch

    from memshard.trainer.checkpoint.load_model import load_model

    batches = [
        torch.from_numpy(np.random.default_rng(number).integers(0, 512, (16, 256)))
        for number in range(5)
    ]
    with Peak() as peak, torch.no_grad():
        loaded = load_model(folder / "export", memmap)
        loaded.model(batches[0])
        begun = time.perf_counter()
        for batch in batches[1:]:
            loaded.model(batch)
        speed = 4 * 16 * 256 / (time.perf_counter() - begun)
    return {
        "what": f"evaluation, {'memory-mapped' if memmap else 'in memory'}",
        "anonymous_mb": peak.mb,
        "tokens_per_s": speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=724**2)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=("write", "export", "mapped", "memory"))
    args = parser.parse_args()
    if args.only == "write":
        return write_checkpoint(args.folder, args.slots, args.dim)
    if args.only:
        # What every run loads counts as the interpreter's own.
        import torch

        import memshard.trainer.export.export  # noqa: F401

        torch.ones(64, 64) @ torch.ones(64, 64)
        result = (
            run_export(args.folder)
            if args.only == "export"
            else run_evaluation(args.folder, args.only == "mapped")
        )
        return print(json.dumps(result))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for only in ("write", "export", "mapped", "memory"):
            sizes = ["--slots", str(args.slots), "--dim", str(args.dim)]
            subprocess.run(
                [sys.executable, __file__, "--only", only, "--folder", str(folder), *sizes],
                check=True,
            )


if __name__ == "__main__":
    main()
