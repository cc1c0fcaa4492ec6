"""Copy the sources that transformers needs to load an export into one flat folder."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memshard.models.config import ModelConfig
from memshard.models.memory.kinds import MEMORIES
from memshard.models.ngram.kinds import RULES

_ROOT = Path(__file__).parents[2]
_HOME = "memshard.trainer.export.remote"
_ENTRIES = ("configuration_memshard", "modeling_memshard", "tokenization_memshard")
_REPLACED = {
    "memshard.models.kernels.backend": '''"""Plain torch: exports come without a compiler."""

from typing import Any

from memshard.models.kernels import plain_rows
from memshard.models.kernels.plain_topk import product_search

Lookup = RowBackend = Any


def lookup_for(*arguments: Any) -> None:
    """No search without stored scores."""


def backend_for(device: Any) -> Any:
    """Return plain torch, and why."""
    return plain_rows, "plain torch (exports come without a compiler)"


def search_for(scores: Any) -> Any:
    """Return the search in plain torch."""
    return product_search
''',
    "memshard.models.kernels.fla_delta_rule": '''"""Exports take plain torch everywhere."""

from typing import Any


def kernel_for(*arguments: Any) -> None:
    """No compiled kernel."""


def by_kernel(*arguments: Any) -> Any:
    """Never called."""
''',
    "memshard.models.kernels.tested": '''"""Exports take plain torch everywhere."""

from typing import Any


def tested_kernel(*arguments: Any) -> None:
    """No compiled kernel."""
''',
    "memshard.models.kernels.cpu_banded": '''"""Exports take plain torch everywhere."""


def kernel() -> None:
    """No compiled kernel."""
''',
}


_LEFT_OUT: dict[str, Callable[[ModelConfig], bool]] = {
    "memshard.models.decoder_block": lambda model: not model.translates,
    "memshard.models.fast_weights.segments": lambda model: (
        not any("fast_weights" in kind.path for kind in model.mixer.kinds)
    ),
    "memshard.models.layers.adaptive_softmax": lambda model: not model.adaptive_cutoffs,
    "memshard.models.mixers.bidirectional": lambda model: not model.encoder_layers,
    "memshard.models.ngram.memory": lambda model: not model.ngram.layers,
    "memshard.models.ngram.recent_tokens": lambda model: not model.ngram.layers,
    "memshard.models.program.mixer": lambda model: model.program is None,
    "memshard.models.program.program": lambda model: model.program is None,
    "memshard.models.recompute.grid": lambda model: model.residual != "reversible",
    "memshard.models.recompute.reversible": lambda model: model.residual != "reversible",
}
"""Modules that `Transformer` imports and only some models use; true for those that do not."""


def write_code(folder: Path, model: ModelConfig, eos_id: int) -> dict[str, Any]:
    """Write the modules that the model needs and tokenizer settings; return keys of config.json.

    eos_id: of the model's tokenizer.
    """
    left_out = {module for module, unused in _LEFT_OUT.items() if unused(model)}
    replaced = {**_REPLACED, "memshard.models.load_class": _class_loader(model)}
    pending, done = [f"{_HOME}.{name}" for name in _ENTRIES], set()
    while pending:
        module = pending.pop()
        if module not in done:
            done.add(module)
            source, needed = _flat(module, replaced, left_out)
            (folder / f"{_flat_name(module)}.py").write_text(source, encoding="utf-8")
            pending += needed
    classes = {
        "AutoConfig": "configuration_memshard.MemshardConfig",
        "AutoModelForCausalLM": "modeling_memshard.MemshardForCausalLM",
    }
    # None: there is no fast tokenizer.
    tokenizer_map = {"AutoTokenizer": ["tokenization_memshard.MemshardTokenizer", None]}
    tokenizer: dict[str, Any] = {"tokenizer_class": "MemshardTokenizer", "auto_map": tokenizer_map}
    if model.position in ("learned", "axial"):
        tokenizer["model_max_length"] = model.max_length
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": eos_id, "pad_token_id": eos_id}, indent=2),
        encoding="utf-8",
    )
    # A table that several layers read is tied, as an embedding and its head are.
    return {
        "architectures": ["MemshardForCausalLM"],
        "auto_map": classes,
        "tie_word_embeddings": True,
        "eos_token_id": eos_id,
    }


def _class_loader(model: ModelConfig) -> str:
    """Return the source of a `load_class` that imports the model's mixers, memory and rule of
    n-grams by name, which is what transformers looks for.
    """
    paths = {model.mixer.kind_of(layer).path for layer in range(model.layers)}
    if model.memory.layers:
        paths.add(MEMORIES[model.memory.kind].path)
    if model.ngram.layers:
        paths.add(RULES[model.ngram.rule].path)
    classes = [path.split(":") for path in sorted(paths)]
    imports = "".join(f"from {module} import {name}\n" for module, name in classes)
    rows = "".join(f'    "{module}:{name}": {name},\n' for module, name in classes)
    return f'''"""The classes of this model."""

from typing import Any

{imports}
_CLASSES: dict[str, Any] = {{
{rows}}}


def load_class(path: str) -> Any:
    """Return the class at "package.module:Class"."""
    return _CLASSES[path]
'''


def _flat(module: str, replaced: dict[str, str], left_out: set[str]) -> tuple[str, list[str]]:
    """Return the module's source with relative imports, and the modules it imports. What it
    imports from modules that are left out becomes an empty class.
    """
    source = replaced.get(module) or _file(module).read_text(encoding="utf-8")
    lines, needed = source.splitlines(keepends=True), []
    # From the last import to the first: a rewritten one may have more lines,
    # which moves those below.
    for node in reversed(list(ast.walk(ast.parse(source)))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("memshard"):
            continue
        rewritten = ""
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if node.module in left_out:
                rewritten += f"class {alias.name}: ...  # no part of this model\n"
            elif _file(inner).exists():
                # transformers copies only the files that it sees in "from .name import".
                rewritten += (
                    f"from .{_flat_name(inner)} import __name__ as _\nfrom . import "
                    f"{_flat_name(inner)} as {alias.asname or alias.name}\n"
                )
                needed.append(inner)
            else:
                rewritten += f"from .{_flat_name(node.module or '')} import {name}\n"
                needed.append(node.module or "")
        lines[node.lineno - 1 : node.end_lineno] = [
            " " * node.col_offset + line for line in rewritten.splitlines(keepends=True)
        ]
    return "".join(lines), needed


def _file(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _flat_name(module: str) -> str:
    return module.removeprefix(f"{_HOME}.").removeprefix("memshard.").replace(".", "_")
