"""Environment variables, checked: whoever sets them finds no other message."""

import os
from collections.abc import Mapping


def read_number(
    env: Mapping[str, str], name: str, default: str | None = None, least: int = 0
) -> int:
    """Return an environment variable, or its default where it is not set. ValueError if it is no
    number from `least` on: an empty RANK is a script's mistake, and not one process alone.
    """
    text = env[name] if default is None else env.get(name) or default
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < least:
        expected = f"a number from {least} on" if least else "a number"
        raise ValueError(
            f"the environment variable {name} is {text!r}; expected {expected}: correct or unset it"
        )
    return int(text)


def switch(name: str, value: str) -> bool:
    """Return whether an environment variable is `value`. ValueError if it is anything else."""
    text = os.environ.get(name, "")
    if text not in ("", value):
        raise ValueError(
            f"the environment variable {name} is {text!r}; expected {value!r}: correct or unset it"
        )
    return text == value
