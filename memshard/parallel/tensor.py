"""Tensor parallelism: ranks that share the matrices of a transformer and, between the matrices, the
tokens of a sequence.

Layers and loss are fairscale's; the sequence mappings between them are ours: where fairscale would
sum whole activations on every rank, a rank gets the sum of its own segment of the sequence
(Korthikanti et al. 2022, section 4.2.2), so no token passes a norm or a memory twice. This is the
only file that imports fairscale.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.context import Context
from memshard.models.layers.convolution import CausalConvolution
from memshard.models.layers.feedforward import FeedForward
from memshard.models.layers.linear import TokenEmbedding, cast_once
from memshard.models.loss import IGNORE
from memshard.models.mixers.mixer import Mixer
from memshard.models.mixers.projections import HeadProjections
from memshard.models.transformer import Transformer
from memshard.parallel.mesh import DATA, group
from memshard.parallel.sequence import fill_up, gather, local_segment, reduce_scatter, split
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tensor_placement import split_matrices

try:
    from fairscale.nn.model_parallel import initialize as fairscale_groups
    from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
    from fairscale.nn.model_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
except ImportError as error:
    raise ValueError(
        "parallel.tensor needs fairscale: pip install 'memshard[tensor-parallel]', or set "
        "parallel.tensor to 1"
    ) from error


def split_dense(model: Transformer, mesh: DeviceMesh) -> dict[str, ShardSpec]:
    """Replace the model's large matrices by this rank's shards, share its sequences, and return the
    placement of the split weights.

    Weights are kept (each rank cuts its shard from its own copy); on the meta device `initialize`
    draws them, the same for any number of ranks. The model then returns logits of this rank's part
    of the vocabulary. ValueError where sizes do not divide.
    """
    ranks = mesh["tensor"].get_group()
    placement = split_matrices(model, dist.get_world_size(ranks))
    _give_groups(mesh)
    for name, spec in placement.items():
        owner, _, child = name.removesuffix(".weight").rpartition(".")
        whole: Any = model.get_submodule(name.removesuffix(".weight"))
        setattr(model.get_submodule(owner), child, _shard_class(whole, spec, child)(whole, spec))
    for module in model.modules():
        if isinstance(module, Mixer):
            # Only after split_matrices has checked that they divide.
            module.heads //= dist.get_world_size(ranks)
            module.first_head = dist.get_rank(ranks) * module.heads
        if isinstance(module, HeadProjections):
            module.kv_heads //= dist.get_world_size(ranks)
            if module.share_qk:
                module.query.register_forward_pre_hook(_gather_channels)
        if isinstance(module, Mixer | FeedForward):
            module.register_forward_pre_hook(_gather_input)
    model.share_sequence = _share_sequence
    return placement


def _give_groups(mesh: DeviceMesh) -> None:
    """Tell fairscale which ranks share matrices."""
    if hasattr(fairscale_groups, "_MODEL_PARALLEL_GROUP"):
        fairscale_groups._MODEL_PARALLEL_GROUP = mesh["tensor"].get_group()
        fairscale_groups._DATA_PARALLEL_GROUP = group(mesh, DATA)
    else:
        # The public way makes the same groups a second time, and prints.
        fairscale_groups.initialize_model_parallel(mesh["tensor"].size())


def leave() -> None:
    """Release the process groups. Call it before `destroy_process_group`: groups that fairscale
    still refers to can abort the process at its exit.
    """
    fairscale_groups.destroy_model_parallel()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return all losses on every rank, as `models.loss.token_losses`, from logits whose vocabulary
    is split.

    logits: [..., this rank's tokens of the vocabulary]; fp32 logits are overwritten. Only the
    maximum, the sum and the target's logit are sent, 12 bytes a token.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    losses = vocab_parallel_cross_entropy(logits.contiguous(), targets)
    return torch.where(targets == IGNORE, 0.0, losses)


class _Shard(nn.Module):
    """This rank's shard of a weight. Mixed into fairscale's layers, whose constructors would draw
    the whole weight on every rank.
    """

    weight: nn.Parameter
    spec: ShardSpec

    def cut(self, whole: nn.Linear | nn.Embedding | CausalConvolution, spec: ShardSpec) -> None:
        """Take this rank's shard of `whole`'s weight."""
        self.spec = spec
        self.weight = nn.Parameter(
            self._shard(whole.weight.detach()).clone(memory_format=torch.contiguous_format)
        )
        # In a list, so that it is not registered as a submodule.
        self._like = [deepcopy(whole).to("meta")]
        self._tag()

    def reset_parameters(self) -> None:
        """Draw the whole weight as the unsplit layer would, and keep this rank's shard: the numbers
        do not depend on how many ranks there are.
        """
        # The whole weight exists for a moment, one layer at a time.
        whole = deepcopy(self._like[0]).to_empty(device=self.weight.device)
        whole.reset_parameters()
        with torch.no_grad():
            self.weight.copy_(self._shard(whole.weight))

    def _shard(self, whole: Tensor) -> Tensor:
        ranks = fairscale_groups.get_model_parallel_group()
        width = -(-self.spec.size // dist.get_world_size(ranks))
        first = dist.get_rank(ranks) * width
        return whole.narrow(self.spec.dim, first, min(width, self.spec.size - first))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Leaving the meta device creates a new parameter, without the tag.
        self._tag()
        return self

    def _tag(self) -> None:
        # DeepSpeed's norm takes untagged parameters for copies and counts them on one rank only.
        self.weight.model_parallel = True  # type: ignore[attr-defined]


class _Columns(_Shard, ColumnParallelLinear):
    """A linear map with some of the outputs. x is the whole sequence, and backward leaves summing
    its gradient over ranks to the layer that gathered it.
    """

    def __init__(self, whole: nn.Linear, spec: ShardSpec) -> None:
        ranks = fairscale_groups.get_model_parallel_world_size()
        ColumnParallelLinear.__init__(
            self, 1, ranks, bias=False, gather_output=False, init_method=_do_not_draw
        )
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.cut(whole, spec)
        self.output_size_per_partition = len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., this rank's outputs].

        fairscale's forward would sum the input's gradient for each map; here one gather serves all
        maps of an input.
        """
        return F.linear(x, self.weight)


class _Head(_Columns):
    """The output head for some tokens of the vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length / ranks, dim] to [batch, length, ceil(vocabulary / ranks)], with -inf
        where the last rank has no token.
        """
        return _logits(x, self.weight, self.spec)


class _Rows(_Shard, RowParallelLinear):
    """A linear map of some of the inputs. Results are summed over the ranks, and each gets its
    segment of the sum.
    """

    def __init__(self, whole: nn.Linear, spec: ShardSpec) -> None:
        ranks = fairscale_groups.get_model_parallel_world_size()
        RowParallelLinear.__init__(
            self, ranks, 1, bias=False, input_is_parallel=True, init_method=_do_not_draw
        )
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.cut(whole, spec)
        self.input_size_per_partition = self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, this rank's inputs] to [batch, length / ranks, outputs]."""
        return self.summed(F.linear(x, self.weight))

    @staticmethod
    def summed(y: Tensor) -> Tensor:
        """Do what `Projection.summed` does: return this rank's segment of the ranks' sum."""
        return reduce_scatter(y, fairscale_groups.get_model_parallel_group())


class _Embedding(_Shard, VocabParallelEmbedding):
    """The embedding of some tokens of the vocabulary, and the head tied to it."""

    def __init__(self, whole: TokenEmbedding, spec: ShardSpec) -> None:
        ranks = fairscale_groups.get_model_parallel_world_size()
        VocabParallelEmbedding.__init__(self, ranks, 1, init_method=_do_not_draw)
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.cut(whole, spec)
        self.num_embeddings_per_partition = len(self.weight)
        self.vocab_start_index = fairscale_groups.get_model_parallel_rank() * -(-spec.size // ranks)
        self.vocab_end_index = self.vocab_start_index + len(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [batch, length] int64 to [batch, length / ranks, dim]."""
        return split(super().forward(tokens), fairscale_groups.get_model_parallel_group())

    def logits(self, x: Tensor) -> Tensor:
        """Return logits as `_Head` does."""
        return _logits(x, self.weight, self.spec)


class _Channels(_Shard, CausalConvolution):
    """The convolutions of some heads."""

    def __init__(self, whole: CausalConvolution, spec: ShardSpec) -> None:
        nn.Module.__init__(self)
        self.width = whole.width
        self.cut(whole, spec)


def _shard_class(whole: nn.Module, spec: ShardSpec, name: str) -> Any:
    """Return the class that takes a layer's place."""
    if isinstance(whole, CausalConvolution):
        return _Channels
    if isinstance(whole, nn.Embedding):
        return _Embedding
    if spec.dim:
        return _Rows
    return _Head if name == "head" else _Columns


def _do_not_draw(weight: Tensor) -> Tensor:
    return weight


def _gather_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather the sequence: pre-forward hook of layers that need all of it."""
    x, *rest = inputs
    if isinstance(module, Mixer) and (values := rest[0].values) is not None:
        ranks = fairscale_groups.get_model_parallel_group()
        # What is added to the values of this rank's heads.
        mine = gather(values, ranks).chunk(dist.get_world_size(ranks), -1)[dist.get_rank(ranks)]
        rest[0] = replace(rest[0], values=mine)
    return _gather_to_multiply(x), *rest


def _gather_channels(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather channels: pre-forward hook of a map whose input is all ranks' heads."""
    return (_gather_to_multiply(inputs[0].transpose(1, 2)).transpose(1, 2),)


def _gather_to_multiply(x: Tensor) -> Tensor:
    # Casting first halves what is sent.
    return gather(cast_once(x), fairscale_groups.get_model_parallel_group())


def _share_sequence(tokens: Tensor, ctx: Context) -> tuple[Tensor, Context]:
    """Pad the sequence's end until all ranks' segments are equally long, and add this rank's part
    to the context.
    """
    ranks = fairscale_groups.get_model_parallel_group()
    # No token sees what comes after it, so mixers need not know about the padding. Layers that take
    # tokens one by one (norm statistics, memories) must leave it out.
    tokens, ctx, real = fill_up(tokens, ctx, ranks)
    documents, padding, window = (
        None if facts is None else local_segment(facts, ranks)
        for facts in (ctx.documents, real, ctx.window)
    )
    part = Context(
        local_segment(ctx.positions, ranks), documents, padding, ctx.random, window=window
    )
    return tokens, replace(ctx, local_part=part)


def _logits(x: Tensor, weight: Tensor, spec: ShardSpec) -> Tensor:
    logits = F.linear(_gather_to_multiply(x), weight)
    width = -(-spec.size // fairscale_groups.get_model_parallel_world_size())
    # fairscale's loss assumes that all ranks have equally many tokens of the vocabulary.
    return (
        logits
        if logits.shape[-1] == width
        else F.pad(logits, (0, width - logits.shape[-1]), value=-torch.inf)
    )
