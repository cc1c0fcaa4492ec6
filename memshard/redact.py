"""Text as others may read it: run folders, logs and trackers are shared, and addresses hold
passwords and signatures; and a terminal does what control sequences say.
"""

import re

_ADDRESS = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/'\"`]*@)?([^\s?'\"`]*)(\?[^\s'\"`]*)?"
)

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def spelled(text: str) -> str:
    """Return text with its control characters, but for tabs and line feeds, spelled out."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def without_secrets(text: str) -> str:
    """Return text without the users, passwords and queries of the addresses in it."""
    return _ADDRESS.sub(lambda match: match[1] + match[2] + ("?..." if match[3] else ""), text)


def shown(name: str) -> str:
    """Return the name of a source as others may see it: of a command, where any word may be a
    secret, nothing.
    """
    return "pipe:..." if name.startswith("pipe:") else without_secrets(name)
