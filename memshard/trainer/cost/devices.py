"""The GPUs that memshard knows: their memory, arithmetic and bandwidths. Loads no torch, because
`memshard plan --help` lists them.
"""

from dataclasses import dataclass

USABLE = 0.92
"""Share of a card that a run can fill: the CUDA context, NCCL's buffers and
fragmentation take the rest.
"""


@dataclass(frozen=True)
class Device:
    """memory: bytes that a rank can use. flops: operations a second at best, by precision.
    bandwidth: bytes a second of its memory. link, network: bytes a second that it sends to a
    device of its node, of another node. half: the precision that `auto` chooses.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    network: float
    half: str = "bf16"


CARD_FLOPS = {
    "V100": {"fp32": 15.7e12, "fp16": 125e12},
    "A100": {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12},
    "H100 PCIe": {"fp32": 51e12, "fp16": 756e12, "bf16": 756e12},
    "H100": {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12},
    "H200": {"fp32": 67e12, "fp16": 989e12, "bf16": 989e12},
}
"""By a part of the name that the driver reports, of which the first that fits counts: dense figures
of NVIDIA's data sheets (SXM, where versions differ), fp32 without TF32.
"""


def _card(
    name: str,
    sheet: str,
    gib: float,
    bandwidth: float,
    link: float,
    network: float,
    half: str = "bf16",
) -> Device:
    return Device(name, gib * 2**30 * USABLE, CARD_FLOPS[sheet], bandwidth, link, network, half)


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
"""The choices of `memshard plan --device`. GiB: what the driver leaves. Memory and NVLink (one
direction) from NVIDIA's data sheets, SXM versions. Network: a card's share of the adapters of
NVIDIA's own nodes of 8: DGX-1 4 x 100 Gb/s, DGX A100 8 x 200 Gb/s, DGX H100 and H200 8 x 400 Gb/s.
"""

SHORT_NAMES = {"v100": "v100-16g", "a100": "a100-80g", "h100": "h100-80g", "h200": "h200-141g"}
"""What `memshard plan --device` takes as well: the usual card of a kind."""
