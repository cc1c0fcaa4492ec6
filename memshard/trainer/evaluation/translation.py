"""Translate texts, and compute BLEU."""

from collections.abc import Sequence

import torch

from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.models.decode.beam import beam_search, padded
from memshard.models.seq2seq import EncoderDecoder
from memshard.trainer.precision import autocast
from memshard.trainer.tasks.translation import split_pairs

_ROWS = 64


def translate(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    dtype: torch.dtype = torch.float32,
    *,
    beam: int = 4,
    length_penalty: float = 1.0,
    batch: int = 32,
) -> list[str]:
    """Return the best translation of each text that beam search finds, in order.

    beam, length_penalty: see `beam_search`. batch: texts at a time, of similar length. A
    translation has at most 2 n + 10 tokens, n being those of the longest text of its batch.
    ValueError for an empty text, or one too long for the model's positions.
    """
    sources = [
        # As in training, where a record is source <eos> target <eos>.
        [*ids, tokenizer.eos_id]
        for ids in tokenizer.encode_batch([text.strip() for text in texts], threads=1)
    ]
    if empty := next((number for number, ids in enumerate(sources, 1) if len(ids) == 1), None):
        raise ValueError(f"text {empty} of {len(texts)} is empty: there is nothing to translate")
    device = model.embedding.weight.device
    limit = model.config.max_length if model.config.position in ("learned", "axial") else None
    # Similar lengths share a batch, so little of it is padding.
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    translations = [""] * len(sources)
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        longest = max(len(sources[number]) for number in numbers)
        most = min(2 * longest + 10, limit or 2 * longest + 10)
        with autocast(dtype, device):
            best = beam_search(
                model,
                *padded([sources[number] for number in numbers], tokenizer.eos_id),
                most,
                tokenizer.eos_id,
                beam,
                length_penalty,
            )
        for number, hypothesis in zip(numbers, best, strict=True):
            translations[number] = tokenizer.decode(hypothesis.tokens)
    return translations


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, float, str]:
    """Return corpus BLEU of detokenised text with one reference each, half the width of its 95 %
    interval (1,000 draws of the sentences), and sacrebleu's signature (Post 2018).

    ValueError if there are more texts than references or fewer, or without sacrebleu.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise ValueError("BLEU needs sacrebleu: pip install 'memshard[eval]'") from error
    if len(translations) != len(references):
        raise ValueError(
            f"{len(translations)} texts and {len(references)} references: give files with as many "
            "lines"
        )
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)], n_bootstrap=1000)
    return float(score.score), float(score._ci), str(metric.get_signature())


def held_out_texts(held_out: HeldOutRecords, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the held-out pairs as text: sources and references."""
    sources, references = [], []
    for first in range(0, held_out.windows, _ROWS):
        batch = held_out.batch(first, min(_ROWS, held_out.windows - first))
        source, real, _, targets = split_pairs(batch, tokenizer.eos_id)
        sources += [
            tokenizer.decode(row[keep].tolist()) for row, keep in zip(source, real, strict=True)
        ]
        # Padding after a target is IGNORE, -100.
        references += [tokenizer.decode(row[row >= 0].tolist()) for row in targets]
    return sources, references
