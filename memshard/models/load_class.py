"""Classes by their import path, so that a registry of kinds loads no torch."""

import pkgutil
from typing import Any


def load_class(path: str) -> Any:
    """Import and return the class at "package.module:Class"."""
    return pkgutil.resolve_name(path)
