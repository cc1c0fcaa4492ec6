"""A model with a memory against the same model without, at equal steps: held-out loss over several seeds, and step times.

    python benchmarks/memory_vs_dense.py --data data/wikipedia --out runs/memory_vs_dense train.precision=bf16

Runs are ordinary `memshard train` runs of the recipe, with and without `model.memory.layers`; both start from the same
trunk and see the same batches. Finished runs are kept, so an interrupted benchmark goes on where it stopped. Step times
are medians of interleaved steps in this process. Writes result.json, result.md and curves.png to the output folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from memshard.data_pipeline.stream import HeldOutStream, TrainStream
from memshard.data_pipeline.stream.batch import IGNORE
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.evaluation.pictures import comparison
from memshard.trainer.metrics import METRICS_FILE, read_metrics
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

VARIANTS = ("without memory", "with memory")


def main() -> None:
    """Train what is missing, time steps, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wikipedia", help="a recipe with a memory (default wikipedia)")
    parser.add_argument("--data", required=True, help="folder of `memshard data build`")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default 2)")
    parser.add_argument("--timed-steps", type=int, default=10, help="steps timed of each model (default 10)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()

    recipes = {"with memory": [f"data.path={args.data}", *args.overrides]}
    recipes["without memory"] = [*recipes["with memory"], "model.memory.layers=[]"]
    runs: dict[str, list[Path]] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant in VARIANTS:
            folder = args.out / f"{variant.replace(' ', '-')}-{seed}"
            run_to_end(args.recipe, [*recipes[variant], f"train.seed={seed}"], folder, args.ranks)
            runs[variant].append(folder / METRICS_FILE)

    result = {variant: summary(files) for variant, files in runs.items()}
    times = step_times({variant: load_recipe(args.recipe, recipes[variant]) for variant in VARIANTS}, args.out, args.timed_steps)
    for variant in VARIANTS:
        result[variant]["step_s"] = times[variant]
    paired = [a - b for a, b in zip(result["without memory"]["losses"], result["with memory"]["losses"], strict=True)]
    recipe = load_recipe(args.recipe, recipes["with memory"])
    result |= {"gain": paired, "steps": recipe.train.steps, "unigram_entropy": unigram_entropy(recipe), "torch": torch.__version__}
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "result.md").write_text(table(result))
    comparison(runs, args.out / "curves.png")
    print(table(result))


def run_to_end(recipe: str, overrides: list[str], folder: Path, ranks: int) -> None:
    """Train or resume one run in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"] if ranks > 1 else ["-m"]
    subprocess.run([sys.executable, *launcher, "memshard", "train", recipe, *overrides, "--run", str(folder)], check=True)


def summary(files: list[Path]) -> dict:
    """Final held-out losses of the seeds, and the memory's usage in the first."""
    evaluations = [[line for line in read_metrics(file) if "eval/loss" in line] for file in files]
    losses = [lines[-1]["eval/loss"] for lines in evaluations]
    usage = {key: value for key, value in evaluations[0][-1].items() if key.endswith(("/usage", "/kl_weighted", "/kl_count"))}
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return {"losses": losses, "mean": statistics.mean(losses), "std": spread, "usage": usage}


def step_times(recipes: dict[str, Recipe], out: Path, steps: int) -> dict[str, float]:
    """Median seconds of a training step of each recipe, in turn, one process, one thread."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {variant: [] for variant in recipes}
    runs = {}
    for variant, recipe in recipes.items():
        timed = replace(recipe.train, steps=steps + 1, eval_every=0, save_every=10**9, log_every=10**9)
        runs[variant] = set_up(replace(recipe, train=timed), out / "timing" / f"{variant.replace(' ', '-')}-{time.time_ns()}", device)
    for step in range(1, steps + 2):
        for variant, run in runs.items():
            begun = time.perf_counter()
            train_step(run)
            if step > 1:
                seconds[variant].append(time.perf_counter() - begun)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def unigram_entropy(recipe: Recipe) -> float:
    """Cross-entropy of the held-out tokens under the training tokens' frequencies (add-one), nats a token."""
    stream = TrainStream(recipe.data.path, recipe.data.length, recipe.train.batch, recipe.train.seed)
    counts: Counter[int] = Counter()
    for first in range(0, min(stream.samples_per_epoch, 20_000), 500):
        counts.update(stream.batch(first, 500).inputs.flatten().tolist())
    held_out = HeldOutStream(recipe.data.path, recipe.data.length, recipe.train.eval_tokens)
    targets = held_out.batch(0, held_out.windows).targets.flatten()
    targets = targets[targets != IGNORE]
    size = int(max(max(counts), int(targets.max()))) + 1
    frequencies = np.ones(size)
    for token, count in counts.items():
        frequencies[token] += count
    return float(-np.log(frequencies / frequencies.sum())[targets.numpy()].mean())


def table(result: dict) -> str:
    """The result as a Markdown table."""
    lines = ["| model | held-out loss, nats a token (mean +- std) | perplexity | step, s (1 thread) |", "|---|---|---|---|"]
    for variant in VARIANTS:
        row = result[variant]
        lines.append(f"| {variant} | {row['mean']:.4f} +- {row['std']:.4f} | {np.exp(row['mean']):.1f} | {row['step_s']:.3f} |")
    gains = ", ".join(f"{gain:+.4f}" for gain in result["gain"])
    lines.append(f"\nGain of the memory, seed by seed: {gains} nats.")
    lines.append(f"Unigram cross-entropy of the same held-out tokens: {result['unigram_entropy']:.3f} nats.")
    lines += [f"{key}: {value:.3f}" for key, value in result["with memory"]["usage"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
