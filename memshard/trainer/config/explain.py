"""Explain recipe keys: type, default and docstring, read from the recipe's dataclasses."""

import difflib
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, is_dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from memshard.trainer.config.field_docs import field_docs
from memshard.trainer.config.fields import MAY_CHANGE
from memshard.trainer.config.recipe import Recipe

SECTION = "section"
_INDENTED = textwrap.TextWrapper(
    width=100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
)


class Key(NamedTuple):
    """One dotted key.

    type: `section` for a group of keys. default: text as YAML writes it, or `required`. may_change:
    whether a resumed run may have another value.
    """

    name: str
    type: str
    default: str
    doc: str
    may_change: bool = False


@cache
def fields() -> list[Key]:
    """Return all keys of a recipe, sections before their keys, in the order of the dataclasses."""
    return list(walk(Recipe, ""))


def matching(key: str = "") -> list[Key]:
    """Return a key, a section with all its keys, or everything. ValueError for an unknown key."""
    entries = [
        entry
        for entry in fields()
        if not key or entry.name == key or entry.name.startswith(f"{key}.")
    ]
    if not entries:
        raise ValueError(f"unknown key '{key}'{suggestion(key)}")
    return entries


def explain(key: str = "") -> str:
    """Return type, default and meaning of a key, a section or everything, as text."""
    blocks = []
    for entry in matching(key):
        facts = "required" if entry.default == "required" else f"default {entry.default}"
        facts += "; may change on resume" if entry.may_change else "; fixed for a run"
        head = (
            f"{entry.name} ({SECTION})"
            if entry.type == SECTION
            else f"{entry.name}: {entry.type}; {facts}"
        )
        blocks.append(f"{head}\n{_INDENTED.fill(entry.doc)}")
    return "\n".join(blocks)


def suggestion(key: str) -> str:
    """Return `; did you mean '...'?` for a misspelt or misplaced key, or nothing."""
    names = [entry.name for entry in fields()]
    section, _, last = key.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section
    }
    close = [siblings[match] for match in difflib.get_close_matches(last, siblings, n=1)]
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    # A typo within the section first, then the right name in a wrong section, then anything alike.
    guesses = close or elsewhere or difflib.get_close_matches(key, names, n=1)
    return f"; did you mean '{guesses[0]}'?" if guesses else ""


def show(value: Any) -> str:
    """Return a value as YAML writes it, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    return str(value)


def walk(cls: Any, prefix: str = "") -> Iterator[Key]:
    """Iterate over the keys of a dataclass whose fields have docstrings."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    for item in dataclass_fields(cls):
        name, hint, doc = prefix + item.name, hints[item.name], docs.get(item.name, "")
        if is_dataclass(hint):
            # A section without a text of its own is explained by its class.
            yield Key(name, SECTION, "", doc or " ".join((hint.__doc__ or "").split()))
            yield from walk(hint, f"{name}.")
        else:
            choices = item.metadata.get("choices", {}).items()
            doc = " ".join([doc, *(f"{choice}: {row.description}" for choice, row in choices)])
            may_change = MAY_CHANGE in item.metadata
            yield Key(name, _type_name(hint), _default(item), doc, may_change)


def _default(item: "Field[Any]") -> str:
    if item.default is not MISSING:
        return show(item.default)
    return "required" if item.default_factory is MISSING else show(item.default_factory())


def _type_name(hint: Any) -> str:
    """Return a type in words: integer, number, list [integer, ...], one of relu, gelu."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(show(arg) for arg in args)}"
    if origin in (Union, UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is dict:
        return f"mapping {{{': '.join(_type_name(arg) for arg in args)}}}"
    if origin is tuple:
        return f"list [{', '.join('...' if arg is Ellipsis else _type_name(arg) for arg in args)}]"
    return {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        NoneType: "null",
    }.get(hint, str(hint))
