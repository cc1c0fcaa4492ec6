"""The ways to spread a model that the parity grid goes through, and a short training in each."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.data_pipeline.stream.rank_share import rank_share
from memshard.models.config import MixerConfig, NgramConfig
from memshard.models.memory.table import find_tables
from memshard.models.recompute.checkpointing import Checkpointing
from memshard.parallel.apply import Share, losses_on
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import LAYOUTS, LayoutName, Layouts
from memshard.trainer.checkpoint.global_tensors import model_tensors
from memshard.trainer.config.optimizers import OptimizerConfig, TableOptimizerConfig
from memshard.trainer.config.training import LossScaleConfig, TrainConfig
from memshard.trainer.tasks.language_model import LanguageModelTask
from memshard.trainer.training import build_for_training, training_step
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens
from tests.trainer.test_deepspeed import allow_fp16

TABLES: dict[str, tuple[LayoutName, int | None]] = {
    **{name: (name, None) for name in LAYOUTS},
    "rows, two copies": ("rows", 2),
}
"""Layout, and ranks that split a table (None: all)."""
BY_KIND: dict[str, tuple[Layouts, int | None]] = {
    "by kind": ({"memory": "columns", "ngram": "rows-unique"}, None),
    "by kind, two copies": ({"memory": "rows", "ngram": "rows-unique"}, 2),
}
"""As `TABLES`, for models with tables of two kinds."""
MODELS: dict[str, dict[str, Any]] = {
    "tied head, batch statistics": {"memory": {"share": True}},
    "SwiGLU, own head, Memory+": {
        "memory": {"gate": True, "value_dim": 12, "mode": "add", "query_norm": "layer"},
        "activation": "swiglu",
        "tie_head": False,
        "norm": "rms",
        "position": "rotary",
    },
    "delta rule, LSH, local window": {
        "memory": {"query_norm": "rms", "mode": "add"},
        "mixer": {
            "pattern": ("delta", "lsh", "local"),
            "chunk": 2,
            "buckets": 2,
            "window": 3,
            "heads_at_once": 1,
        },
    },
    "Primer": {
        "memory": {"query_norm": "layer"},
        "mixer": {
            "pattern": ("softmax", "lsh", "linear"),
            "chunk": 2,
            "buckets": 2,
            "convolution": 3,
            "share_qk": True,
        },
        "activation": "squared_relu",
        "norm_after": True,
        "norm": "primer",
    },
    "Engram beside product keys": {
        "memory": {"query_norm": "layer"},
        "mixer": {"pattern": ("softmax", "delta", "local"), "window": 3},
        "ngram": NgramConfig(layers=(0, 2), rows=13, heads=2, value_dim=6, convolution=3),
        "position": "rotary",
    },
    "n-grams at the embedding": {
        "memory": {"query_norm": "rms", "mode": "add"},
        "ngram": NgramConfig(
            layers=(0,),
            rule="longcat",
            place="embedding",
            rows=13,
            heads=2,
            value_dim=6,
            gate="none",
        ),
    },
    "bigrams before every mixer": {
        "memory": {"layers": (2,), "query_norm": "layer"},
        "ngram": NgramConfig(
            layers=(0, 1, 2), rule="bigram", rows=31, share=True, gate="scalar", convolution=0
        ),
        "position": "none",
    },
    "value embeddings": {
        "memory": {"query_norm": "layer"},
        "mixer": {"pattern": ("softmax", "local", "linear"), "window": 3},
        "ngram": NgramConfig(layers=(0, 1, 2), rule="token", place="values", gate="heads"),
        "position": "rotary",
        "norm": "rms",
    },
    "n-grams in place of a feedforward": {
        "memory": {"layers": (2,), "query_norm": "layer", "mode": "add"},
        "ngram": NgramConfig(layers=(0,), rule="token", place="replace", value_dim=12, gate="glu"),
        "tie_head": False,
    },
    "PEER, post-norm": {
        "memory": {"kind": "peer", "query_norm": "lagged"},
        "residual": "post",
        "position": "sinusoidal",
    },
}
FAST_WEIGHTS: dict[str, dict[str, Any]] = {
    "fast weights": {
        "memory": {"query_norm": "batch", "mode": "add"},
        "mixer": {
            "pattern": ("delta", "linear"),
            "convolution": 4,
            "share_qk": True,
            "features": "dpfp",
        },
        "activation": "squared_relu",
    },
    "fast weights behind n-grams": {
        "memory": {"query_norm": "layer"},
        "mixer": {"pattern": ("delta", "linear"), "convolution": 2},
        "ngram": NgramConfig(layers=(0, 1), rows=13, heads=2, value_dim=6, convolution=3),
    },
    "normalised fast weights": {
        "memory": {"query_norm": "layer"},
        "mixer": {"kind": "delta", "attention_norm": True, "convolution": 2},
        "position": "rotary",
    },
}
RESIDUALS = ("standard", "checkpointed", "reversible")
Precision = Literal["fp32", "bf16", "fp16"]
ENGINES: dict[str, tuple[Literal["torch", "deepspeed"], Literal[0, 1, 2], Precision]] = {
    "torch": ("torch", 0, "fp32"),
    "torch, bf16": ("torch", 0, "bf16"),
    "torch, fp16": ("torch", 0, "fp16"),
    "torch, ZeRO-1": ("torch", 1, "fp32"),
    "DeepSpeed, ZeRO-1": ("deepspeed", 1, "fp32"),
    "DeepSpeed, ZeRO-2": ("deepspeed", 2, "fp32"),
    "DeepSpeed, ZeRO-1, bf16": ("deepspeed", 1, "bf16"),
    "DeepSpeed, ZeRO-2, bf16": ("deepspeed", 2, "bf16"),
    "DeepSpeed, ZeRO-1, fp16": ("deepspeed", 1, "fp16"),
    "DeepSpeed, ZeRO-2, fp16": ("deepspeed", 2, "fp16"),
}
STEPS, BATCH, TOGETHER = 3, 7, 4
"""TOGETHER: rows of a micro-batch over all ranks, where a step has two. Neither they nor the ranks
divide the batch.
"""
EPS = 1e-3
"""Of Adam; with a smaller one it makes steps of fp32 gradients that are nothing but rounding."""


@dataclass(frozen=True)
class Point:
    """One way to train. tensor: ranks that share matrices, or sequences alone. accumulation:
    micro-batches a step. wide: fp64.
    """

    model: str
    tensor: int
    tables: str
    residual: str
    accumulation: int
    engine: str = "torch"
    wide: bool = True
    share: Share = "heads"

    @property
    def precision(self) -> Precision:
        return ENGINES[self.engine][2]


class Rows:
    """A stream of random rows, the third of each step shorter than the others."""

    def batch(self, first: int, count: int) -> Batch:
        step, row = divmod(first, BATCH)
        # Nine tokens do not divide by the ranks of a tensor group.
        tokens = tiny_tokens(BATCH, 9 if step % 2 else 10, seed=step)[row : row + count]
        inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
        samples = torch.arange(first, first + count)
        targets[samples % BATCH == 2, 5:] = IGNORE
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        return Batch(inputs, targets, (positions > 3).long(), positions, samples)


def train(point: Point) -> dict[str, Any]:
    """Train for three steps on the ranks that are there; return losses, norms and whole tensors."""
    settings = dict((MODELS | FAST_WEIGHTS)[point.model])
    mixer = MixerConfig(heads=4, **settings.pop("mixer", {}))
    if point.residual == "reversible":
        settings["residual"] = "reversible"
    config = tiny_config(max_length=9, dropout=0.1, **settings)
    feedforward = replace(config.feedforward, hidden=24)
    # The streams of a reversible model must stay on their grid.
    model = tiny_model(replace(config, mixer=mixer, feedforward=feedforward), spread=0.1)
    model.to(torch.float64 if point.wide else torch.float32)
    layout, memory = {**TABLES, **BY_KIND}[point.tables]
    mesh = _mesh(memory, point.tensor)
    ranks, rank = (
        (1, 0) if mesh is None else (mesh.size() // point.tensor, mesh.get_rank() // point.tensor)
    )
    micro_batch = None if point.accumulation == 1 else TOGETHER // ranks
    engine, zero, precision = ENGINES[point.engine]
    if precision == "fp16":
        allow_fp16()
    checkpointing: Checkpointing = "none"
    if point.residual == "checkpointed":
        checkpointing = "full" if point.accumulation == 1 else "selective"
    training = build_for_training(
        model,
        OptimizerConfig(lr=0.01, eps=EPS, schedule="constant", warmup=0),
        TableOptimizerConfig(lr=0.01, betas=(0.9, 0.999), eps=EPS),
        TrainConfig(
            steps=STEPS,
            batch=BATCH,
            micro_batch=micro_batch,
            precision=precision,
            # Gradients of 65,536 times the loss are beyond fp16.
            loss_scale=LossScaleConfig(initial=256.0),
            clip=0.5,
            engine=engine,
            zero=zero,
            checkpointing=checkpointing,
        ),
        mesh=mesh,
        layout=layout,
        share=point.share,
    )
    task = LanguageModelTask(
        torch.device("cpu"), document_mask=True, seed=7, losses=losses_on(mesh, point.share)
    )
    result: dict[str, Any] = {
        "losses": [],
        "norms": [],
        "begun": _whole(model, training.placement, mesh),
    }

    def keep_gradients(_: float) -> bool:
        if "gradients" not in result:
            result["gradients"] = _whole(model, training.placement, mesh, _gradients(model))
        return True

    for step in range(STEPS):

        def loss(model: Any, batch: Batch, step: int = step) -> Tensor:
            tokens = Rows().batch(step * BATCH, BATCH).targets != IGNORE
            return task.loss(model, batch, step) / tokens.sum()

        outcome = training_step(
            training,
            rank_share(Rows(), step, BATCH, rank, ranks, micro_batch),  # type: ignore[arg-type]
            loss,
            step,
            accept=keep_gradients,
        )
        assert not outcome.skipped
        training.check_copies()
        result["losses"].append(outcome.loss)
        result["norms"].append(outcome.norm)
    result["weights"] = _whole(model, training.placement, mesh)
    return result


@cache
def _mesh(memory: int | None, tensor: int) -> DeviceMesh | None:
    return build_mesh("cpu", memory, tensor)


def _gradients(model: Any) -> dict[str, Tensor]:
    """Return this rank's gradients, those of tables dense."""
    held = {}
    for name, p in model.named_parameters():
        # DeepSpeed keeps them where only it finds them.
        held[f"model.{name}"] = p.get_full_hp_grad() if hasattr(p, "get_full_hp_grad") else p.grad
    for name, table in find_tables(model):
        held[f"model.{name}.weight"] = dense = torch.zeros_like(table.weight)
        for part in table.gradients(table.gradient_scale):
            dense[part.rows] = part.sums(0, len(part.rows)).to(dense.dtype)
    return held


def _whole(
    model: Any, placement: Any, mesh: Any, held: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return all weights, or what this rank holds for them, put together."""
    whole = {}
    for name, tensor in model_tensors(model, placement, mesh).items():
        if held is not None and name not in held:
            continue
        local = tensor if held is None else held[name]
        assert local is not None, name
        if isinstance(tensor, DTensor) and held is not None:
            local = DTensor.from_local(
                local,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        whole[name] = (local.full_tensor() if isinstance(local, DTensor) else local).clone()
    return whole


GRID = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]
"""(tensor, data) ranks."""


def points(tensor: int, data: int) -> list[Point]:
    """Return every combination that makes sense on these ranks."""
    grid = []
    for number, (tables, residual, accumulation, engine) in enumerate(
        product(TABLES, RESIDUALS, (1, 2), ENGINES)
    ):
        layout, memory = TABLES[tables]
        name, zero, precision = ENGINES[engine]
        copies = memory is None or (tensor * data > memory and memory % tensor == 0)
        if (
            copies
            and (tensor > 1 or not LAYOUTS[layout].within_tensor_group)
            and (data > 1 or name == "deepspeed" or not zero)
        ):
            # Each in turn, but for post-norm, which cannot be reversible.
            model = list(MODELS)[number % (len(MODELS) - (residual == "reversible"))]
            wide = name == "torch" and precision == "fp32"
            grid.append(Point(model, tensor, tables, residual, accumulation, engine, wide))
    return grid
