"""`memshard launch`: start a recipe through one of the launchers, or print what would start it."""

from importlib import import_module

from memshard.launch.cli.parser import Subparsers, add_allow
from memshard.launch.launchers.kinds import LAUNCHERS


def add_parser(subparsers: Subparsers) -> None:
    """Add the command, with a subcommand for each launcher."""
    parser = subparsers.add_parser(
        "launch", help="start on this machine, on hosts over ssh, or through SLURM"
    )
    how = parser.add_subparsers(dest="how", metavar="HOW", required=True, parser_class=type(parser))
    for name, launcher in LAUNCHERS.items():
        # These files load neither torch nor pydantic, so --help of any command stays quick.
        module = import_module(launcher.module)
        command = how.add_parser(name, help=launcher.help)
        command.add_argument(
            "recipe",
            metavar="RECIPE",
            help="a YAML file, a bundled recipe (memshard config list shows them), or a run folder",
        )
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key=value",
            help="settings that override the recipe's",
        )
        command.add_argument(
            "--run", dest="folder", metavar="DIR", help="the run's folder (default runs/RECIPE)"
        )
        command.add_argument(
            "--dry-run", action="store_true", help="print the command or script, start nothing"
        )
        add_allow(command)
        module.add_arguments(command)
        command.set_defaults(run=module.launch)
