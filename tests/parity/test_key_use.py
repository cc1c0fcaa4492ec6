"""The key-balance gradient and the revival of dead rows, against loops that say what they do."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory, slot_rows
from memshard.models.memory.table import externalize_tables
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.optim.rows.revive import revive

HEADS, KEYS, TOPK = 2, 6, 2


def _memory(seed: int, kind: type[ProductKeyMemory] = ProductKeyMemory) -> ProductKeyMemory:
    torch.manual_seed(seed)
    memory = kind(5, keys=KEYS, heads=HEADS, topk=TOPK, key_dim=6, query_norm="layer")
    memory.key_use = KeyUse(HEADS, KEYS)
    memory.key_use.share = torch.rand(HEADS, 2, KEYS).softmax(-1)
    return memory


def _naive_balance(memory: ProductKeyMemory, share: Tensor, x: Tensor) -> Tensor:
    """Sum keys * sum_i share_i softmax(scores)_i over tokens, heads and halves one by one."""
    total = x.new_zeros(())
    for token in x:
        queries = memory.query_norm(memory.query(token[None]).unflatten(-1, (HEADS, -1)))[0]
        for head in range(HEADS):
            for half, query in enumerate(queries[head].chunk(2)):
                chosen = (memory.sub_keys.weight[head, half] @ query).softmax(-1)
                total = total + KEYS * (share[head, half] * chosen).sum()
    return total


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_the_balance_gradient_is_that_of_the_loss_however_tokens_are_split(
    kind: type[ProductKeyMemory], parts: int
) -> None:
    memory = _memory(0, kind).double()
    assert memory.key_use is not None
    memory.key_use.share = memory.key_use.share.double()
    plain = deepcopy(memory)
    plain.key_use = None
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    memory.key_use.balance = 0.3
    outputs = [memory(part) for part in x.chunk(parts)]
    for y in outputs:
        y.square().sum().backward()
    expected = plain(twin)
    assert (
        torch.equal(torch.cat(outputs), expected)
        if parts == 1
        else torch.allclose(torch.cat(outputs), expected)
    )
    (expected.square().sum() + 0.3 * _naive_balance(plain, memory.key_use.share, twin)).backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)
    theirs = dict(plain.named_parameters())
    for name, parameter in memory.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-10, atol=1e-10, msg=name
        )


def test_shares_and_last_reads_are_those_of_the_search() -> None:
    memory = _memory(1)
    use = memory.key_use
    assert use is not None
    share, last = use.share.clone(), use.last_read.clone()
    for step in (1, 2):
        reads = torch.zeros(HEADS, 2, KEYS)
        for _ in range(2):
            x = torch.randn(2, 5)
            rows = memory.lookup(x)[0].view(2, HEADS, TOPK)
            where = {
                int(slot_rows(torch.tensor(i1), torch.tensor(i2), KEYS)): (i1, i2)
                for i1 in range(KEYS)
                for i2 in range(KEYS)
            }
            for token in rows.tolist():
                for head, head_rows in enumerate(token):
                    for row in head_rows:
                        for half, sub_key in enumerate(where[row]):
                            reads[head, half, sub_key] += 1
        memory.eval()
        memory(torch.randn(3, 5))
        memory.train()
        use.commit(step)
        share = 0.9 * share + 0.1 * reads / (2 * 2 * TOPK)
        last[reads > 0] = step
        torch.testing.assert_close(use.share, share)
        assert torch.equal(use.last_read, last)
    memory(torch.randn(3, 5))
    use.discard()
    use.commit(3)
    torch.testing.assert_close(use.share, share)
    assert torch.equal(use.last_read, last)
    assert (last == 0).any()


@torch.no_grad()
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_revival_moves_dead_sub_keys_next_to_hot_ones_and_their_rows_with_them(
    kind: type[ProductKeyMemory],
) -> None:
    """Two readers share one table; every sub-key and every row is checked, one by one."""
    first, second = _memory(2, kind), _memory(3, kind)
    second.values = first.values
    tables = [first.values]
    if isinstance(first, Peer) and isinstance(second, Peer):
        second.down = first.down
        tables.append(first.down)
    readers = [first, second]
    externalize_tables(torch.nn.ModuleList(readers))
    optimizer = RowAdam(tables, semantics="row-step")
    for table in tables:
        state = optimizer.state[table.anchor]
        state["step"] = 20
        state["last_step"].copy_(torch.arange(36) % 20 + 1)
        for name in ("exp_avg", "exp_avg_sq", "row_step"):
            state[name].fill_(7)
    for memory in readers:
        assert memory.key_use is not None
        memory.key_use.last_read = torch.randint(1, 21, (HEADS, 2, KEYS)).float()
    before = deepcopy((readers, tables))
    old_states = [deepcopy(optimizer.state[table.anchor]) for table in tables]
    revive(readers, optimizer, dead_after=10, seed=5)

    sources: list[dict[int, int]] = [{}, {}]
    moved = 0
    for memory, old in zip(readers, before[0], strict=True):
        assert memory.key_use is not None and old.key_use is not None
        for head in range(HEADS):
            for half in (0, 1):
                share, last = (
                    old.key_use.share[head, half].tolist(),
                    old.key_use.last_read[head, half].tolist(),
                )
                dead = [i for i in range(KEYS) if last[i] <= 10]
                hot = sorted(
                    (i for i in range(KEYS) if last[i] > 10 and share[i] > 1 / KEYS),
                    key=lambda i: -share[i],
                )
                pairs = dict(zip(dead, hot, strict=False))
                moved += len(pairs)
                for i in range(KEYS):
                    now, source = (
                        memory.sub_keys.weight[head, half, i],
                        old.sub_keys.weight[head, half, pairs.get(i, i)],
                    )
                    distance = float((now - source).norm() / source.norm())
                    assert 0.02 < distance < 0.8 if i in pairs else distance == 0
                    halved = i in pairs or i in pairs.values()
                    assert float(memory.key_use.share[head, half, i]) == pytest.approx(
                        share[pairs.get(i, i)] / (1 + halved)
                    )
                    assert memory.key_use.last_read[head, half, i] == (
                        20 if i in pairs else last[i]
                    )
                for i, source_key in pairs.items():
                    sources[half].setdefault(i, source_key)
    assert moved > 4

    revived = 0
    for table, old_table, old_state in zip(tables, before[1], old_states, strict=True):
        state = optimizer.state[table.anchor]
        for i1 in range(KEYS):
            for i2 in range(KEYS):
                row = int(slot_rows(torch.tensor(i1), torch.tensor(i2), KEYS))
                j1, j2 = sources[0].get(i1, i1), sources[1].get(i2, i2)
                source = int(slot_rows(torch.tensor(j1), torch.tensor(j2), KEYS))
                if old_state["last_step"][row] <= 10 < old_state["last_step"][source]:
                    revived += 1
                    difference = (table.weight[row] - old_table.weight[source]).abs()
                    assert 0 < difference.max() < 0.1
                    assert (
                        not state["exp_avg"][row].any()
                        and not state["exp_avg_sq"][row].any()
                        and state["row_step"][row] == 0
                    )
                else:
                    assert torch.equal(table.weight[row], old_table.weight[row])
                    assert (
                        state["exp_avg"][row].eq(7).all()
                        and state["exp_avg_sq"][row].eq(7).all()
                        and state["row_step"][row] == 7
                    )
        assert torch.equal(state["last_step"], old_state["last_step"])
    assert 4 < revived < 60


def test_nothing_is_revived_between_times() -> None:
    memory = _memory(4)
    (table,) = externalize_tables(memory)
    optimizer = RowAdam([table])
    before = deepcopy(memory.state_dict())
    for step in (0, 9, 11):
        optimizer.state[table.anchor]["step"] = step
        revive([memory], optimizer, dead_after=10, seed=5)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())
