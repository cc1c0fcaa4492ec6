"""Measure what spreading costs: training steps at every (tensor, data) split of some ranks and on
each engine, and a block compared with DTensor's.

    memshard bench parallel --ranks 2 --layers 4 --dim 512 --heads 8 --keys 128
"""

import argparse
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from memshard.bench.common.sizes import add_sizes
from memshard.experiments.common.repeated import median_low_high, range_text
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.mixers.softmax import SoftmaxMixer
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply, losses_on
from memshard.parallel.mesh import build_mesh
from memshard.parallel.sequence import local_segment
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.training import Training, build_for_training, training_step

_RESULT = "result.json"


@dataclass(frozen=True)
class Size:
    """Size of the model to train. batch: sequences of a step, over all ranks. keys: sub-keys of a
    memory in the middle layer, 0 for none.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        metavar="N",
        help="processes of this machine, at least 2 (default 2)",
    )
    add_sizes(parser)
    parser.add_argument(
        "--vocabulary", type=int, default=8192, metavar="N", help="tokens (default 8,192)"
    )
    parser.add_argument(
        "--keys",
        type="from 0",
        default=0,
        metavar="N",
        help="sub-keys of a memory in the middle layer, 0 for none (default 0)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="interleaved rounds whose median counts (default 9)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` on processes of this machine, each with a GPU where there are enough; return
    what rank 0 measured.
    """
    if args.ranks < 2:
        raise ValueError(
            "--ranks is 1, and nothing is spread over one process; memshard bench plain-loop "
            "measures training in one"
        )
    size = Size(
        args.layers, args.dim, args.heads, args.length, args.batch, args.vocabulary, args.keys
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (args.ranks, folder, size, args.rounds), nprocs=args.ranks)
        result: dict[str, Any] = json.loads((Path(folder) / _RESULT).read_text(encoding="utf-8"))
    return result


def show(result: dict[str, Any]) -> None:
    """Print splits, engines, the check of copies and blocks as tables."""
    for point in result["steps"]:
        print(
            f"tensor {point['tensor']} x data "
            f"{point['data']:<4}{range_text(point['step_s'], ',.0f', 1e-3):>24} ms a step"
            f"{point['dense_bytes'] / 1e6:>12,.1f} MB dense weights a "
            f"rank{point['sent_bytes'] / 1e6:>12,.1f} MB sent a step"
        )
    for name, seconds in result["engines_s"].items():
        print(f"engine {name:<32}{range_text(seconds, ',.0f', 1e-3):>24} ms a step")
    print(f"check of copies{range_text(result['check_s'], ',.0f', 1e-3):>48} ms")
    for name, seconds in result.get("blocks_s", {}).items():
        print(f"block, {name:<32}{range_text(seconds, ',.0f', 1e-3):>24} ms")


def _rank(rank: int, ranks: int, folder: str, size: Size, rounds: int) -> None:
    cuda = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    # What torchrun would set; DeepSpeed looks for the first of them.
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    # By default every rank would start a thread a core, and ranks would time each other's threads.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(device)
    # A file needs no port that another program could hold.
    store = dist.FileStore(f"{folder}/store", ranks)
    # gloo beside NCCL: `interleaved` reduces times that are on the CPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks
    )
    result = {
        "device": str(device),
        "ranks": ranks,
        "size": asdict(size),
        **measure(size, rounds, device),
    }
    if rank == 0:
        (Path(folder) / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    # Here, since that file imports fairscale, and --help and --list should not.
    from memshard.parallel.tensor import leave

    leave()
    dist.destroy_process_group()


def measure(size: Size, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return seconds of a step at every split and on every engine, of a check of copies and of a
    block (median and range of interleaved rounds), and the bytes of a rank's weights and of what it
    sends.
    """
    ranks = dist.get_world_size()
    # Only divisors of the ranks, and only as many as the heads can be divided by.
    splits = [
        tensor for tensor in range(1, ranks + 1) if ranks % tensor == 0 and size.heads % tensor == 0
    ]
    steps = {tensor: _step(size, tensor, device) for tensor in splits}
    seconds = interleaved(
        {str(tensor): step for tensor, (step, _) in steps.items()}, rounds, device
    )
    points = []
    for tensor, (_, training) in steps.items():
        recipe = Recipe(
            data=DataConfig(path="", length=size.length),
            model=size.model,
            train=TrainConfig(batch=size.batch),
            parallel=ParallelConfig(tensor=tensor),
        )
        cost = estimate(recipe, ranks, size.vocabulary)
        tokens = cost.micro_batch * cost.micro_batches * size.length
        # The ranks of a tensor group share the lookups of its sequences, so that each looks up 1 /
        # tensor of the tokens. The other terms count a group's tokens, or a step.
        sent = (
            cost.tensor_traffic * tokens
            + cost.gradient_traffic
            + cost.lookup_traffic * tokens / tensor
            + cost.replica_traffic
        )
        points.append(
            {
                "tensor": tensor,
                "data": ranks // tensor,
                "step_s": seconds[str(tensor)],
                "dense_bytes": sum(p.nbytes for p in training.model.parameters()),
                "sent_bytes": sent,
            }
        )
    result: dict[str, Any] = {"steps": points}
    engines: dict[str, tuple[Literal["torch", "deepspeed"], Literal[0, 1]]] = {
        "torch": ("torch", 0),
        "torch, ZeRO-1": ("torch", 1),
    }
    if find_spec("deepspeed"):
        engines["DeepSpeed, ZeRO-1"] = ("deepspeed", 1)
    # Without tensor parallelism: engines differ in what data ranks do with dense gradients.
    forms = {name: _step(size, 1, device, *settings)[0] for name, settings in engines.items()}
    result["engines_s"] = interleaved(forms, rounds, device)
    _, whole = steps[1]
    result["check_s"] = interleaved({"": whole.check_copies}, rounds, device)[""]
    # Neither block can be split over all ranks then.
    if size.heads % ranks:
        return result
    blocks = {
        "fairscale layers, our mappings": _block(size, device),
        "DTensor, Colwise and Rowwise": _dtensor_block(size, device),
    }
    ours, theirs = (block() for block in blocks.values())
    # Before timing: a ratio of two blocks that compute different things says nothing.
    result["blocks_difference"] = float((ours - theirs).norm() / theirs.norm())
    return result | {"blocks_s": interleaved(blocks, rounds, device)}


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return median and range of the seconds that each action takes on the slowest rank, one after
    the other in every round; a first round does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            dist.barrier()
            begun = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The others wait for the slowest rank at the next barrier, so its time is the step's.
            taken = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            times[name].append(float(taken))
    return {name: median_low_high(taken[1:]) for name, taken in times.items()}


def _step(
    size: Size,
    tensor: int,
    device: torch.device,
    kind: Literal["torch", "deepspeed"] = "torch",
    zero: Literal[0, 1] = 0,
) -> tuple[Callable[[], object], Training]:
    """Return a function that takes a training step, on ranks in groups of `tensor`, and what it
    trains.
    """
    mesh = build_mesh(device.type, None, tensor)
    train = TrainConfig(
        steps=1,
        batch=size.batch,
        engine=kind,
        zero=zero,
        precision="bf16" if device.type == "cuda" else "fp32",
    )
    training = build_for_training(size.model, train=train, device=device, mesh=mesh)
    losses = losses_on(mesh)
    # Sequences of a data rank: ranks / tensor groups share the batch, and all ranks of one group
    # get the same. Rounded up, so that no rank has nothing to do.
    share = math.ceil(size.batch * tensor / dist.get_world_size())
    tokens = torch.randint(
        size.vocabulary, (share, size.length + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])[0]
        # Over the tokens of all ranks, not of this one: gradients are summed, not averaged.
        return losses(logits, tokens[:, 1:]).sum() / (size.batch * size.length)

    return lambda: training_step(training, [tokens], loss, 0), training


def _half(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _plain_block(size: Size) -> Transformer:
    """Return a model of one layer, whose block is measured."""
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
    """Return forward and backward of a block that our layers split over all ranks."""
    mesh = build_mesh(device.type, None, dist.get_world_size())
    assert mesh is not None
    model = _plain_block(size).to(device)
    apply(model, mesh)
    return _forward_and_backward(model, size, device)


def _dtensor_block(size: Size, device: torch.device) -> Callable[[], Tensor]:
    """Return the same for torch's tensor parallelism."""
    ranks = dist.get_world_size()
    model = _plain_block(size).to(device)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, SoftmaxMixer)
    # Column-parallel projections return this rank's heads only, and the mixer reshapes by its own
    # number. `parallelize_module` knows nothing of it.
    mixer.heads //= ranks
    mixer.kv_heads //= ranks
    # Outputs split along the sequence (dimension 1): a reduce-scatter where the default would
    # all-reduce, as in ours, so that the two are compared at equal traffic.
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
    return _forward_and_backward(model, size, device)


def _forward_and_backward(
    model: Transformer, size: Size, device: torch.device
) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward of this rank's part of some sequences and
    returns the gradient of its input.
    """
    group = dist.group.WORLD
    assert group is not None
    x = local_segment(
        torch.randn(size.batch, size.length, size.dim, generator=torch.Generator().manual_seed(0)),
        group,
    ).to(device)
    x.requires_grad_()
    # Only the shape is read: positions of the whole length, while x is this rank's segment.
    ctx = Context.of(torch.empty(size.batch, size.length, dtype=torch.int64, device=device))

    def forward_and_backward() -> Tensor:
        x.grad = None
        with _half(device):
            y, _ = model.blocks[0](x, ctx)
        y.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    return forward_and_backward
