"""Queries, keys and values of a mixer's heads."""

from torch import Tensor

from memshard.models.context import Context
from memshard.models.layers.convolution import Convolutions, RecentRows
from memshard.models.layers.linear import Projection
from memshard.models.mixers.mixer import Mixer


class HeadProjections(Mixer):
    """A mixer's projections of all heads, with Primer's parts where they are asked for.

    convolution: width of a causal depthwise convolution after each projection, 0 for none.
    share_qk: queries are a linear map of the keys (after their convolution), without a convolution
    of their own. kv_heads: number of key/value heads, each shared by heads / kv_heads neighbouring
    query heads; default: heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        output_scale: float = 1.0,
        *,
        convolution: int = 0,
        share_qk: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.share_qk = heads, kv_heads or heads, share_qk
        width = dim // heads * self.kv_heads
        # Queries are made from keys, whose width is smaller where several heads share one.
        self.query = Projection(width if share_qk else dim, dim)
        self.key = Projection(dim, width)
        self.value = Projection(dim, width)
        self.output = Projection(dim, dim, scale=output_scale)
        channels = (
            {"key": width, "value": width}
            if share_qk
            else {"query": dim, "key": width, "value": width}
        )
        self.convolutions = Convolutions(channels, convolution)

    def project(
        self, x: Tensor, ctx: Context, recent: RecentRows | None
    ) -> tuple[Tensor, Tensor, Tensor, RecentRows | None]:
        """Return queries, [batch, heads, length, head dim], keys and values, [batch, kv heads,
        length, head dim], and the convolutions' advanced state where `recent` is given. x: [batch,
        length, dim].
        """
        names = ("key", "value") if self.share_qk else ("query", "key", "value")
        projected = [getattr(self, name)(x) for name in names]
        if ctx.values is not None:
            projected[-1] = projected[-1] + ctx.values.to(projected[-1].dtype)
        projected, recent = self.convolutions(projected, ctx, recent)
        if self.share_qk:
            projected.insert(0, self.query(projected[0]))
        counts = self.heads, self.kv_heads, self.kv_heads
        q, k, v = (
            tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
            for tensor, heads in zip(projected, counts, strict=True)
        )
        return q, k, v, recent
