"""The DNAs of known models: a search starts from one, and tests of compiling use them."""

from typing import Any

from memshard.search.dna.form import VERSION, Dna, Instruction

HEAD_WIDTH = 64

_HEAD, _STREAM, _HIDDEN = 1, 0, 2
_ZERO, _SCORE_SCALE = 0, 1


def golden(name: str, head_width: int = HEAD_WIDTH) -> Dna:
    """Return the DNA of "transformer", "transformer-pp", "primer-ez" or "primer".

    Eight heads of relative width 1, a stream of 8 and a hidden layer of 32. head_width: channels of
    a head once compiled; scores are scaled by its inverse root, and at other widths they only start
    on another scale. Primer-EZ is two inserts from the Transformer. Transformer++ has RMS norm and
    a SwiGLU of relative width 24, the nearest width in the vocabulary to 8/3 of the stream. Primer
    computes a head's queries from its keys, and has Primer's norm, which it puts after the
    feedforward.
    """
    if name not in NAMES:
        raise ValueError(f"no DNA is called {name!r}; there are {', '.join(NAMES)}")
    lines = {key: [dict(line) for line in body] for key, body in _transformer().items()}
    dims = [8, 1, 32, 4, 16, 2]
    if name in ("primer", "primer-ez"):
        # Primer's two inserts: a depthwise convolution after each head's projection
        # (multi-DConv-head attention), and the square after ReLU.
        lines["head"].append(_line("DCONV_3X1", 2))
        lines["relu"].append(_line("SQUARE", 2))
    if name == "primer":
        # Keys are made first, then queries from them; the norm is (x - mu) / root(mean(x
        # (x - mu))).
        lines["attention"][:2] = [_line("head", 0), _line("CONV_1X1", 2, dim=_HEAD)]
        lines["attention"][3] = _line("T_MAT_MUL", 3, 2)
        lines["z-score"][2] = _line("MULTIPLY", 0, 3)
        lines["main"][4:6] = [_line("feedforward", 5), _line("norm", 6)]
    if name == "transformer-pp":
        # SwiGLU has three matrices for two: equal parameters at 2/3 of 32, 21.3. 24 is the nearest
        # width that there is.
        dims[_HIDDEN] = 24
        lines["z-score"] = [
            _line("SQUARE", 0),
            _line("RED_MEAN", 2),
            _line("ABS_ROOT", 3),
            _line("DIVIDE", 0, 4),
        ]
        lines["norm"] = [_line("z-score", 0), _line("SCALE", 2)]
        # Left unused, it would only take draws of the mutations.
        del lines["scale and shift"]
        lines["feedforward"][1:] = [
            _line("SIGMOID", 2),
            _line("MULTIPLY", 2, 3),
            _line("CONV_1X1", 0, dim=_HIDDEN),
            _line("MULTIPLY", 4, 5),
            _line("CONV_1X1", 6, dim=_STREAM),
        ]
        del lines["relu"]
    # Names become numbers. The order above matters: a subprogram may only call later ones.
    order = list(lines)
    for body in lines.values():
        for line in body:
            line["op"] = {"sub": order.index(line["op"])} if line["op"] in order else line["op"]
    return {
        "version": VERSION,
        "subprograms": list(lines.values()),
        "constants": [0.0, head_width**-0.5],
        "dims": dims,
    }


NAMES = ("transformer", "transformer-pp", "primer-ez", "primer")


def _line(op: str, first: int, second: int = 0, **fields: Any) -> Instruction:
    return {"op": op, "in": [first, second], "const": 0, "dim": 0, "branch": 1, **fields}


def _transformer() -> dict[str, list[Instruction]]:
    """Return subprograms cut along concepts, as in the paper: mutations change all uses of one."""
    return {
        "main": [
            _line("norm", 0),
            _line("attention", 2, branch=8),
            _line("CONV_1X1", 3, dim=_STREAM),
            _line("residual", 0, 4),
            _line("norm", 5),
            _line("feedforward", 6),
            _line("residual", 5, 7),
        ],
        # Values 2, 3 and 4 are query, key and value.
        "attention": [
            _line("head", 0),
            _line("head", 0),
            _line("head", 0),
            _line("T_MAT_MUL", 2, 3),
            _line("C_MUL", 5, const=_SCORE_SCALE),
            _line("softmax", 6),
            _line("MAT_MUL", 7, 4),
        ],
        "feedforward": [
            _line("CONV_1X1", 0, dim=_HIDDEN),
            _line("relu", 2),
            _line("CONV_1X1", 3, dim=_STREAM),
        ],
        "head": [_line("CONV_1X1", 0, dim=_HEAD)],
        "softmax": [_line("EXP", 0), _line("MASK", 2), _line("RED_SUM", 3), _line("DIVIDE", 3, 4)],
        "norm": [_line("z-score", 0), _line("scale and shift", 2)],
        "z-score": [
            _line("RED_MEAN", 0),
            _line("DIFFERENCE", 0, 2),
            _line("SQUARE", 3),
            _line("RED_MEAN", 4),
            _line("ABS_ROOT", 5),
            _line("DIVIDE", 3, 6),
        ],
        "scale and shift": [_line("SCALE", 0), _line("SHIFT", 2)],
        "residual": [_line("ADD", 0, 1)],
        "relu": [_line("MAX", 0, const=_ZERO)],
    }
