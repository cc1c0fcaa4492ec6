"""Rows of n-grams are those of the public references."""

import argparse
from pathlib import Path

import pytest

from memshard.bench import ngram_hash


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ngram_hash.add_arguments(parser)
    return parser.parse_args([*words, "--rounds=1", "--batch=2", "--length=40"])


@pytest.mark.parametrize("order", [2, 3, 4])
def test_rows_are_those_of_transformers_qwen(order: int) -> None:
    """With ends of documents, and a vocabulary whose multipliers come to the edge of 64 bits."""
    pytest.importorskip("transformers.models.qwen4_exp")
    result = ngram_hash.run(_arguments(f"--order={order}", "--vocabulary=500", "--rows=9"))
    assert result["qwen"]["rows"] == 80 * (order - 1) * 8
    assert result["qwen"]["different"] == 0


def test_a_folder_without_the_demo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engram_demo_v1.py is no file: give a checkout of"):
        ngram_hash.run(_arguments("--reference", str(tmp_path)))


def test_made_up_words_differ_and_fold() -> None:
    words = ngram_hash._words(2000)
    assert len({*words}) == 2000
    assert ngram_hash.fold_text(words)[1] < 1700
