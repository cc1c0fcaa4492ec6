"""Import product-key memories that other projects trained.

Three families of names and orders, all with slot = i1 * keys + i2, as their code specifies:

    XLM     `keys` [heads, 2, n, half], `query_proj.query_mlps.0.0`, batch norm in
            `query_proj.query_mlps.0.1`, `values.weight`
    Meta    `keys` [2 heads n, half] in the same order; gated by `swilu_projection` and `value_proj`
    lucid   `keys` [heads, n, 2, half], `to_queries` [2 heads half, dim] by half and then head,
            `norm` over each half
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from memshard.models.memory.product_key import ProductKeyMemory, row_slots
from memshard.trainer.export.safetensors import Entry, write_safetensors

MEMORY_JSON = "memory.json"
_WEIGHTS = "memory.safetensors"
_VALUES = "values.weight"
_BLOCK_ROWS = 1 << 12
_UNKNOWN = {
    "values_u.weight": "an expert memory (PEER variant)",
    "gating.weight": "a scalar gate",
    "head_permutations": "shuffled indices",
    "pre_layernorm.weight": "a norm before the query",
    "output_norm.weight": "a norm of its output",
    "query_proj.query_mlps.1.0.weight": "a query network for each head",
    "query_proj.query_mlps.0.2.weight": "a query network of several layers",
    "query_proj.query_mlps.0.3.weight": "a query network of several layers",
}


@dataclass(frozen=True)
class Imported:
    """An imported memory. family: xlm, meta or lucid. settings: arguments of `ProductKeyMemory`."""

    path: Path
    family: str
    settings: dict[str, Any]


def import_memories(source: Path, out: Path, topk: int) -> list[Imported]:
    """Write every memory of a safetensors file into its folder under `out`, named as in the foreign
    model.

    topk: slots read per head, which the weights do not show. Values are read through a memory map
    and written block by block. ValueError, with the reason, if there is no such memory, or one with
    parts that ours lacks.
    """
    if source.suffix != ".safetensors":
        raise ValueError(
            f"{source} is no safetensors file, and nothing pickled is loaded here: convert it "
            "where you trust it, with "
            'safetensors.torch.save_file(torch.load(file, weights_only=True)["model"], '
            '"memory.safetensors")'
        )
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
            f"{source} holds no memory: expected tensors <name>.keys and <name>.{_VALUES}"
        )
    imported = []
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
        family, settings, entries = _convert(f"{source}: {place or 'memory'}", memory, topk)
        folder = out / place.rstrip(".").replace("/", "_") if place else out
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / _WEIGHTS, entries)
        (folder / MEMORY_JSON).write_text(json.dumps({"family": family, **settings}, indent=2))
        imported.append(Imported(folder, family, settings))
    return imported


def load_memory(path: str | Path) -> ProductKeyMemory:
    """Return the memory in a folder that `memshard import` wrote, in evaluation mode; its values
    are an ordinary parameter.
    """
    folder = Path(path)
    try:
        settings = json.loads((folder / MEMORY_JSON).read_text())
        settings.pop("family")
        with torch.device("meta"):
            memory = ProductKeyMemory(**settings)
        with safe_open(folder / _WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no imported memory ({type(error).__name__}: {error}): run memshard "
            "import again"
        ) from error
    for layer in (memory.gate, memory.output):
        if layer is not None and any(
            name.endswith(".bias") and name.startswith(("gate", "output")) for name in tensors
        ):
            # Our gate and output have no bias; those of Meta's code may.
            layer.bias = nn.Parameter(torch.empty(layer.out_features, device="meta"))
    # `assign`, since parameters on meta have no memory to copy into.
    memory.load_state_dict(tensors, assign=True)
    return memory.requires_grad_().eval()


def _convert(
    what: str, tensors: dict[str, Tensor], topk: int
) -> tuple[str, dict[str, Any], list[Entry]]:
    for name, part in _UNKNOWN.items():
        if name in tensors:
            raise ValueError(f"{what} has {part} ({name}), which ours lacks")
    if _VALUES not in tensors:
        raise ValueError(f"{what} has no {_VALUES}")
    values, foreign_keys = tensors[_VALUES], tensors["keys"]
    n, half = math.isqrt(len(values)), foreign_keys.shape[-1]
    if n * n != len(values):
        raise ValueError(
            f"{what} has {len(values):,} values, which is no square: its indices wrapped around, "
            "or its keys are flat"
        )
    lucid = "to_queries.weight" in tensors
    query = tensors.get(
        "to_queries.weight" if lucid else "query_proj.query_mlps.0.0.weight",
        tensors.get("query_proj.0.weight"),
    )
    if query is None or query.shape[0] % (2 * half):
        raise ValueError(
            f"{what} has no query network that fits its keys: expected one linear map to heads x "
            f"{2 * half}"
        )
    heads, dim = query.shape[0] // (2 * half), query.shape[1]
    gate = "swilu_projection.weight" in tensors
    # Meta's keys are flat, [2 heads n, half]; with a gate they are Meta's in any case.
    family = "lucid" if lucid else "meta" if gate or foreign_keys.ndim == 2 else "xlm"
    sub_keys = _sub_keys(what, foreign_keys, lucid, heads, n, half)
    dense = {
        "sub_keys.weight": sub_keys,
        "query.weight": query,
        "query.bias": query.new_zeros(len(query)),
    }
    norm = "none"
    if lucid:
        # Rows by half and head there, by head and half here.
        dense["query.weight"] = query.view(2, heads, half, dim).transpose(0, 1).reshape(-1, dim)
        norm = "layer-half"
        for part in ("weight", "bias"):
            if f"norm.{part}" not in tensors:
                raise ValueError(f"{what} has a norm that is no layer norm of each half of a query")
            # One norm for all heads and halves there; a copy for each here computes the same.
            dense[f"query_norm.{part}"] = tensors[f"norm.{part}"].repeat(heads, 2)
    else:
        place = (
            "query_proj.query_mlps.0"
            if "query_proj.query_mlps.0.0.weight" in tensors
            else "query_proj"
        )
        dense["query.bias"] = tensors.get(f"{place}.0.bias", dense["query.bias"])
        if f"{place}.1.running_mean" in tensors:
            norm = "batch"
            for part in ("weight", "bias", "running_mean", "running_var"):
                dense[f"query_norm.{part}"] = tensors[f"{place}.1.{part}"].view(heads, 2 * half)
    if gate:
        for ours, theirs in (("gate", "swilu_projection"), ("output", "value_proj")):
            dense[f"{ours}.weight"] = tensors[f"{theirs}.weight"]
            dense[f"{ours}.bias"] = tensors.get(
                f"{theirs}.bias", torch.zeros(len(tensors[f"{theirs}.weight"]))
            )
    settings = {
        "dim": dim,
        "keys": n,
        "heads": heads,
        "topk": topk,
        "key_dim": 2 * half,
        "value_dim": values.shape[1],
    }
    entries = [
        Entry(name, torch.float32, tuple(tensor.shape), [tensor.float()])
        for name, tensor in dense.items()
    ]
    entries.append(
        Entry(_VALUES, torch.float32, tuple(values.shape), _rows(partial(_take, values), n))
    )
    return family, {**settings, "query_norm": norm, "gate": gate}, entries


def _sub_keys(what: str, keys: Tensor, lucid: bool, heads: int, n: int, half: int) -> Tensor:
    if lucid and keys.shape == (heads, n, 2, half):
        return keys.transpose(1, 2)
    if not lucid and keys.numel() == heads * 2 * n * half:
        return keys.reshape(heads, 2, n, half)
    if not lucid and keys.shape == (n, half):
        return keys.expand(heads, 2, n, half)  # the same for all heads and both halves
    raise ValueError(
        f"{what}: keys of shape {list(keys.shape)} fit no layout of {heads} heads, {n} keys and "
        f"halves of {half}"
    )


def _take(values: Tensor, slots: Tensor) -> Tensor:
    return values[slots].float()


def _rows(take: Callable[[Tensor], Tensor], keys: int) -> Iterator[Tensor]:
    """Iterate over values in the row order of our tables."""
    for first in range(0, keys * keys, _BLOCK_ROWS):
        yield take(row_slots(torch.arange(first, min(first + _BLOCK_ROWS, keys * keys)), keys))
