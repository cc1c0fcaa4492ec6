"""The serial part of the delta rule for all chunks in one launch; `delta_rule.plain_scan` has it in
torch, with two or three launches a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 32


@triton.jit
def scan_chunks(
    state,
    added,
    left,
    right,
    whole,
    befores,
    products,
    last,
    chunks,
    features,
    width,
    chunk,
    BACKWARD: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Take some columns of a head's state through its chunks, in registers. left: transposed."""
    head = tl.program_id(0).to(tl.int64)
    feature, token = tl.arange(0, FEATURES)[:, None], tl.arange(0, CHUNK)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    key = tl.arange(0, FEATURES)[None, :]
    in_state, in_chunk = (feature < features) & (column < width), (token < chunk) & (key < features)
    s = tl.load(state + (head * features + feature) * width + column, mask=in_state, other=0.0)
    for step in range(chunks):
        number = head * chunks + step
        if BACKWARD:
            number = head * chunks + chunks - 1 - step
        at_state = (number * features + feature) * width + column
        at_chunk = (number * chunk + token) * features + key
        tl.store(befores + at_state, s, mask=in_state)
        product = tl.dot(
            tl.load(right + at_chunk, mask=in_chunk, other=0.0), s, input_precision="ieee"
        )
        tl.store(
            products + (number * chunk + token) * width + column,
            product,
            mask=(token < chunk) & (column < width),
        )
        if whole is not None:
            s *= tl.load(whole + number)
        written = tl.trans(tl.load(left + at_chunk, mask=in_chunk, other=0.0))
        s += tl.load(added + at_state, mask=in_state, other=0.0)
        s -= tl.dot(written, product, input_precision="ieee")
    tl.store(last + (head * features + feature) * width + column, s, mask=in_state)


def scan(
    state: Tensor,
    added: Tensor,
    left: Tensor,
    right: Tensor,
    whole: Tensor | None,
    backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `delta_rule.plain_scan` does. Tensors in fp32."""
    features, width = state.shape[-2:]
    chunks, chunk = right.shape[2:4]
    heads = state.shape[:2].numel()
    if whole is not None:
        whole = whole.expand(*added.shape[:3], 1, 1).contiguous()
    befores, last = state.new_empty(added.shape), state.new_empty(state.shape)
    products = state.new_empty(*right.shape[:-1], width)
    with torch.cuda.device_of(state):
        scan_chunks[(heads, triton.cdiv(width, _COLUMNS))](
            state.contiguous(),
            added.contiguous(),
            left.mT.contiguous(),
            right.contiguous(),
            whole,
            befores,
            products,
            last,
            chunks,
            features,
            width,
            chunk,
            BACKWARD=backward,
            # Products of tiles take 16 at least.
            FEATURES=max(16, triton.next_power_of_2(features)),
            CHUNK=max(16, triton.next_power_of_2(chunk)),
            COLUMNS=_COLUMNS,
        )
    return befores, products, last
