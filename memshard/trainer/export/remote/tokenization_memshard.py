"""The tokenizer of an exported model, for transformers: its sentencepiece model."""

import os
import shutil
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

_SPACE_MARK = "\u2581"
"""Replaces a space inside pieces, so that character itself is encoded in bytes."""


class MemshardTokenizer(PreTrainedTokenizer):
    """Any string decodes back to itself, if the sentencepiece model is lossless, as memshard's
    are. A document begins after the model's <eos>, which is not added.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        eos, unknown = (
            self.pieces.id_to_piece(number)
            for number in (self.pieces.eos_id(), self.pieces.unk_id())
        )
        kwargs = {
            "eos_token": eos,
            "pad_token": eos,
            "unk_token": unknown,
            # The newest token of each row is then in the last column, where `generate`
            # looks for it.
            "padding_side": "left",
            **kwargs,
        }
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        size: int = self.pieces.vocab_size()
        return size

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each piece."""
        return {
            self.pieces.id_to_piece(number): number for number in range(self.vocab_size)
        } | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        tokens: list[str] = []
        for number, part in enumerate(text.split(_SPACE_MARK)):
            if number:
                tokens += [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()]
            tokens += self.pieces.encode(part, out_type=str)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        number: int = self.pieces.piece_to_id(token)
        return number

    def _convert_id_to_token(self, index: int) -> str:
        piece: str = self.pieces.id_to_piece(index)
        return piece

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces."""
        text: str = self.pieces.decode([self.pieces.piece_to_id(token) for token in tokens])
        return text

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        numbers = (
            [token_ids] if isinstance(token_ids, int) else [int(number) for number in token_ids]
        )
        text: str = self.pieces.decode(numbers)
        if skip_special_tokens:
            return text
        # sentencepiece decodes <eos> to nothing: decode what is between, and put it back.
        eos, parts = self.eos_token_id, [[]]  # type: ignore[var-annotated]
        for number in numbers:
            if number == eos:
                parts.append([])
            else:
                parts[-1].append(number)
        return str(self.eos_token).join(self.pieces.decode(part) for part in parts)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the sentencepiece model, and return its path."""
        file = os.path.join(
            save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model"
        )
        if os.path.abspath(file) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, file)
        return (file,)
