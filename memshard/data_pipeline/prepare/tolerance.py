"""How much of what is read may be bad, and is left out, before something else must be wrong."""

_FEW, _SHARE = 10, 0.01


def too_many(bad: int, seen: int) -> bool:
    """Return whether that many bad lines or images of `seen` are more than 10 and 1 % of them."""
    return bad > _FEW + _SHARE * seen
