"""What the devices of a plan have: memory, arithmetic, and how fast bytes move."""

import os
import time
from dataclasses import dataclass
from functools import cache

import torch

from memshard.trainer.cost.available_memory import available_memory
from memshard.trainer.cost.peak_flops import CARD_FLOPS, peak_flops
from memshard.trainer.precision import DTYPES

USABLE = 0.92
"""Share of a card that a run can fill: the CUDA context, NCCL's buffers and fragmentation take the
rest.
"""


@dataclass(frozen=True)
class Device:
    """memory: bytes that a rank can use. flops: operations a second at best, by precision.
    bandwidth: bytes a second of its memory. link, network: bytes a second that it sends to a
    device of its node, of another node. half: what precision auto means.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    half: str = "bf16"


def _card(
    name: str,
    sheet: str,
    gib: float,
    bandwidth: float,
    link: float,
    network: float,
    half: str = "bf16",
) -> Device:
    flops = {
        precision: CARD_FLOPS[sheet][dtype]
        for precision, dtype in DTYPES.items()
        if dtype in CARD_FLOPS[sheet]
    }
    return Device(name, gib * 2**30 * USABLE, flops, bandwidth, link, network, half)


CARDS = {
    card.name: card
    for card in (
        _card("v100-16g", "V100", 15.8, 900e9, 150e9, 6.25e9, "fp16"),
        _card("v100-32g", "V100", 31.7, 900e9, 150e9, 6.25e9, "fp16"),
        _card("a100-40g", "A100", 39.4, 1555e9, 300e9, 25e9),
        _card("a100-80g", "A100", 79.1, 2039e9, 300e9, 25e9),
        _card("h100-80g", "H100", 79.1, 3350e9, 450e9, 50e9),
        _card("h200-141g", "H200", 139.8, 4800e9, 450e9, 50e9),
    )
}
"""GiB that the driver leaves. Operations, memory and NVLink (one direction) from NVIDIA's data
sheets, SXM versions. Network: a card's share of the adapters of NVIDIA's own nodes of 8: DGX-1 4
x 100 Gb/s, DGX A100 8 x 200 Gb/s, DGX H100 and H200 8 x 400 Gb/s.
"""

_LOOPBACK = 1e9
"""Bytes a second between processes of a machine over gloo: assumed."""


def device_of(name: str, ranks: int) -> Device:
    """A card by name, or `cpu`: this machine, shared by `ranks` ranks, each with as many threads as
    this process.
    """
    if name != "cpu":
        return CARDS[name]
    flops, bandwidth = _measured()
    share = min(1.0, (os.cpu_count() or 1) / (torch.get_num_threads() * ranks))
    memory = available_memory(torch.device("cpu"), ranks_here=ranks)
    return Device(
        "cpu",
        memory,
        {key: value * share for key, value in flops.items()},
        bandwidth / ranks,
        _LOOPBACK,
        _LOOPBACK,
        "fp32",
    )


@cache
def _measured() -> tuple[dict[str, float], float]:
    """Operations a second by precision and bytes a second, with this process's threads; under a
    second.
    """
    cpu = torch.device("cpu")
    flops = {name: peak_flops(cpu, dtype) for name, dtype in DTYPES.items() if name != "fp16"}
    flops["fp16"] = flops["bf16"]  # not a choice on CPU; the trainer's figure for MFU
    x = torch.ones(1 << 24)
    y = torch.empty_like(x)
    y.copy_(x)
    begun = time.perf_counter()
    for _ in range(3):
        y.copy_(x)
    return flops, 3 * 2 * x.nbytes / (time.perf_counter() - begun)
