"""Revive the dead rows of a memory by splitting its hottest sub-keys."""

from collections.abc import Iterable

import torch
from torch import Tensor

from memshard.models.memory.product_key import ProductKeyMemory, row_slots, slot_rows
from memshard.models.memory.table import ValueTable
from memshard.models.random import fold, normal_at
from memshard.trainer.optim.rows.adam import RowAdam

# Share of a sub-key's length. Of 1,024 slots a memory read 69 % with 0.1 and with 0.25, 66 % with
# 0.5, 48 % with 1, and 52 % without revival.
_KEY_NOISE = 0.25
# Share of an initial value: outputs hardly change, and two equal rows can part.
_VALUE_NOISE = 0.02
_BLOCK_ROWS = 4096


@torch.no_grad()
def revive(
    memories: Iterable[ProductKeyMemory], optimizer: RowAdam, dead_after: int, seed: int
) -> None:
    """Revive, every `dead_after` steps of a table, the rows that none of these steps read.

    All ranks call it after each step. A row is dead because its sub-keys are never selected, so a
    new value alone would not help it. In each head and half, dead sub-keys (lowest number first)
    move next to hot ones (hottest first, each once, those read more than the average): equal but
    for noise of a quarter of their length. Queries that select the hot sub-key now select both, and
    the two part as they learn. The dead rows of a moved sub-key get the values that the hot one has
    with the same partner, plus a little noise, and fresh moments, so that outputs change little;
    rows that others read keep their values. A dead row whose sub-keys are both read is left alone:
    to move them would take their other rows from their readers.

    memories: with `key_use`. Every draw depends on (seed, step, sub-key or row) alone.
    """
    readers: dict[ValueTable, list[ProductKeyMemory]] = {}
    for memory in memories:
        readers.setdefault(memory.values, []).append(memory)
    for number, (values, sharing) in enumerate(readers.items()):
        step = optimizer.state[values.anchor]["step"]
        if not step or step % dead_after:
            continue
        key = fold(seed, step, number)
        sources = torch.arange(
            sharing[0].sub_keys.weight.shape[2], device=sharing[0].sub_keys.weight.device
        ).repeat(2, 1)
        for reader, memory in enumerate(sharing):
            _split_hot_keys(memory, step, step - dead_after, fold(key, reader), sources)
        for part, table in enumerate(sharing[0].tables):
            _copy_rows(
                table,
                optimizer,
                step - dead_after,
                # Negative, apart from the readers' keys, which count from 0.
                fold(key, -1 - part),
                sources.to(table.weight.device),
            )


def _split_hot_keys(
    memory: ProductKeyMemory, step: int, horizon: int, seed: int, sources: Tensor
) -> None:
    """Move dead sub-keys of a memory next to hot ones, and note in `sources` where they came from.

    sources: [2, keys], for each half; the first reader of a table that moves a sub-key decides.
    """
    use = memory.key_use
    assert use is not None
    weight = memory.sub_keys.weight.data
    heads, _, keys, dim = weight.shape
    for place in range(2 * heads):
        head, half = divmod(place, 2)
        sub_keys, share, last = weight[head, half], use.share[head, half], use.last_read[head, half]
        dead = (last <= horizon).nonzero().flatten()
        order = share.argsort(descending=True, stable=True)
        hot = order[(share[order] > 1 / keys) & (last[order] > horizon)]
        count = min(len(dead), len(hot))
        dead, hot = dead[:count], hot[:count]
        noise = (
            normal_at(seed, place * keys + dead, dim)
            * sub_keys[hot].square().mean(1, keepdim=True).sqrt()
        )
        sub_keys[dead] = sub_keys[hot] + _KEY_NOISE * noise.to(sub_keys.dtype)
        # From now on the two share the hot one's readers.
        share[hot] /= 2
        share[dead] = share[hot]
        last[dead] = step
        # A sub-key that an earlier reader of the table has moved keeps that source.
        first = sources[half, dead] == dead
        sources[half, dead[first]] = hot[first]


def _copy_rows(
    table: ValueTable, optimizer: RowAdam, horizon: int, seed: int, sources: Tensor
) -> None:
    """Copy to dead rows the values of the live rows that their sub-keys' sources have.

    Dead rows are only written and live ones only read, so the order of blocks does not matter.
    """
    state, keys = optimizer.state[table.anchor], sources.shape[1]
    last, values = state["last_step"], state.get("master", table.weight)
    columns = slice(table.local_columns.start, table.local_columns.stop)
    # As many rounds on every rank, since gather_rows is a collective.
    for first in range(0, table.max_local_rows, _BLOCK_ROWS):
        here = torch.arange(
            min(first, len(last)), min(first + _BLOCK_ROWS, len(last)), device=last.device
        )
        slots = row_slots(here + table.first_row, keys)
        wanted = slot_rows(sources[0, slots // keys], sources[1, slots % keys], keys)
        dead = (last[here] <= horizon) & (wanted != here + table.first_row)
        here, wanted = here[dead], wanted[dead]
        alive = table.gather_rows(last, wanted) > horizon
        here, wanted = here[alive], wanted[alive]
        # The whole row is drawn and then cut, so the split of columns does not change the draw.
        noise = normal_at(seed, here + table.first_row, table.dim)[:, columns] * (
            _VALUE_NOISE * table.dim**-0.5
        )
        values[here] = (table.gather_rows(values, wanted) + noise).to(values.dtype)
        table.weight[here] = values[here].to(table.weight.dtype)
        for name in ("exp_avg", "exp_avg_sq", "row_step"):
            if name in state:
                state[name][here] = 0
