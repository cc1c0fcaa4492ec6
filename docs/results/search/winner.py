"""One block of a decoder found by search; x: [batch, length, 128]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shift(x: Tensor, weight: Tensor) -> Tensor:
    """x plus one number a channel. weight: [branches * width]."""
    return x + (weight if x.ndim == 3 else weight.view(x.shape[1], 1, -1))


def scale(x: Tensor, weight: Tensor) -> Tensor:
    """x times one number a channel. weight: [branches * width]."""
    return x * (weight if x.ndim == 3 else weight.view(x.shape[1], 1, -1))


def project(x: Tensor, weight: Tensor, branches: int) -> Tensor:
    """A linear map for every branch. x: of one value for all branches, or one each; weight: [branches * outputs, width]."""
    if x.ndim == 4:
        return torch.einsum("brtd,red->brte", x, weight.unflatten(0, (branches, -1)))
    y = F.linear(x, weight)
    return y if branches == 1 else y.unflatten(-1, (branches, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """Causal softmax attention of factor q k^T by the fused kernel."""
    if q.ndim == 3:
        return attend(q[:, None], k[:, None], v[:, None], factor)[:, 0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor)


def join(x: Tensor, factor: int) -> Tensor:
    """Branches side by side in the channels of one value."""
    if x.shape[1] == factor:
        return x.transpose(1, 2).flatten(2)
    return x.unflatten(1, (-1, factor)).transpose(2, 3).flatten(3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift_1_weight = nn.Parameter(torch.zeros(128))
        self.scale_2_weight = nn.Parameter(torch.ones(128))
        self.conv_1x1_3_weight = nn.Parameter(torch.randn(64, 128) / 128 ** 0.5)
        self.conv_1x1_4_weight = nn.Parameter(torch.randn(64, 128) / 128 ** 0.5)
        self.conv_1x1_5_weight = nn.Parameter(torch.randn(64, 128) / 128 ** 0.5)
        self.conv_1x1_8_weight = nn.Parameter(torch.randn(128, 64) / 64 ** 0.5)
        self.shift_10_weight = nn.Parameter(torch.zeros(128))
        self.scale_11_weight = nn.Parameter(torch.ones(128))
        self.conv_1x1_12_weight = nn.Parameter(torch.randn(128, 128) / 128 ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shift_1 = shift(x, self.shift_1_weight)  # [batch, length, 128]
        scale_2 = scale(shift_1, self.scale_2_weight)  # [batch, length, 128]
        conv_1x1_3 = project(scale_2, self.conv_1x1_3_weight, 8)  # [batch, 8, length, 8]
        conv_1x1_4 = project(scale_2, self.conv_1x1_4_weight, 8)  # [batch, 8, length, 8]
        conv_1x1_5 = project(scale_2, self.conv_1x1_5_weight, 8)  # [batch, 8, length, 8]
        attend_6 = attend(conv_1x1_3, conv_1x1_4, conv_1x1_5, 0.3535533905932738)  # [batch, 8, length, 8]
        join_7 = join(attend_6, 8)  # [batch, length, 64]
        conv_1x1_8 = project(join_7, self.conv_1x1_8_weight, 1)  # [batch, length, 128]
        add_9 = torch.add(x, conv_1x1_8)  # [batch, length, 128]
        shift_10 = shift(add_9, self.shift_10_weight)  # [batch, length, 128]
        scale_11 = scale(shift_10, self.scale_11_weight)  # [batch, length, 128]
        conv_1x1_12 = project(scale_11, self.conv_1x1_12_weight, 1)  # [batch, length, 128]
        add_13 = torch.add(add_9, conv_1x1_12)  # [batch, length, 128]
        return add_13
