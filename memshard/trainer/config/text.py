"""Read and write YAML as people expect: 1e-3 is a number, yes is text, duplicate keys are errors.

YAML 1.1, which PyYAML speaks, reads 1e-3 as text, yes as true, 010 as 8 and 1:30 as 90.
"""

import re
from itertools import chain
from typing import Any

import yaml

FLOAT = re.compile(
    # No digit can be part of two repetitions: 60,000 of them and a letter took a minute.
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


_MOST_DIGITS = 1000
_MOST_NODES = 100_000
"""The longest recipe has some 300 values."""
MOST_BYTES = 1 << 20
"""Of a recipe, whose few kilobytes take milliseconds; 1 MiB takes PyYAML some 3 s."""


# A separate table of resolvers: PyYAML's is shared by all loaders of the process.
class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        # "\0" and "\ud800", which YAML can spell, no file has in its name or its text.
        if re.search(r"[\0\ud800-\udfff]", getattr(event, "value", "")):
            raise yaml.composer.ComposerError(
                None, None, f"{event.value!r} is no text", event.start_mark
            )
        # Values are what they look like. PyYAML's constructors of types that are asked for by name
        # make bytes, dates and sets, or raise whatever a wrong text makes them.
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(
                None, None, f"{event.tag} asks for a type: write the value alone", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is not a key: keys are words", key_node.start_mark
                )
            # SafeLoader itself would silently keep the last of two equal keys.
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice in one section", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _MOST_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value):,} digits", node.start_mark
        )
    return int(node.value.replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this reading of YAML, or YAML 1.1, would take for another type."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list,
    lambda dumper, values: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", values, flow_style=True
    ),
)


def parse(text: str, source: str) -> Any:
    """Return the value of YAML text. ValueError with the line; `source` names the text in it."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{source}: {len(text):,} characters, too many for a recipe")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise ValueError(
                f"{source}: more than {_MOST_NODES:,} values, counted as often as *aliases name "
                "them: write them out"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise ValueError(
            f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Return how many values a node holds, counted once for each alias. RecursionError if it holds
    itself.
    """
    # Aliases are shared in memory, but whoever walks through the values meets each of them: nine
    # lists of nine aliases each, one of the other, are a billion.
    if node not in sizes:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = chain.from_iterable(
            child if isinstance(child, tuple) else (child,) for child in children
        )
        sizes[node] = 1 + sum(_size(child, sizes) for child in inside)
    return sizes[node]


def render(values: dict[str, Any]) -> str:
    """Return YAML text that `parse` reads back as equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
