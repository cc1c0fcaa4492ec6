"""JSON for result files that are kept under version control."""

import json
from pathlib import Path
from typing import Any

WIDTH = 100


def write(value: Any, file: Path) -> None:
    """Write a result as JSON, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(value) + "\n", encoding="utf-8")


def text(value: Any, indent: str = "") -> str:
    """Return the JSON of a value, with a key a line where an object does not fit on one.

    Arrays take one line, unless there are objects in them: curves and pixels would otherwise make
    files of ten thousands of lines.
    """
    inner = f"{indent} "
    if not _has_objects(value):
        return json.dumps(value, separators=(",", ":"))
    line = json.dumps(value)
    if len(indent) + len(line) <= WIDTH:
        return line
    if isinstance(value, dict):
        items = [f"{json.dumps(str(key))}: {text(item, inner)}" for key, item in value.items()]
        return _lines("{", items, "}", indent)
    return _lines("[", [text(item, inner) for item in value], "]", indent)


def _has_objects(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_objects(item) for item in value)
    return isinstance(value, dict)


def _lines(opening: str, items: list[str], closing: str, indent: str) -> str:
    separator = f"\n{indent} "
    return f"{opening}{separator}{f',{separator}'.join(items)}\n{indent}{closing}"
