"""What n-gram memories need to know of the data's tokenizer."""

from dataclasses import replace

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.remote import local_copy
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer
from memshard.models.config import ModelConfig
from memshard.models.ngram.kinds import RULES
from memshard.models.ngram.token_map import fold_text


def resolve_ngrams(model: ModelConfig, path: str) -> ModelConfig:
    """Return the settings with what the tokenizer of a data folder decides: the token that ends
    documents, and under a token map the number of ids and the padding's. ValueError if there is no
    tokenizer to map, or another number is set.
    """
    ngram = model.ngram
    tokenizer = _tokenizer(path) if ngram.layers else None
    if tokenizer is not None and ngram.eos is None:
        ngram = replace(ngram, eos=tokenizer.eos_id)
    if ngram.layers and ngram.token_map != "none":
        ids, count = map_tokens(model, path)
        if ngram.token_ids not in (None, count):
            raise ValueError(
                f"model.ngram.token_ids is {ngram.token_ids}, and model.ngram.token_map leaves "
                f"{count:,} ids of the tokenizer of {path}: leave model.ngram.token_ids out"
            )
        if ngram.pad is None and ngram.eos is not None and RULES[ngram.rule].pad == "eos":
            # An id that is padding counts as mapped.
            ngram = replace(ngram, pad=ids[ngram.eos])
        ngram = replace(ngram, token_ids=count)
    return replace(model, ngram=ngram)


def map_tokens(model: ModelConfig, path: str) -> tuple[list[int], int]:
    """Return the id of each of the model's tokens in n-grams, and the number of ids. ValueError for
    a data folder without a tokenizer.
    """
    tokenizer = _tokenizer(path)
    if tokenizer is None:
        raise ValueError(
            f"model.ngram.token_map is {model.ngram.token_map}, and the tokens of {path} are no "
            "text: leave it out"
        )
    # Tokens that only the model has stay themselves.
    more = (model.vocab_size or tokenizer.vocab_size) - tokenizer.vocab_size
    return fold_text([*tokenizer.texts(), *[None] * more])


def _tokenizer(path: str) -> Tokenizer | None:
    """Return the tokenizer of a data folder; None where the data's tokens are no text."""
    index = load_index(path)
    if not index.records.tokenizer:
        return None
    return Tokenizer(local_copy(path, TOKENIZER_FILE, index.tokenizer_sha256))
