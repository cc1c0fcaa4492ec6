"""Which ids an n-gram sees."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memshard.models.ngram.naive import naive_windows
from memshard.models.ngram.window import document_begins, windows

ARRAYS = pytest.mark.parametrize("array", [torch.tensor, np.array], ids=["torch", "numpy"])


@ARRAYS
def test_a_window_looks_back(array: Callable[[Any], Any]) -> None:
    assert windows(array([[5, 6, 7]]), 3).tolist() == [[[5, -1, -1], [6, 5, -1], [7, 6, 5]]]
    assert windows(array([[5, 6]]), 1).tolist() == [[[5], [6]]]


@ARRAYS
def test_a_document_sees_nothing_older(array: Callable[[Any], Any]) -> None:
    begins = array([[False, False, True, False]])
    assert windows(array([[5, 6, 7, 8]]), 3, begins).tolist() == [
        [[5, -1, -1], [6, 5, -1], [7, -1, -1], [8, 7, -1]]
    ]


@ARRAYS
def test_a_state_is_seen_unless_a_document_begins(array: Callable[[Any], Any]) -> None:
    tokens, before = array([[5, 6]]), array([[3, 4]])
    assert windows(tokens, 3, before=before).tolist() == [[[5, 4, 3], [6, 5, 4]]]
    begins = array([[False, True]])
    assert windows(tokens, 3, begins, before).tolist() == [[[5, 4, 3], [6, -1, -1]]]
    assert windows(tokens, 3, before=array([[-1, 4]])).tolist() == [[[5, 4, -1], [6, 5, 4]]]


@ARRAYS
def test_nothing_is_seen_behind_what_is_no_token(array: Callable[[Any], Any]) -> None:
    """Padding on the left and on the right, and a gap."""
    assert windows(array([[-1, 5, 6, -1, 7]]), 3).tolist() == [
        [[-1, -1, -1], [5, -1, -1], [6, 5, -1], [-1, -1, -1], [7, -1, -1]]
    ]
    assert windows(array([[5]]), 3, before=array([[3, -1]])).tolist() == [[[5, -1, -1]]]


@ARRAYS
def test_documents_begin_after_eos_at_other_numbers_and_at_padding(
    array: Callable[[Any], Any],
) -> None:
    tokens = array([[9, 5, 9, 9, 6]])
    assert document_begins(tokens).tolist() == [[False] * 5]
    assert document_begins(tokens, 9).tolist() == [[False, True, False, True, True]]
    documents = array([[0, 0, 1, 1, 0]])
    assert document_begins(tokens, None, documents).tolist() == [[False, False, True, False, True]]
    padding = array([[True, False, False, False, True]])
    assert document_begins(tokens, None, None, padding).tolist() == [
        [False, True, False, False, True]
    ]
    assert document_begins(tokens, 9, documents, padding)[0, 1:].all()


def test_eos_belongs_to_the_document_that_it_ends() -> None:
    tokens = torch.tensor([[5, 9, 6]])
    assert windows(tokens, 2, document_begins(tokens, 9)).tolist() == [[[5, -1], [9, 5], [6, -1]]]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_torch_numpy_and_plain_lists_agree(order: int, length: int) -> None:
    draw = random.Random(10 * order + length)
    for _ in range(30):
        tokens = [draw.choice([-1, 1, 2, 3, 4, 5]) for _ in range(length)]
        begins = [draw.random() < 0.3 for _ in range(length)]
        before = [draw.choice([-1, 1, 2, 3, 4, 5]) for _ in range(order - 1)]
        expected = [naive_windows(tokens, order, begins, before)]
        inputs = (np.array([tokens], int), np.array([begins], bool), np.array([before], int))
        ours = windows(inputs[0], order, *inputs[1:])
        assert ours.shape == (1, length, order) and ours.tolist() == expected
        tensors = [torch.from_numpy(value) for value in inputs]
        assert windows(tensors[0], order, *tensors[1:]).tolist() == expected


@pytest.mark.parametrize("cut", range(8))
def test_a_text_in_two_parts_sees_what_the_whole_sees(cut: int) -> None:
    tokens = torch.tensor([[1, 2, 9, 3, 4, 9, 9, 5]])
    begins = document_begins(tokens, 9)
    whole = windows(tokens, 3, begins)
    before = whole[:, cut - 1, :2].flip(-1) if cut else torch.full((1, 2), -1)
    rest = windows(tokens[:, cut:], 3, begins[:, cut:], before)
    assert torch.equal(rest, whole[:, cut:])


def test_later_tokens_change_no_earlier_window() -> None:
    tokens = torch.randint(5, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = 8
    for eos in (None, 3):
        a, b = (windows(t, 4, document_begins(t, eos)) for t in (tokens, changed))
        assert torch.equal(a[:, :7], b[:, :7])
