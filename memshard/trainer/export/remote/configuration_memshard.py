"""The configuration of an exported model, for transformers."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedConfig


class MemshardConfig(PreTrainedConfig):
    """model: section `model` of the recipe. memshard: training step, dtype of the tables, hashes.

    ValueError if the model is not the one that was exported.
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
        digest = hashlib.sha256(json.dumps(self.model, sort_keys=True).encode()).hexdigest()
        if self.memshard.get("model_sha256", digest) != digest:
            raise ValueError("the model in config.json does not match its hash: export it again")
        super().__init__(**kwargs)
