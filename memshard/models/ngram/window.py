"""The ids that the n-grams ending at each token are made of. All here works on torch tensors and on
numpy arrays alike, so that what loads data can know rows before a model does.
"""

from typing import Any

import torch


def windows(tokens: Any, order: int, begins: Any = None, before: Any = None) -> Any:
    """Return [batch, length, order] int64, whose last dimension has the id of the token itself,
    then of those 1, 2 ... places back; -1 where there is none.

    tokens: [batch, length] int64; -1 is no token, and nothing behind one is seen. begins: [batch,
    length] bool, True where a document begins, so that nothing older is seen. before: [batch,
    order - 1], the ids before the first token, oldest first, -1 where there is none.
    """
    arrays, length = _namespace(tokens), tokens.shape[1]
    hidden, columns = tokens < 0, [tokens]
    for back in range(1, order):
        column = arrays.full_like(tokens, -1)
        column[:, back:] = tokens[:, : max(length - back, 0)]
        if before is not None:
            newest = before.shape[1] - back
            column[:, :back] = before[:, newest : newest + length]
        if begins is not None:
            # The tokens since then, this one included, may not begin a document: one more each
            # time round.
            hidden[:, back - 1 :] |= begins[:, : max(length - back + 1, 0)]
        hidden = hidden | (column < 0)
        columns.append(arrays.where(hidden, -1, column))
    return arrays.stack(columns, -1)


def document_begins(
    tokens: Any, eos: int | None = None, documents: Any = None, padding: Any = None
) -> Any:
    """Return [batch, length] bool: True for a token after `eos`, for one of another document than
    the token before it, and where padding begins or ends; False for the first.

    tokens: [batch, length] int64. documents: [batch, length], a number of each token's document.
    padding: [batch, length] bool, which tokens are padding, or which are not.
    """
    arrays = _namespace(tokens)
    begins = arrays.zeros_like(tokens, dtype=arrays.bool)
    if eos is not None:
        begins[:, 1:] |= tokens[:, :-1] == eos
    for labels in (documents, padding):
        if labels is not None:
            begins[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return begins


def _namespace(tokens: Any) -> Any:
    """Return the module of the tokens' functions, torch or numpy, whose names agree here."""
    return torch if isinstance(tokens, torch.Tensor) else tokens.__array_namespace__()
