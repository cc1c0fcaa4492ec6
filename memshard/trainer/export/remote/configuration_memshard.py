"""The configuration of an exported model, for transformers."""

from typing import Any

from transformers import PreTrainedConfig


class MemshardConfig(PreTrainedConfig):
    """model: section `model` of the recipe. memshard: training step and dtype of the tables."""

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
