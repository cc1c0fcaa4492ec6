"""Import product-key memories that other projects trained.

Three families of names and orders, all with slot = i1 * keys + i2, as their code specifies:

    XLM     `keys` [heads, 2, n, half] or [n, half]; `query_proj.query_mlps.0`, batch norm in
            `query_proj.query_mlps.1` (facebookresearch/XLM, xlm/model/memory; its notebook has
            `query_proj.0` and `query_proj.1`)
    Meta    `keys` [2 heads n, half] in the same order; `swilu_projection` and `value_proj`, or
            `value_proj` alone (facebookresearch/memory, lingua/product_key/memory.py)
    lucid   `keys` [heads, n, 2, half], `to_queries` [2 heads half, dim] by half and then head,
            `norm` over each half (lucidrains/product-key-memory)
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from memshard.io import parse_json, read_small, whole_folder
from memshard.models.memory.product_key import ProductKeyMemory, row_slots
from memshard.trainer.export.safetensors import Entry, write_safetensors

MEMORY_JSON = "memory.json"
_WEIGHTS = "memory.safetensors"
_VALUES = "values.weight"
_BLOCK_ROWS = 1 << 12
# Beginnings of names, from the rarest to the commonest.
_UNKNOWN = {
    "values_u.": "experts (Meta's PEER variant)",
    "gating.": "a scalar gate",
    "head_permutations": "shuffled indices",
    "pre_layernorm.": "a norm before the query",
    "output_norm.": "a norm of its output",
    "maybe_concat_combine.": "values for each head, joined by a matrix",
    "norm.": "a norm that is no layer norm of each half of a query",
    "query_proj.query_convs.": "a convolutional query network",
    "query_proj.": "a query network of several layers",
}


@dataclass(frozen=True)
class Imported:
    """An imported memory. family: xlm, meta or lucid. settings: arguments of `ProductKeyMemory`."""

    path: Path
    family: str
    settings: dict[str, Any]


def import_memories(
    source: Path, out: Path, topk: int, weighting: str = "softmax"
) -> list[Imported]:
    """Write every memory of a safetensors file into its folder under `out`, named as
    in the foreign model.

    topk: slots read per head; weighting: softmax, or relu for lucidrains' `non_competitive_gates`.
    The weights show neither. Values are read through a memory map and written block by block.
    ValueError, with the reason, if there is no such memory, or one with parts that ours lacks.
    """
    if source.suffix != ".safetensors":
        raise ValueError(
            f"{source} is no safetensors file, and nothing pickled is loaded here: convert it "
            "where you trust it, with "
            'safetensors.torch.save_file(torch.load(file, weights_only=True)["model"], '
            '"memory.safetensors")'
        )
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    try:
        with safe_open(source, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    places = sorted(
        {name.removesuffix("keys") for name in tensors if re.fullmatch(r"(.*\.)?keys", name)}
    )
    if not places:
        raise ValueError(
            f"{source} holds no memory: expected tensors <name>.keys and <name>.{_VALUES} (n-gram "
            "memories need --into)"
        )
    converted = []
    for place in places:
        memory = {
            name.removeprefix(place): tensor
            for name, tensor in tensors.items()
            if name.startswith(place)
        }
        if _VALUES not in memory:
            # Memories that share values keep them in one of the layers.
            shared = [f"{other}{_VALUES}" for other in places if f"{other}{_VALUES}" in tensors]
            if len(shared) == 1:
                memory[_VALUES] = tensors[shared[0]]
        what = f"{source}: {place.rstrip('.') or 'memory'}"
        converted.append(_convert(what, memory, topk, weighting))
    names = [place.rstrip(".").replace("/", "_") for place in places]
    if len({*names}) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(f"{source} has two memories for the folder {twice or out}: rename one")
    imported = []
    with whole_folder(out) as partial_out:
        for name, (family, settings, entries) in zip(names, converted, strict=True):
            (partial_out / name).mkdir(exist_ok=True)
            write_safetensors(partial_out / name / _WEIGHTS, entries)
            (partial_out / name / MEMORY_JSON).write_text(
                json.dumps({"family": family, **settings}, indent=2), encoding="utf-8"
            )
            imported.append(Imported(out / name, family, settings))
    return imported


def load_memory(path: str | Path) -> ProductKeyMemory:
    """Return the memory in a folder that `memshard import` wrote, in evaluation mode; its values
    are an ordinary parameter.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"a memory is loaded from a path, not from {type(path).__name__}: {path!r}")
    folder = Path(path)
    try:
        settings = parse_json(read_small(folder / MEMORY_JSON))
        settings.pop("family")
        with safe_open(folder / _WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        memory = _empty(settings, tensors)
        # `assign`, since parameters on meta have no memory to copy into.
        memory.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no imported memory ({type(error).__name__}: {error}): run memshard "
            "import again"
        ) from error
    return memory.requires_grad_().eval()


def _empty(settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> ProductKeyMemory:
    """Return a memory on meta with the parts that the tensors are for."""
    arguments = dict(settings)
    gate = arguments.pop("gate")
    with torch.device("meta"):
        memory = ProductKeyMemory(**arguments, gate="output.weight" in tensors)
    if not gate:
        memory.gate = None
    for name, layer in (("gate", memory.gate), ("output", memory.output)):
        if layer is not None and f"{name}.bias" in tensors:
            # Ours have no bias; those of Meta's code do.
            layer.bias = nn.Parameter(torch.empty(layer.out_features, device="meta"))
    return memory


def _convert(
    what: str, tensors: dict[str, Tensor], topk: int, weighting: str
) -> tuple[str, dict[str, Any], list[Entry]]:
    rest = dict(tensors)  # what no line below has taken is refused
    values, foreign_keys = rest.pop(_VALUES, None), rest.pop("keys")
    if foreign_keys.ndim < 2 or not foreign_keys.numel():
        raise ValueError(f"{what} has keys of shape {list(foreign_keys.shape)}")
    lucid = "to_queries.weight" in rest
    # `query_mlps` is one nn.Sequential where the network has one layer; the notebook's has no name.
    place = "query_proj.query_mlps" if "query_proj.query_mlps.0.weight" in rest else "query_proj"
    query = rest.pop("to_queries.weight" if lucid else f"{place}.0.weight", None)
    gate = "swilu_projection.weight" in rest
    dense: dict[str, Tensor] = {}
    for ours, theirs in (("gate", "swilu_projection"), ("output", "value_proj")):
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in rest:
                dense[f"{ours}.{part}"] = rest.pop(f"{theirs}.{part}")
    norm = {
        part: rest.pop(name)
        for part in ("weight", "bias", "running_mean", "running_var")
        if (name := f"norm.{part}" if lucid else f"{place}.1.{part}") in rest
    }
    rest.pop(f"{place}.1.num_batches_tracked", None)
    bias = rest.pop(f"{place}.0.bias", None)
    for beginning, part in (*_UNKNOWN.items(), ("", "a part")):
        for name in rest:
            if name.startswith(beginning):
                raise ValueError(f"{what} has {part} ({name}), which ours lacks")
    if values is None:
        raise ValueError(f"{what} has no {_VALUES}")
    n, half = math.isqrt(len(values)), foreign_keys.shape[-1]
    if n * n != len(values):
        raise ValueError(
            f"{what} has {len(values):,} values, which is no square: its indices wrapped around, "
            "or its keys are flat"
        )
    if query is None or query.ndim != 2 or query.shape[0] % (2 * half):
        raise ValueError(
            f"{what} has no query network that fits its keys: expected one linear map to heads x "
            f"{2 * half}"
        )
    heads, dim = query.shape[0] // (2 * half), query.shape[1]
    if values.shape[1] != dim and "output.weight" not in dense:
        raise ValueError(
            f"{what} has values of width {values.shape[1]}, the model has {dim}, and nothing maps "
            "one to the other"
        )
    # Meta's keys are flat, [2 heads n, half]; with a gate they are Meta's in any case.
    flat = foreign_keys.ndim == 2 and len(foreign_keys) != n
    family = "lucid" if lucid else "meta" if gate or flat else "xlm"
    if weighting != "softmax" and not lucid:
        raise ValueError(
            f"{what} is a memory of {family}, whose weights are a softmax: leave out --weighting"
        )
    dense |= {
        "sub_keys.weight": _sub_keys(what, foreign_keys, lucid, heads, n, half),
        "query.weight": query,
        "query.bias": query.new_zeros(len(query)) if bias is None else bias,
    }
    if lucid:
        # Rows by half and head there, by head and half here.
        dense["query.weight"] = query.view(2, heads, half, dim).transpose(0, 1).reshape(-1, dim)
        if norm.keys() != {"weight", "bias"} or norm["weight"].shape != (half,):
            raise ValueError(f"{what} has no layer norm of each half of a query")
        # One norm for all heads and halves there; a copy for each here computes the same.
        dense |= {f"query_norm.{part}": tensor.repeat(heads, 2) for part, tensor in norm.items()}
    else:
        dense |= {
            f"query_norm.{part}": tensor.view(heads, 2 * half) for part, tensor in norm.items()
        }
    settings = {
        "dim": dim,
        "keys": n,
        "heads": heads,
        "topk": topk,
        "key_dim": 2 * half,
        "value_dim": values.shape[1],
        "query_norm": "layer-half" if lucid else "batch" if norm else "none",
        "weighting": weighting,
        "gate": gate,
    }
    _check(what, settings, {**dense, _VALUES: values})
    # lucidrains' relu is not divided by topk, as ours is.
    scale = 1 if weighting == "softmax" else topk
    entries = [
        Entry(name, torch.float32, tuple(tensor.shape), [tensor.float()])
        for name, tensor in dense.items()
    ]
    entries.append(
        Entry(_VALUES, torch.float32, tuple(values.shape), _rows(partial(_take, values, scale), n))
    )
    return family, settings, entries


def _check(what: str, settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `load_memory` will be able to load the tensors."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():  # of a complex number, half would be lost
            raise ValueError(f"{what}: {name} is {tensor.dtype}, expected floating point")
    try:
        expected = _empty(settings, tensors).state_dict()
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in group.items()}
        for group in (expected, tensors)
    )
    if wrong := sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    ):
        name = wrong[0]
        raise ValueError(
            f"{what} fits no memory of ours: {name} is {theirs.get(name, 'missing')} there and "
            f"{ours.get(name, 'unknown')} here"
        )


def _sub_keys(what: str, keys: Tensor, lucid: bool, heads: int, n: int, half: int) -> Tensor:
    if lucid and keys.shape == (heads, n, 2, half):
        return keys.transpose(1, 2)
    if not lucid and keys.shape in ((heads, 2, n, half), (2 * heads * n, half)):
        return keys.reshape(heads, 2, n, half)
    if not lucid and keys.shape == (n, half):
        return keys.expand(heads, 2, n, half)  # the same for all heads and both halves
    raise ValueError(
        f"{what}: keys of shape {list(keys.shape)} fit no layout of {heads} heads, {n} keys and "
        f"halves of {half}"
    )


def _take(values: Tensor, scale: int, slots: Tensor) -> Tensor:
    return values[slots].float() * scale


def _rows(take: Callable[[Tensor], Tensor], keys: int) -> Iterator[Tensor]:
    """Iterate over values in the row order of our tables."""
    for first in range(0, keys * keys, _BLOCK_ROWS):
        yield take(row_slots(torch.arange(first, min(first + _BLOCK_ROWS, keys * keys)), keys))
