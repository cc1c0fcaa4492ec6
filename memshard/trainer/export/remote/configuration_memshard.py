"""The configuration of an exported model, as transformers takes it."""

from typing import Any

from transformers import PreTrainedConfig


class MemshardConfig(PreTrainedConfig):
    """model: the sections of the recipe's `model`. memshard: of the export: training step, dtype of
    the tables.
    """

    model_type = "memshard"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        memshard: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = model or {}
        self.memshard = memshard or {}
        super().__init__(**kwargs)
