"""What spreading costs: training steps at every (tensor, data) split of some ranks and on each
engine, and a block beside DTensor's.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from memshard.bench.spread import spread
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.memory.table import find_tables
from memshard.models.mixers.softmax import SoftmaxMixer
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply, losses_on
from memshard.parallel.mesh import build_mesh
from memshard.parallel.sequence import own_piece
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.optim.dense.schedule import learning_rate
from memshard.trainer.optim.rows.adam import RowAdam


@dataclass(frozen=True)
class Size:
    """What to train. batch: sequences a step, over all ranks. keys: of a memory in the middle
    layer, 0 for none.
    """

    layers: int
    dim: int
    heads: int
    length: int
    batch: int
    vocabulary: int
    keys: int

    @property
    def model(self) -> ModelConfig:
        """The model of this size."""
        memory = (
            MemoryConfig(layers=(self.layers // 2,), keys=self.keys, topk=min(32, self.keys))
            if self.keys
            else MemoryConfig()
        )
        return ModelConfig(
            layers=self.layers,
            dim=self.dim,
            mixer=MixerConfig(heads=self.heads),
            vocab_size=self.vocabulary,
            max_length=self.length,
            memory=memory,
        )


def on_ranks(ranks: int, size: Size, rounds: int) -> dict[str, Any]:
    """Run `measure` on as many processes of this machine, each with a GPU where there are enough;
    returns what rank 0 found.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, size, rounds), nprocs=ranks)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _rank(rank: int, ranks: int, folder: str, size: Size, rounds: int) -> None:
    cuda = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks
    )
    found = {
        "device": str(device),
        "ranks": ranks,
        "size": asdict(size),
        **measure(size, rounds, device),
    }
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    from memshard.parallel.tensor import leave

    leave()
    dist.destroy_process_group()


def measure(size: Size, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step at every split and of a block, median and range of interleaved rounds;
    bytes a rank holds and sends.
    """
    ranks = dist.get_world_size()
    splits = [
        tensor for tensor in range(1, ranks + 1) if ranks % tensor == 0 and size.heads % tensor == 0
    ]
    steps = {tensor: _step(size, tensor, device) for tensor in splits}
    seconds = interleaved(
        {str(tensor): step for tensor, (step, _) in steps.items()}, rounds, device
    )
    points = []
    for tensor, (_, weights) in steps.items():
        recipe = Recipe(
            data=DataConfig(path="", length=size.length),
            model=size.model,
            train=TrainConfig(batch=size.batch),
            parallel=ParallelConfig(tensor=tensor),
        )
        cost = estimate(recipe, ranks, size.vocabulary)
        tokens = cost.micro_batch * cost.micro_batches * size.length
        sent = (
            cost.tensor_traffic * tokens
            + cost.gradient_traffic
            + cost.lookup_traffic * tokens / tensor
            + cost.replica_traffic
        )
        took = {"step_s": seconds[str(tensor)], "dense_bytes": weights, "sent_bytes": sent}
        points.append({"tensor": tensor, "data": ranks // tensor, **took})
    found: dict[str, Any] = {"steps": points}
    engines: dict[str, tuple[str, Literal[0, 1]]] = {
        "torch": ("torch", 0),
        "torch, ZeRO-1": ("torch", 1),
    }
    if find_spec("deepspeed"):
        engines["DeepSpeed, ZeRO-1"] = ("deepspeed", 1)
    forms = {name: _step(size, 1, device, *settings)[0] for name, settings in engines.items()}
    found["engines_s"] = interleaved(forms, rounds, device)
    if size.heads % ranks:
        return found
    blocks = {
        "fairscale layers, own mappings": _block(size, device),
        "DTensor, Colwise and Rowwise": _dtensor_block(size, device),
    }
    ours, theirs = (block() for block in blocks.values())
    found["blocks_difference"] = float((ours - theirs).norm() / theirs.norm())
    return found | {"blocks_s": interleaved(blocks, rounds, device)}


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median and range of seconds of each action on the slowest rank, one after the other in every
    round; a first round does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            dist.barrier()
            begun = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            times[name].append(float(taken))
    return {name: spread(taken[1:]) for name, taken in times.items()}


def _step(
    size: Size, tensor: int, device: torch.device, kind: str = "torch", zero: Literal[0, 1] = 0
) -> tuple[Callable[[], object], int]:
    """A training step on ranks in groups of `tensor`, and the bytes of this rank's dense
    weights.
    """
    mesh = build_mesh(device.type, None, tensor)
    with torch.device("meta"):
        model = Transformer(size.model)
    placement = apply(model, mesh)
    model.to_empty(device=device)
    initialize(model, 0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    engine: Any
    if kind == "torch":
        engine = NativeEngine(model, OptimizerConfig(), mesh, placement, shard_states=zero > 0)
    else:
        from memshard.trainer.engine.deepspeed import DeepSpeedEngine

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        settings = TrainConfig(engine="deepspeed", zero=zero, batch=size.batch)
        engine = DeepSpeedEngine(model, OptimizerConfig(), settings, mesh, placement, dtype)
    tables = [table for _, table in find_tables(model)]
    rows = RowAdam(tables) if tables else None
    losses = losses_on(mesh)
    share = math.ceil(size.batch * tensor / dist.get_world_size())
    tokens = torch.randint(
        size.vocabulary, (share, size.length + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def step() -> None:
        with engine.forward_context(last=True), _half(device):
            loss = losses(engine.model(tokens[:, :-1])[0], tokens[:, 1:]).sum() / (
                size.batch * size.length
            )
        engine.backward(loss, 1.0)
        engine.step(learning_rate(engine.config, 0, 1), engine.gradient_norm(1.0), 1.0, 1.0)
        if rows is not None:
            rows.step()

    return step, weights


def _half(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _plain_block(size: Size) -> Transformer:
    """One layer of the model; its first block counts."""
    model = Transformer(
        ModelConfig(
            layers=1,
            dim=size.dim,
            mixer=MixerConfig(heads=size.heads),
            vocab_size=64,
            max_length=size.length,
        )
    )
    initialize(model, 0)
    return model


def _block(size: Size, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of a block whose matrices all ranks share, by our layers."""
    mesh = build_mesh(device.type, None, dist.get_world_size())
    assert mesh is not None
    model = _plain_block(size).to(device)
    apply(model, mesh)
    return _run(model, size, device)


def _dtensor_block(size: Size, device: torch.device) -> Callable[[], Tensor]:
    """The same by torch's own tensor parallelism."""
    ranks = dist.get_world_size()
    model = _plain_block(size).to(device)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, SoftmaxMixer)
    mixer.heads //= ranks
    mixer.kv_heads //= ranks
    by_inputs = RowwiseParallel(output_layouts=Shard(1))
    plan: dict[str, Any] = {
        "mixer_residual.norm": SequenceParallel(),
        "feedforward_residual.norm": SequenceParallel(),
        "mixer": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "feedforward": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        **{f"mixer.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        "feedforward.up": ColwiseParallel(),
        "mixer.output": by_inputs,
        "feedforward.down": by_inputs,
    }
    parallelize_module(
        model.blocks[0], init_device_mesh(device.type, (ranks,), mesh_dim_names=("tensor",)), plan
    )
    return _run(model, size, device)


def _run(model: Transformer, size: Size, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of this rank's piece of some sequences; returns the gradient of its
    input.
    """
    group = dist.group.WORLD
    assert group is not None
    x = own_piece(
        torch.randn(size.batch, size.length, size.dim, generator=torch.Generator().manual_seed(0)),
        group,
    ).to(device)
    x.requires_grad_()
    ctx = Context.of(torch.empty(size.batch, size.length, dtype=torch.int64, device=device))

    def run() -> Tensor:
        x.grad = None
        with _half(device):
            y, _ = model.blocks[0](x, ctx)
        y.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    return run
