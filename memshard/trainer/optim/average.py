"""Running averages of a model's weights, hidden tables included."""

from contextlib import ExitStack

from torch import nn
from torch.optim import swa_utils

from memshard.models.memory.table import find_tables


class AveragedModel(swa_utils.AveragedModel):
    """torch's `AveragedModel`, with the same arguments, which averages hidden tables as well.

    torch's own sees parameters and buffers only. Each update reads and writes whole tables.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Bring the weights of `model`, which was copied at the beginning, into the average."""
        with ExitStack() as shown:
            for whole in (self.module, model):
                for _, table in find_tables(whole):
                    shown.enter_context(table.as_parameter())
            super().update_parameters(model)
