"""Compare two recipes."""

from typing import Any

from memshard.trainer.config.explain import SECTION, fields
from memshard.trainer.config.load import to_dict
from memshard.trainer.config.recipe import Recipe


def diff(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in a, value in b) for every key that differs, in order."""
    values = [
        (key.name, _value(a, key.name), _value(b, key.name))
        for key in fields()
        if key.type != SECTION
    ]
    return [(key, left, right) for key, left, right in values if left != right]


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = to_dict(recipe)
    for part in key.split("."):
        value = value[part]
    return value
