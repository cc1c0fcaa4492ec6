"""memshard: language models whose capacity sits in huge, sparsely read memories.

The names below load their module, and with it torch, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memshard.models.memory.product_key import ProductKeyMemory
    from memshard.models.memory.table import externalize_tables
    from memshard.parallel.tables.full_state import load_whole_state, whole_state
    from memshard.parallel.tables.shard_tables import shard_tables
    from memshard.trainer.checkpoint.load_model import load
    from memshard.trainer.evaluation.slot_usage import memory_usage
    from memshard.trainer.export.foreign import load_memory
    from memshard.trainer.optim.combined import CombinedOptimizer
    from memshard.trainer.optim.rows.adam import RowAdam

__version__ = "0.1.0"

__all__ = [
    "CombinedOptimizer",
    "ProductKeyMemory",
    "RowAdam",
    "externalize_tables",
    "load",
    "load_memory",
    "load_whole_state",
    "memory_usage",
    "shard_tables",
    "whole_state",
]

_HOMES = {
    "CombinedOptimizer": "trainer.optim.combined",
    "ProductKeyMemory": "models.memory.product_key",
    "RowAdam": "trainer.optim.row_adam",
    "externalize_tables": "models.memory.table",
    "load_whole_state": "parallel.tables.whole",
    "load": "trainer.checkpoint.load_model",
    "load_memory": "trainer.export.foreign",
    "memory_usage": "trainer.evaluation.usage",
    "shard_tables": "parallel.tables.shard",
    "whole_state": "parallel.tables.whole",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memshard' has no attribute '{name}'")
    return getattr(import_module(f"memshard.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
