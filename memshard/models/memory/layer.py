"""What all layers that read value tables have in common."""

from typing import ClassVar

import torch
from torch import nn

from memshard.models.memory.table import ValueTable


class MemoryLayer(nn.Module):
    """A layer that reads `tables`, which learn only as long as the layer does."""

    section: ClassVar[str] = "memory"
    """The section of a model's settings that describes the tables."""

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """The tables that the layer reads."""
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """Whether any of the layer's own weights needs a gradient; hidden tables learn only then.

        Adapters that wrap its matrices are not its own.
        """
        own = self._own_weights()
        if not own:
            # FSDP1 shows no weights at all; where adapters wrap all parts, there are theirs.
            return not any(True for part in self._parts() for _ in part.parameters())
        return any(weight.requires_grad for weight in own)

    def prepare_tables(self) -> None:
        """Tell the tables whether the layer learns, and settle the reads of earlier passes; before
        each read.
        """
        for table in self.tables:
            table.layer_learns = self.learns
            if table.hidden and table.reads and torch.is_grad_enabled():
                table.settle_reads(self._own_weights())

    def _parts(self) -> list[nn.Module]:
        return [part for part in self.children() if not isinstance(part, ValueTable)]

    def _own_weights(self) -> list[nn.Parameter]:
        parts = [self, *self._parts()]
        return [weight for part in parts for weight in part.parameters(recurse=False)]
