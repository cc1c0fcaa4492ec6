"""A run on a CUDA device is the run on a CPU: no mixed devices, and the same losses."""

from pathlib import Path

import pytest
import torch

from memshard.models.decode.generate import generate
from memshard.trainer.config.load import load_recipe
from memshard.trainer.loop import evaluate_run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from memshard.trainer.watch.meter import Meter
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda

LSH = ("model.mixer.kind=lsh", "model.mixer.chunk=8", "model.mixer.buckets=4")
DELTA = ("model.mixer.kind=delta", "model.position=none")
FAST = {
    "plain": (),
    "micro-batches": ("train.micro_batch=2", "tables.clip=1.0", "tables.semantics=catch-up"),
    "stochastic": ("tables.dtype=bf16", "tables.rounding=stochastic", "tables.semantics=row-step"),
    "host": ("tables.place=host", "tables.dtype=fp16"),
    "peer": ("model.memory.kind=peer", "model.memory.query_norm=rms"),
    "lsh": (*LSH, "model.residual=reversible", "model.memory.query_norm=lagged"),
    "delta": (*DELTA, "train.carry_state=true", "data.document_mask=true"),
}
SLOW = {
    "fp16": ("train.precision=fp16", "tables.dtype=fp16"),
    "gate": ("model.memory.gate=true", "model.memory.value_dim=24"),
    "revive": ("tables.revive=true", "tables.dead_after=1", "train.key_balance=0.01"),
    "dense steps": ("tables.semantics=dense",),
    "swiglu": (
        "model.position=rotary",
        "model.norm=rms",
        "model.feedforward.activation=swiglu",
        "model.mixer.kv_heads=1",
    ),
    "axial": ("model.position=axial",),
    "sinusoidal": ("model.position=sinusoidal", "model.memory.weighting=sigmoid"),
    "published lsh": (*LSH, "model.mixer.rule=hf_compat", "model.mixer.heads_at_once=1"),
    "causal lsh": (*LSH, "model.mixer.rule=paper_causal"),
    "local": ("model.mixer.kind=local", "model.mixer.window=8", "data.document_mask=true"),
    "linear": ("model.mixer.kind=linear", "train.segments=2", "model.position=none"),
    "favor": (
        "model.mixer.kind=linear",
        "model.mixer.features=favor",
        "model.mixer.feature_width=16",
    ),
    "dpfp": (*DELTA, "model.mixer.features=dpfp", "model.mixer.attention_norm=true"),
    "check inversion": ("model.residual=reversible", "train.check_inversion=true"),
    "primer": (
        "model.mixer.convolution=3",
        "model.mixer.share_qk=true",
        "model.feedforward.activation=squared_relu",
        "model.norm=primer",
    ),
    "host, shared": ("tables.place=host", "train.micro_batch=4", "tables.clip=1.0"),
    "host, dense steps": ("tables.place=host", "tables.semantics=dense"),
    "host, revive": ("tables.place=host", "tables.revive=true", "tables.dead_after=1"),
    "adaptive": (
        "model.tie_head=false",
        "model.adaptive_cutoffs=[64,256]",
        "model.adaptive_division=2",
    ),
    "smoothing": (
        "train.label_smoothing=0.1",
        "train.chunk=16",
        "model.memory.query_norm=lagged",
    ),
    "checkpointing": ("train.checkpointing=full", "model.memory.kind=peer", "tables.place=host"),
    "selective": ("train.checkpointing=selective",),
    "masked tokens": ("model.encoder_layers=2",),
    "added": ("model.memory.mode=add", "model.residual=post"),
    "no memory": ("model.memory.layers=[]",),
}


def train(
    recipe: Path,
    folder: Path,
    overrides: tuple[str, ...],
    device: str,
    capability: tuple[int, int] = (9, 0),
) -> tuple[list[float], Counts]:
    """Return the losses of three steps, and what the last one asked of the device."""
    with fake_cuda(capability) as watch:
        settings = load_recipe(recipe, ("train.precision=fp32", *overrides))
        run = set_up(settings, folder, device)
        losses = [train_step(run).loss for _ in range(2)]
        with watch.counted() as counts:
            losses.append(train_step(run).loss)
    return losses, counts


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(overrides, id=name) for name, overrides in FAST.items()),
        *(pytest.param(x, id=name, marks=pytest.mark.slow) for name, x in SLOW.items()),
    ],
)
def test_a_run_is_that_of_a_cpu(recipe: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    losses, counts = on_fake_cuda(train, recipe, tmp_path / "cuda", overrides, "cuda:0")
    twin, on_cpu = on_fake_cuda(train, recipe, tmp_path / "cpu", overrides, "cpu")
    tolerance = 1e-3 if "train.precision=fp16" in overrides else 1e-5
    assert losses == pytest.approx(twin, rel=tolerance)
    assert counts.launches.total() > 100 and not on_cpu.launches


def test_kernels_are_chosen_by_the_capability(recipe: Path, tmp_path: Path) -> None:
    _, counts = on_fake_cuda(train, recipe, tmp_path / "9", (), "cuda:0")
    kernels = {"triton gather_sum", "triton adam_rows", "triton best_pairs"}
    assert {what for what, _ in counts.launches} >= kernels
    _, counts = on_fake_cuda(train, recipe, tmp_path / "6", (), "cuda:0", (6, 0))
    assert not any("triton" in what for what, _ in counts.launches)


def _after_training(recipe: Path, folder: Path, device: str) -> tuple[float, float, list[int]]:
    with fake_cuda():
        run = set_up(load_recipe(recipe, ("train.precision=fp32",)), folder, device)
        meter = Meter(run, run.recipe, run.ranks)
        meter.add(train_step(run))
        loss = evaluate_run(run).loss
        usage = meter.read(run.progress)["train/loss"]
        run.model.eval()
        prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
        tokens = generate(run.model, prompt, 4, temperature=0.0)
        return loss, usage, tokens.tolist()


def test_evaluation_metrics_and_generation_are_those_of_a_cpu(recipe: Path, tmp_path: Path) -> None:
    ours = on_fake_cuda(_after_training, recipe, tmp_path / "cuda", "cuda:0")
    theirs = on_fake_cuda(_after_training, recipe, tmp_path / "cpu", "cpu")
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5) and ours[2] == theirs[2]
