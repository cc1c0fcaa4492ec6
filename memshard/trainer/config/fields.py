"""Mark the keys of a recipe that may change when a run is resumed."""

from dataclasses import MISSING, field
from typing import Any

MAY_CHANGE = "may_change"


def may_change(default: Any = MISSING, **metadata: Any) -> Any:
    """Return a dataclass field whose key may change when a run is resumed; any other key that
    changes makes another run, which needs another folder. Without a default the key is required.
    """
    return field(default=default, metadata={MAY_CHANGE: True, **metadata})
