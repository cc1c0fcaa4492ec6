"""JSON for result files that are kept under version control."""

import json
from pathlib import Path
from typing import Any


def write(value: Any, file: Path) -> None:
    """Write a result as JSON, making its folder: a key a line, an array of numbers on one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(value) + "\n", encoding="utf-8")


def text(value: Any, indent: str = "") -> str:
    """Return the JSON of a value, with a line for each key of an object.

    Arrays take one line, unless there are objects in them: curves and pixels would otherwise make
    files of ten thousands of lines.
    """
    inner = f"{indent} "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(str(key))}: {text(item, inner)}" for key, item in value.items()]
        return _lines("{", items, "}", indent)
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return _lines("[", [text(item, inner) for item in value], "]", indent)
    return json.dumps(value, separators=(",", ":"))


def _lines(opening: str, items: list[str], closing: str, indent: str) -> str:
    separator = f"\n{indent} "
    return f"{opening}{separator}{f',{separator}'.join(items)}\n{indent}{closing}"
