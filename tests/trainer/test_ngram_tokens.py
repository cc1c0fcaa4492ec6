"""What a run takes from the data's tokenizer for its n-grams."""

from pathlib import Path

import pytest

from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.models.ngram.token_map import fold
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.config.load import load_recipe
from memshard.trainer.set_up import resolve
from tests.trainer.tiny_run import prepare, train_run

MAPPED = (
    "model.memory.layers=[]",
    "model.ngram.layers=[0]",
    "model.ngram.rows=20",
    "model.ngram.heads=2",
    "model.ngram.token_map=text",
)


def test_texts_of_tokens_are_what_decoding_gives(data: Path) -> None:
    tokenizer = Tokenizer(data)
    texts = tokenizer.texts()
    assert len(texts) == tokenizer.vocab_size
    assert texts[0] is None and texts[tokenizer.eos_id] is None and texts.count(None) == 258
    for token, text in enumerate(texts):
        assert text is None or tokenizer.decode([token]) == text


def test_a_run_maps_tokens_by_their_text(data: Path, recipe: Path, tmp_path: Path) -> None:
    """In the run, and in the model that is loaded from its checkpoint."""
    texts = Tokenizer(data).texts()
    train_run(recipe, tmp_path / "run", *MAPPED, "train.steps=1", "model.vocab_size=305")
    loaded = load_model(tmp_path / "run")
    for model in (
        prepare(recipe, tmp_path / "other", *MAPPED, "model.vocab_size=305").model,
        loaded.model,
    ):
        assert model.window is not None and model.window.token_map is not None
        ids = model.window.token_map.tolist()
        assert len(ids) == 305 and len({*ids}) == loaded.recipe.model.ngram.token_ids < 305
        for token, text in enumerate(texts):
            for other, same in enumerate(texts[:token]):
                folded = text is not None and same is not None and fold(text) == fold(same)
                assert (ids[token] == ids[other]) == folded, (text, same)


def test_padding_and_number_of_ids_are_those_of_the_map(data: Path, recipe: Path) -> None:
    ngram = resolve(load_recipe(recipe, (*MAPPED, "model.ngram.rule=qwen"))).model.ngram
    assert ngram.eos == Tokenizer(data).eos_id == ngram.padding
    plain = resolve(load_recipe(recipe, (*MAPPED, "model.ngram.token_map=none"))).model.ngram
    assert plain.token_ids is None and plain.pad is None and plain.eos == ngram.eos
    with pytest.raises(ValueError, match="token_ids is 300, and model.ngram.token_map leaves"):
        resolve(load_recipe(recipe, (*MAPPED, "model.ngram.token_ids=300")))
    again = (*MAPPED, f"model.ngram.token_ids={ngram.token_ids}")
    assert resolve(load_recipe(recipe, again)).model.ngram.token_ids == ngram.token_ids
