"""The kinds of records that a data folder can have, as its index says."""

from typing import NamedTuple


class RecordKind(NamedTuple):
    """packed: documents are joined and cut into rows; else a row is one record. tokenized: shards
    hold tokens, not text. tokenizer: the folder has one, since its tokens stand for text.
    """

    packed: bool = True
    tokenized: bool = True
    tokenizer: bool = True


RECORD_KINDS = {
    "text": RecordKind(),
    "raw": RecordKind(tokenized=False),
    "pairs": RecordKind(packed=False),  # source <eos> target <eos>
    "images": RecordKind(packed=False, tokenizer=False),  # a token a colour value, then <eos>
}
