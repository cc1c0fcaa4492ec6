"""An exported model for transformers: AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True) loads it.
"""

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.memory.disk_table import MappedTable, replace_tables
from memshard.models.memory.product_key import row_slots
from memshard.models.memory.table import ValueTable, find_tables
from memshard.models.transformer import Transformer
from memshard.trainer.export.remote.configuration_memshard import MemshardConfig

_IGNORE = -100  # transformers' own convention for labels


class SlotTable(ValueTable):
    """A table as exports hold it, of product keys in slot order, i1 * keys + i2; trainable like any
    parameter.
    """

    def __init__(self, slots: int, dim: int, keys: int | None) -> None:
        super().__init__(slots, dim)
        self.keys = keys

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does."""
        return super().weighted_sum(_stored_at(rows, self.keys), weights)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does."""
        return super().dot(_stored_at(rows, self.keys), x)


class Int8Table(MappedTable):
    """A table as exports hold it whose rows are int8 times a scale; for inference."""

    def __init__(self, slots: int, dim: int, keys: int | None) -> None:
        super().__init__(slots, dim, self._dequantised)
        self.keys = keys
        self.weight = nn.Parameter(torch.empty(slots, dim, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(slots), requires_grad=False)

    def _dequantised(self, rows: Tensor) -> Tensor:
        slots = _stored_at(rows, self.keys).to(self.weight.device)
        return self.weight[slots].float() * self.scale[slots, None].float()


def _stored_at(rows: Tensor, keys: int | None) -> Tensor:
    return rows if keys is None else row_slots(rows, keys)


class MemshardForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder-only model with its head."""

    config_class = MemshardConfig
    main_input_name = "input_ids"
    # A row's scale in half precision would add its own error to that of int8.
    _keep_in_fp32_modules_strict = ["scale"]

    def __init__(self, config: MemshardConfig) -> None:
        super().__init__(config)
        settings = build(ModelConfig, config.model)
        self.model = Transformer(settings)
        table = Int8Table if config.memshard.get("tables") == "int8" else SlotTable
        new: dict[str, ValueTable] = {
            name: table(old.slots, old.dim, old.keys) for name, old in find_tables(self.model)
        }
        replace_tables(self.model, new)
        self._tied_weights_keys = _shared_weights(self)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` makes its own states."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: "States | None" = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Return logits [batch, length, vocabulary], the mean loss, and the states.

        input_ids: [batch, length], tokens that `past_key_values` has not seen. attention_mask:
        [batch, all], 0 for padding. labels: [batch, length], -100 where there is none. ValueError
        if the model has fewer positions.
        """
        states = past_key_values
        if states is None and use_cache and not self.training:
            states = States(self.model, input_ids[:, :0])
        if states is None:
            logits, _ = self.model(input_ids, self._context(input_ids, attention_mask, 0))
        else:
            fed, seen = states.take(input_ids)
            logits, states.layers = self.model(
                fed, self._context(fed, attention_mask, seen), states.layers
            )
            # When the states got more room, all tokens passed again; the caller asked about the
            # last ones.
            logits = logits[:, -input_ids.shape[1] :]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE
            )
        if return_dict is False:
            return (logits, states) if loss is None else (loss, logits, states)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=states)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: "States | None" = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` in each step of `generate`."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        use_cache = kwargs.get("use_cache")
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache if use_cache is not None else True,
        }

    def _context(self, input_ids: Tensor, attention_mask: Tensor | None, seen: int) -> Context:
        if attention_mask is None or bool(attention_mask.all()):
            ctx = Context.of(input_ids, seen)
        else:
            real = attention_mask.bool()
            # With padding on the left, positions count from the first real token.
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
            ctx = Context(positions=positions[:, seen:], padding=real[:, seen:])
        self.model.check_length(int(ctx.positions.max()) + 1)
        return ctx

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: modules draw their weights when they are built."""


class States:
    """The states of the mixers, and the tokens [batch, seen] that they have seen."""

    def __init__(self, model: Transformer, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.layers: list[Any] = []
        self.capacity = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.tokens.shape[1]

    def take(self, tokens: Tensor) -> tuple[Tensor, int]:
        """Return the tokens to pass to the model next, and how many the states
        have seen before them.

        If the states are full, these are all tokens from the start, and the states get room for
        twice as many: on average each token passes at most three times.
        """
        seen = self.tokens.shape[1]
        self.tokens = torch.cat((self.tokens, tokens), dim=1)
        if self.tokens.shape[1] <= self.capacity:
            return tokens, seen
        # Doubling: n tokens pass n + n/2 + n/4 + ... < 2 n times in restarts, and
        # once when they come.
        self.capacity = _room(self.tokens.shape[1])
        self.layers = self.model.init_states(len(self.tokens), self.capacity)
        return self.tokens, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be row beam_idx[i] from now on (beam search)."""
        self.tokens = self.tokens[beam_idx]
        self.layers = self.model.reorder(self.layers, beam_idx)


def build(kind: Any, values: dict[str, Any]) -> Any:
    """Return a configuration dataclass from nested dicts; lists become tuples."""
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name in known:
            arguments[name] = (
                build(hints[name], value)
                if is_dataclass(hints[name])
                else tuple(value)
                if isinstance(value, list)
                else value
            )
    return kind(**arguments)


def _room(length: int) -> int:
    """Return the smallest power of two from 64 on that is at least `length`."""
    return max(64, 1 << (length - 1).bit_length())


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Return later name -> first name of weights that occur several times."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
