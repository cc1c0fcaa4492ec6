"""Rows as parts of documents, which are read all at once."""

from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """Parts of documents in rows; arrays int64 [parts] in the order of rows, but for the first two.

    begins [rows + 1]: each row's first part. predicted [rows]: tokens that it predicts. documents:
    their numbers, or places in a stream. sources: first token in the document. sizes: tokens.
    spans: places in the row, which are more than the tokens where padding follows.
    """

    begins: np.ndarray
    predicted: np.ndarray
    documents: np.ndarray
    sources: np.ndarray
    sizes: np.ndarray
    spans: np.ndarray


def cut(starts: np.ndarray, begins: np.ndarray, width: int) -> Parts:
    """Return rows of `width` tokens cut out of documents that are joined end to end.

    starts: int64 [documents + 1], where each document begins; begins: int64 [n], where each row
    does, before the end of the last document. Rows are padded behind it. A part's document is its
    place in `starts`.
    """
    ends = np.minimum(begins + width, starts[-1])
    first = np.searchsorted(starts, begins, side="right") - 1
    counts = np.searchsorted(starts, ends, side="left") - first
    stops = np.cumsum(counts)
    heads, tails = stops - counts, stops - 1
    documents = np.arange(stops[-1]) + np.repeat(first - heads, counts)
    part_begins, part_ends = starts[documents], starts[documents + 1]
    sources = np.zeros_like(documents)
    sources[heads] = begins - part_begins[heads]
    part_ends[tails] = ends
    sizes = part_ends - part_begins - sources
    part_ends[tails] = begins + width
    return Parts(
        np.concatenate([[0], stops]),
        np.full(len(begins), width - 1),
        documents,
        sources,
        sizes,
        part_ends - part_begins - sources,
    )


def take(parts: Parts, rows: np.ndarray) -> Parts:
    """Return the parts of some rows."""
    starts = parts.begins[rows]
    counts = parts.begins[rows + 1] - starts
    begins = np.concatenate([[0], np.cumsum(counts)])
    chosen = np.arange(begins[-1]) + np.repeat(starts - begins[:-1], counts)
    return Parts(begins, parts.predicted[rows], *(field[chosen] for field in parts[2:]))


def take_range(parts: Parts, first: int, stop: int) -> Parts:
    """Return the parts of rows first to stop - 1, without copies."""
    begins = parts.begins[first : stop + 1]
    begin, end = begins[0], begins[-1]
    return Parts(
        begins - begin, parts.predicted[first:stop], *(field[begin:end] for field in parts[2:])
    )


def join(plans: list[Parts]) -> Parts:
    """Return the rows of all plans, one after the other."""
    if len(plans) == 1:
        return plans[0]
    offsets = np.cumsum([0] + [plan.begins[-1] for plan in plans])
    begins = [plan.begins[:-1] + offset for plan, offset in zip(plans, offsets, strict=False)]
    return Parts(
        np.concatenate([*begins, offsets[-1:]]),
        *(np.concatenate(fields) for fields in zip(*(plan[1:] for plan in plans), strict=True)),
    )
