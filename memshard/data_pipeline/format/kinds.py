"""The kinds of records that a data folder can have, as its index says, and orders of texts."""

from typing import Literal, NamedTuple

Order = Literal["auto", "contiguous", "shuffled", "best-fit"]
"""Orders of training sequences (data.order); stream/order/ has them. Of records it is auto."""


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
