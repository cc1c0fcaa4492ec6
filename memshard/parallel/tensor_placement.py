"""Which dense matrices tensor parallelism splits, and along which dim. Needs no fairscale."""

from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.layers.convolution import CausalConvolution
from memshard.models.layers.feedforward import FeedForward
from memshard.models.mixers.mixer import Mixer
from memshard.models.mixers.projections import HeadProjections
from memshard.models.ngram.memory import NgramMemory
from memshard.models.program.mixer import ProgramMixer
from memshard.models.transformer import Transformer
from memshard.parallel.spec import ShardSpec


def split_matrices(model: Transformer, ranks: int) -> dict[str, ShardSpec]:
    """Return the placement of every split weight, by its name: attention and its convolutions are
    split by heads, feedforwards by width, embedding and head by vocabulary.

    ValueError if `ranks` does not divide heads or widths. It need not divide the vocabulary: the
    last rank then has fewer tokens.
    """
    vocabulary = model.embedding.num_embeddings
    # The last rank would have no token at all: of 9 tokens over 4 ranks they get 3, 3, 3, 0.
    if vocabulary <= (ranks - 1) * -(-vocabulary // ranks):
        raise ValueError(
            f"model.vocab_size is {vocabulary}, too small to share between {ranks} ranks: set "
            "parallel.tensor to 1"
        )
    placement = {"embedding.weight": _split(vocabulary, 0)}
    if isinstance(model.head, AdaptiveHead):
        if ranks > 1:
            raise ValueError(
                "model.adaptive_cutoffs gives a head that ranks do not share: set parallel.tensor "
                "to 1"
            )
    elif model.head is not None:
        placement["head.weight"] = _split(vocabulary, 0)
    whole = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, NgramMemory)
    )
    for name, module in model.named_modules():
        if name.startswith(whole):
            continue
        if isinstance(module, ProgramMixer):
            if ranks > 1:
                raise ValueError(
                    f"parallel.tensor is {ranks}, but model.program is not split by channels: set "
                    "parallel.tensor to 1"
                )
        elif isinstance(module, Mixer):
            _check("model.mixer.heads", module.heads, ranks)
            if isinstance(module, HeadProjections):
                _check("model.mixer.kv_heads", module.kv_heads, ranks)
        elif isinstance(module, CausalConvolution):
            placement[f"{name}.weight"] = _split(len(module.weight), 0)
            continue
        elif isinstance(module, FeedForward):
            _check("model.feedforward.hidden", module.up.weight.shape[0], ranks)
        else:
            continue
        for child, matrix in module.named_children():
            if child in (*module.column_parallel, *module.row_parallel):
                # A linear map's weight is [outputs, inputs]: column-parallel
                # maps split the outputs.
                dim = int(child in module.row_parallel)
                placement[f"{name}.{child}.weight"] = _split(matrix.weight.shape[dim], dim)
    return placement


def _split(size: int, dim: int) -> ShardSpec:
    return ShardSpec(dim, ("tensor",), size)


def _check(key: str, size: int, ranks: int) -> None:
    if size % ranks:
        lower, upper = size // ranks * ranks, -(-size // ranks) * ranks
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"{key} is {size}, which parallel.tensor, {ranks}, does not divide: set {key} to "
            f"{nearest}, or parallel.tensor to a divisor"
        )
