"""What the fields of a recipe share: which may change on resume, and that numbers are finite."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

from memshard.models.config import check_kind

MAY_CHANGE = "may_change"
INFINITE = "infinite"


def may_change(default: Any = MISSING, **metadata: Any) -> Any:
    """Return a dataclass field whose key may change when a run is resumed; any other key that
    changes makes another run, which needs another folder. Without a default the key is required.

    infinite: True for a number that may be infinite.
    """
    return field(default=default, metadata={MAY_CHANGE: True, **metadata})


def check_kinds(settings: Any, name: str) -> None:
    """Raise ValueError if a setting of a section is not of its kind. name: of the section."""
    for item in fields(settings):
        check_kind(f"{name}.{item.name}", getattr(settings, item.name), item.type)


def check_finite(settings: Any, name: str = "") -> None:
    """Raise ValueError if a number of a dataclass, its lists, mappings and sections is infinite or
    NaN, which passes comparisons such as `value < 0`. name: of the section, for the message.
    """
    for item in fields(settings):
        key, value = f"{name}{item.name}", getattr(settings, item.name)
        if is_dataclass(value):
            check_finite(value, f"{key}.")
            continue
        several = [*value.values()] if isinstance(value, Mapping) else value
        for number in several if isinstance(several, tuple | list) else (value,):
            wrong = math.isnan if INFINITE in item.metadata else _not_finite
            if isinstance(number, float) and wrong(number):
                raise ValueError(f"{key} is {value}; it must be finite")


def _not_finite(number: float) -> bool:
    return not math.isfinite(number)
