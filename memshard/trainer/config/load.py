"""From YAML files and command line overrides to a checked recipe, and back.

A recipe file may name one parent (`base: NAME_OR_PATH`, a path relative to the file) and states
only what differs. Later values win: ancestors, then the file, then overrides. Every error names the
file or override, and the key.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from memshard.data_pipeline.fetch import Allowed, check_allowed, needed
from memshard.io import read_small
from memshard.trainer.config.explain import SECTION, Key, fields, suggestion
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.config.text import MOST_BYTES, parse, render

BUNDLED = Path(__file__).parents[2] / "recipes"


class RecipeError(ValueError):
    """A recipe or an override cannot be used; the message names the key, and how to mend it."""


class Setting(NamedTuple):
    """A value and where it was written. typed: on the command line, as an override."""

    value: Any
    source: str
    typed: bool = False


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), allow: Allowed | None = "commands"
) -> Recipe:
    """Return the recipe of a YAML file, a bundled name or a run folder (its config.yaml), with
    `key=value` overrides.

    allow: what the files, and not the overrides, may ask for; only who goes on to train needs to
    limit it, since reading a recipe fetches nothing. RecipeError for whatever is wrong in a recipe
    or override, FileNotFoundError for a path that does not exist.
    """
    try:
        settings: dict[str, Setting] = {}
        for path, values in reversed(_lineage(_find(str(name_or_path), Path()))):
            # The file's ancestors come first, so what it says itself wins.
            settings.update(_flatten(values, "", str(path)))
        for override in overrides:
            settings.update(_override(override))
        recipe = _with_program(_build(settings, str(name_or_path)))
        _check_allowed(recipe, settings, allow)
        return recipe
    except ValueError as error:
        raise RecipeError(str(error)) from error


def needs(recipe: Recipe) -> Allowed | None:
    """Return what must be allowed before a file with this recipe is trained."""
    everything = [name for names in _fetched(recipe).values() for name in names]
    return needed(everything) or ("connections" if recipe.train.wandb else None)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested dicts, lists and scalars, as YAML and JSON have them."""
    # Through JSON, which turns tuples into lists, as YAML has them.
    values: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return values


def dump(recipe: Recipe) -> str:
    """Return the whole recipe as YAML with its defaults; `load_recipe` reads it back as equal."""
    return render(to_dict(recipe))


def bundled() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def summary(name: str) -> str:
    """Return the first sentence of the comment at the top of a bundled recipe."""
    lines = (BUNDLED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), lines))
    return re.split(r"(?<!et al)[.;](?: |$)", comment)[0]


def _find(name: str, beside: Path) -> Path:
    if name in bundled():
        return BUNDLED / f"{name}.yaml"
    path = beside / Path(name).expanduser()
    if path.is_dir():
        path /= "config.yaml"
    if path.is_file():
        return path
    if "/" in name or path.suffix:
        raise FileNotFoundError(f"there is no recipe file {path}")
    close = difflib.get_close_matches(name, bundled(), n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    raise ValueError(
        f"no recipe named '{name}'{hint} bundled ones: {', '.join(bundled()) or 'none'} "
        "(`memshard config list` says what they are); or give the path of a YAML file"
    )


def _lineage(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file, its base, the base of that, and so on, each with its own values."""
    lineage: list[tuple[Path, dict[str, Any]]] = []
    resolved: list[Path] = []
    while True:
        if path.resolve() in resolved:
            raise ValueError(
                "recipes are each other's base: "
                f"{' -> '.join(str(step) for step in [*(p for p, _ in lineage), path])}"
            )
        resolved.append(path.resolve())
        values = _read(path)
        base = values.pop("base", None)
        lineage.append((path, values))
        if base is None:
            return lineage
        if not isinstance(base, str):
            raise ValueError(f"{path}: base is {base!r}; expected the name or path of one recipe")
        try:
            path = _find(base, path.parent)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{path}: base: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_small(path, MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a recipe: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not a recipe: {error}") from error
    values = parse(text, str(path))
    if not isinstance(values, dict | None):
        raise ValueError(
            f"{path}: not a recipe: expected sections such as 'data:' and 'model:', found "
            f"{str(values)[:40]!r}"
        )
    return values or {}


def _override(text: str) -> Iterator[tuple[str, Setting]]:
    key, equals, value_text = text.partition("=")
    source = f"override '{text}'"
    if not equals or not key:
        raise ValueError(f"{source}: expected key=value, such as model.layers=12")
    value = parse(value_text, source)
    for part in reversed(key.split(".")):
        value = {part: value}
    for name, setting in _flatten(value, "", source):
        yield name, setting._replace(typed=True)


def _flatten(values: dict[str, Any], prefix: str, source: str) -> Iterator[tuple[str, Setting]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        known = _keys().get(name)
        if known is None:
            raise ValueError(f"{source}: unknown key '{name}'{suggestion(name)}")
        if known.type != SECTION:
            yield name, Setting(value, source)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}.", source)
        else:
            inside = next(entry.name for entry in fields() if entry.name.startswith(f"{name}."))
            raise ValueError(
                f"{source}: {name} is {value!r}; expected a section with keys such as {inside}"
            )


def _build(settings: dict[str, Setting], source: str) -> Recipe:
    nested: dict[str, Any] = {}
    for key in fields():
        *sections, last = key.name.split(".")
        place = nested
        for section in sections:
            place = place[section]
        if key.type == SECTION:
            place[last] = {}
        elif key.name in settings:
            place[last] = settings[key.name].value
    try:
        # Through JSON, whose strict mode takes lists for tuples and mappings for dataclasses, but
        # no "3" or 3.7 for an integer.
        return _adapter().validate_json(json.dumps(nested), strict=True)
    except ValidationError as error:
        raise _readable(error, settings, source) from None


def _check_allowed(recipe: Recipe, settings: dict[str, Setting], allow: Allowed | None) -> None:
    """Raise ValueError if a file, and not an override, asks for more than is allowed."""
    for key, names in _fetched(recipe).items():
        if key in settings and not settings[key].typed:
            for name in names:
                check_allowed(name, f"{settings[key].source}: {key}", allow)
    wandb = settings.get("train.wandb")
    if recipe.train.wandb and wandb is not None and not wandb.typed and allow is None:
        raise ValueError(
            f"{wandb.source}: train.wandb is {recipe.train.wandb!r}, which sends the run's numbers "
            "away; what files say does so only if the command line says --allow connections"
        )


def _fetched(recipe: Recipe) -> dict[str, list[str]]:
    """Return the names by key that a training fetches, if they are not local."""
    return {"data.path": [recipe.data.path], "data.mixture": list(recipe.data.mixture)}


def _with_program(recipe: Recipe) -> Recipe:
    """Return the recipe with its program's text in place of the file's name, so that runs and
    checkpoints need no other file.
    """
    name = recipe.model.program
    # A run's own config.yaml has the text already.
    if name is None or name.lstrip().startswith("{"):
        return recipe
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"model.program: there is no file {path}: give what `memshard search compile` wrote"
        )
    try:
        program = read_small(path, MOST_BYTES).decode().strip()
    except ValueError as error:
        raise ValueError(f"model.program: {path} is no program: {error}") from error
    return replace(recipe, model=replace(recipe.model, program=program))


def _readable(error: ValidationError, settings: dict[str, Setting], source: str) -> ValueError:
    """Return the first problem in one line; wrong types and missing keys come first."""
    # False sorts before True: the first error that is not about a value's range or combination.
    problem = min(error.errors(), key=lambda entry: entry["type"] == "value_error")
    if problem["type"] == "value_error":
        raised: ValueError = problem["ctx"]["error"]
        return raised
    # Below a key, the location goes on with list positions and the members of a union.
    paths = [".".join(map(str, problem["loc"][:end])) for end in range(1, len(problem["loc"]) + 1)]
    key = _keys()[next(path for path in reversed(paths) if path in _keys())]
    if key.name not in settings:
        return ValueError(
            f"{source}: {key.name} is required: {key.doc} Add it to the file, or to the command "
            f"as {key.name}=..."
        )
    value, where, _ = settings[key.name]
    return ValueError(
        f"{where}: {key.name} is {value!r} ({type(value).__name__}); expected {key.type}"
    )


@cache
def _keys() -> dict[str, Key]:
    return {key.name: key for key in fields()}


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)
