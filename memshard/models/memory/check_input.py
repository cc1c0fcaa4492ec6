"""Errors in a user's words for tensors that a memory or a table cannot take."""

from typing import Any

import torch
from torch import Tensor


def kind_of(x: Any) -> str:
    """Return what something is, for a message: a tensor's dtype and shape, or a type."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_dtype(dtype: Any) -> None:
    """Raise TypeError unless it is None or a dtype in which weights can be trained."""
    trains = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if not (dtype is None or trains):
        raise TypeError(
            f"dtype is {dtype!r}; it is torch.float32, float64, bfloat16 or float16, or None"
        )


def check_padding(padding: Any, x: Tensor) -> None:
    """Raise TypeError or ValueError unless it is a mask of x's tokens. x: [..., dim].

    Whole numbers would be taken as positions, with other tokens' outputs.
    """
    if not (isinstance(padding, Tensor) and padding.dtype == torch.bool):
        raise TypeError(
            f"padding is a bool tensor, True for real tokens, not {kind_of(padding)}: of a mask of "
            "zeros and ones, pass attention_mask.bool()"
        )
    if padding.shape != x.shape[:-1]:
        raise ValueError(
            f"padding is {list(padding.shape)} and the input {list(x.shape)}: padding has one "
            "number for each token"
        )


def check_reads(rows: Tensor, fits: bool, other: Tensor) -> None:
    """Raise ValueError unless rows are [tokens, reads] whole numbers, with which `other` fits."""
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if not (whole and rows.dim() == 2 and fits):
        raise ValueError(
            "rows are integers [tokens, reads], with weights [tokens, reads] or vectors "
            f"[tokens, dim]; these are {kind_of(rows)} with {kind_of(other)}"
        )
