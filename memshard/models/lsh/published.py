"""LSH attention by the rules of published code, to compare with it and to use its weights. Neither
rule is strictly causal.

Chunks are cut from one sorted sequence, so where their borders fall depends on later tokens, and
with it whom a token sees: other buckets under `hf_compat`, its own bucket's older tokens under
`paper_causal`. What such models predict cannot be sampled token by token.
"""

from typing import Literal

import torch
from torch import Tensor

PublishedRule = Literal["paper_causal", "hf_compat"]
_HIDDEN, _ITSELF = -1e9, -1e5


def published_attention(
    q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, chunk: int, rule: PublishedRule
) -> Tensor:
    """Attention to earlier tokens in the own chunk and the one before, in each of R rounds.

    q, k: [N, L, d]; v: [N, L, m]; buckets: [N, R, L] int64; returns [N, L, m]. Scores are fp32.
    rule: "hf_compat" as in transformers and trax: all rounds are sorted together, the first chunk
    looks at the last one, other buckets are seen, pairs count once a round. "paper_causal": only
    the own bucket is seen, and a pair that meets in n rounds counts 1/n in each (Kitaev et al.
    2020, appendix A). ValueError if L is longer than a chunk and no multiple of it.
    """
    rows, rounds, length = buckets.shape
    if length <= chunk:
        # As transformers does: one chunk without hashing.
        buckets, chunk, rounds = torch.zeros_like(buckets[:, :1]), length, 1
    if length % chunk:
        raise ValueError(
            f"{length} tokens under the rule {rule}, whose chunks of {chunk} must fill a "
            "sequence: use the strict rule"
        )
    codes = (
        buckets + torch.arange(rounds, device=q.device)[:, None] * (buckets.max() + 1)
    ).flatten(1)
    order = codes.argsort(dim=1, stable=True)
    places = order.argsort(dim=1)
    tokens = (order % length).unflatten(1, (-1, chunk))

    def look(x: Tensor) -> Tensor:
        """[N, T, C, ...] to [N, T, 2C, ...]: the chunk before, the first one's being the last, and
        the own.
        """
        return x if length == chunk and rounds == 1 else torch.cat((x.roll(1, 1), x), 2)

    def tiles(x: Tensor) -> Tensor:
        """[N, L, ...] to [N, T, C, ...]."""
        return x[torch.arange(rows, device=x.device)[:, None, None], tokens]

    scores = (tiles(q) @ look(tiles(k)).mT).to(torch.promote_types(q.dtype, torch.float32))
    own, seen = tokens[..., None], look(tokens)[..., None, :]
    legal = own >= seen
    if rule == "paper_causal":
        met = torch.zeros_like(legal, dtype=torch.int64)
        each_code, each_chunk = (x.view(rows, rounds, -1) for x in (codes, places // chunk))
        for number in range(rounds):
            code, at = tiles(each_code[:, number]), tiles(each_chunk[:, number])
            apart = at[..., None] - look(at)[..., None, :]
            met += (code[..., None] == look(code)[..., None, :]) & ((apart == 0) | (apart == 1))
        sorted_codes = codes.gather(1, order).view_as(tokens)
        legal &= sorted_codes[..., None] == look(sorted_codes)[..., None, :]
        scores = scores - met.clamp(min=1).to(scores.dtype).log()
    scores = torch.where(legal, scores, _HIDDEN)
    scores = torch.where(own != seen, scores, _ITSELF)
    logs = scores.logsumexp(-1, keepdim=True)
    out = ((scores - logs).exp().to(v.dtype) @ look(tiles(v))).flatten(1, 2)
    # Back from sorted places to (round, token).
    out = out.gather(1, places[..., None].expand(-1, -1, v.shape[-1])).unflatten(
        1, (rounds, length)
    )
    logs = logs.flatten(1, 2).gather(1, places[..., None]).unflatten(1, (rounds, length))
    # Not softmax: for a token that sees itself only, their weights add up to 0.9965 and so on, as
    # -1e5 leaves few bits.
    weights = (logs - logs.logsumexp(1, keepdim=True)).exp()
    return (out * weights.to(out.dtype)).sum(1)
