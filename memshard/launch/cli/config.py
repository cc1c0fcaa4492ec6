"""`memshard config`: list bundled recipes, resolve a recipe, explain a key, compare two runs."""

import argparse
from typing import Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the `config` command."""
    parser = subparsers.add_parser(
        "config", help="recipes: list, show all settings, explain a key, compare two"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="print the bundled recipes, a line each")
    listing.set_defaults(run=run_list)

    show = actions.add_parser("show", help="print the whole recipe, defaults included")
    show.add_argument(
        "recipe", metavar="RECIPE", help="a bundled name, a YAML file or a run folder"
    )
    show.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as model.layers=12"
    )
    show.set_defaults(run=run_show)

    explain = actions.add_parser(
        "explain", help="print type, default and meaning of keys, and which may change on resume"
    )
    explain.add_argument(
        "key",
        nargs="?",
        default="",
        metavar="KEY",
        help="such as model.memory or model.memory.topk; all by default",
    )
    explain.set_defaults(run=run_explain)

    diff = actions.add_parser("diff", help="print the keys in which two recipes differ")
    diff.add_argument("a", metavar="A", help="a bundled name, a YAML file or a run folder")
    diff.add_argument("b", metavar="B", help="another one")
    diff.set_defaults(run=run_diff)


def run_list(args: argparse.Namespace) -> dict[str, Any]:
    """Print name and first sentence of the bundled recipes."""
    # Here, as in every command: `memshard --help` loads none of what commands need.
    from memshard.trainer.config.load import bundled, summary

    recipes = {name: summary(name) for name in bundled()}
    width = max(map(len, recipes))
    for name, text in recipes.items():
        print(f"{name:{width}}  {text}")
    return recipes


def run_show(args: argparse.Namespace) -> dict[str, Any]:
    """Print the recipe as YAML."""
    with usage_errors():
        from memshard.trainer.config.load import dump, load_recipe, to_dict

        recipe = load_recipe(args.recipe, args.overrides)
    print(dump(recipe), end="")
    return to_dict(recipe)


def run_explain(args: argparse.Namespace) -> dict[str, Any]:
    """Print type, default and meaning of the keys."""
    with usage_errors():
        from memshard.trainer.config.explain import explain, matching

        print(explain(args.key))
        return {
            key.name: {
                "type": key.type,
                "default": key.default,
                "may_change": key.may_change,
                "doc": key.doc,
            }
            for key in matching(args.key)
        }


def run_diff(args: argparse.Namespace) -> dict[str, Any]:
    """Print the keys that differ, with both values."""
    with usage_errors():
        from memshard.trainer.config.diff import diff
        from memshard.trainer.config.explain import show
        from memshard.trainer.config.load import load_recipe

        differences = diff(load_recipe(args.a), load_recipe(args.b))
    for key, left, right in differences:
        print(f"{key}: {show(left)} -> {show(right)}")
    return {key: [left, right] for key, left, right in differences}
