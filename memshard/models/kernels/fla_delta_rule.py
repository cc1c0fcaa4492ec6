"""The delta rule by flash-linear-attention's Triton kernels (Yang et al. 2024), where they are
installed and right.

They serve GPUs, 16-bit values and at most 256 features, and round queries, keys and strengths to
the values' dtype; sums and the state stay fp32. Everything else, and whatever they get wrong, is
left to the reference, the chunks of `fast_weights/delta_rule.py`, which hands itself in.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels.backend import SWITCH
from memshard.variables import switch

Kernel = Callable[..., tuple[Tensor, Tensor]]
_HALF, _MOST_FEATURES = (torch.float16, torch.bfloat16), 256
# A correct result differs by the rounding of inputs and of products inside: 0.4 % each in bf16.
_TOLERANCE = 0.03


def kernel_for(q: Tensor, v: Tensor, reference: Kernel) -> Kernel | None:
    """Return the kernel that serves such tensors, or None. q: [B, H, L, D]; v: [B, H, L, M]."""
    if is_traced(q):
        return None
    return choose_kernel(q.device, v.dtype, q.shape[-1], v.shape[-1], reference)[0]


@cache
def choose_kernel(
    device: torch.device, dtype: torch.dtype, features: int, width: int, reference: Kernel
) -> tuple[Kernel | None, str]:
    """Return the kernel for such shapes, or None for the reference, and in words why.

    The kernel is tested against `reference` at the first call for each shape: every shape is a
    separate program, and compilers have got single ones wrong.
    """
    if device.type != "cuda" or dtype not in _HALF or features > _MOST_FEATURES:
        return (
            None,
            f"chunks in torch (the library's kernels take 16 bits, {_MOST_FEATURES} features at "
            "most, on a GPU)",
        )
    if switch(SWITCH, "plain"):
        return None, f"chunks in torch ({SWITCH}=plain)"
    try:
        from fla.ops.delta_rule import chunk_delta_rule

        with torch.inference_mode(False), torch.enable_grad():
            worst = difference(chunk_delta_rule, reference, device, dtype, features, width)
    except ImportError as problem:
        return None, f"chunks in torch (no flash-linear-attention: {problem})"
    except Exception as problem:
        # Triton compiles at the first call: whatever goes wrong there must not stop a run.
        return (
            None,
            "chunks in torch (flash-linear-attention fails: "
            f"{' '.join(str(problem).split())[:200]})",
        )
    if not worst < _TOLERANCE:
        return None, f"chunks in torch (flash-linear-attention disagrees with them by {worst:.2g})"
    return chunk_delta_rule, "flash-linear-attention (it agrees with chunks in torch)"


def by_kernel(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `delta_rule` on a kernel that has batch, length, heads in this order.

    Resets become packed sequences with separate states. state: [B, H, D, M] fp32. Returns
    [B, H, L, M] in v's dtype and the state after the last token.
    """
    q, k, v, beta = (x.to(v.dtype).transpose(1, 2).contiguous() for x in (q, k, v, beta))
    if resets is None:
        # Queries are not scaled here; the library's default would divide them by sqrt(features).
        out, state = kernel(q, k, v, beta, scale=1.0, initial_state=state, output_final_state=True)
        return out.transpose(1, 2), state
    batch, length = resets.shape
    begins = resets.clone()
    # Rows are joined to one packed sequence, so each row's first token begins a segment as well.
    begins[:, 0] = True
    firsts = begins.flatten().nonzero().squeeze(1)
    # The first and the last sequence of each row.
    first = torch.searchsorted(firsts, torch.arange(batch, device=firsts.device) * length)
    last = F.pad(first[1:], (0, 1), value=len(firsts)) - 1
    # A row begins with its state, unless its first token resets it; documents inside a
    # row begin empty.
    initial = state.new_zeros(len(firsts), *state.shape[1:]).index_copy(
        0, first, state * ~resets[:, :1, None, None]
    )
    flat = (x.flatten(0, 1)[None] for x in (q, k, v, beta))
    ends = F.pad(firsts, (0, 1), value=batch * length)
    out, final = kernel(
        *flat, scale=1.0, initial_state=initial, output_final_state=True, cu_seqlens=ends
    )
    return out[0].unflatten(0, (batch, length)).transpose(1, 2), final[last]


def difference(
    kernel: Kernel,
    reference: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    features: int,
    width: int,
) -> float:
    """Return the largest distance of outputs, states and gradients from the reference's.

    It is relative to the largest value of each. Tested are two rows of several chunks, with a
    repeated key, and with documents that begin inside a chunk and with a row.
    """
    batch, heads, length = 2, 2, 150
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=random).to(device)

    q, k = F.normalize(draw(length, features), dim=-1), F.normalize(draw(length, features), dim=-1)
    # A repeated key is where approximations of the chunk's triangular system differ most.
    k[:, :, 7] = k[:, :, 3]
    v, beta, state = draw(length, width), draw(length).sigmoid(), draw(features, width)
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    d_out, d_state = draw(length, width).to(dtype), draw(features, width)
    packed = torch.zeros(batch, length, dtype=torch.bool, device=device)
    packed[0, 20] = packed[0, 90] = packed[1, 0] = True
    differences = []
    for resets in (None, packed):
        rules: tuple[Kernel, Kernel] = (
            partial(reference, resets=resets),
            partial(by_kernel, kernel, resets=resets),
        )
        results = []
        for rule, inner in zip(rules, (torch.float32, dtype), strict=True):
            inputs = [
                *(x.detach().to(inner).requires_grad_() for x in (q, k, v, beta)),
                state.detach().requires_grad_(),
            ]
            out, last = rule(*inputs)
            loss = (out.float() * d_out.float()).sum() + (last * d_state).sum()
            results.append(
                [x.detach().float() for x in (out, last, *torch.autograd.grad(loss, inputs))]
            )
        differences += [
            (ours - theirs).abs().max() / ours.abs().max()
            for ours, theirs in zip(*results, strict=True)
        ]
    # torch's maximum of a NaN is NaN, where Python's max may drop it and let the kernel pass.
    return float(torch.stack(differences).max())
