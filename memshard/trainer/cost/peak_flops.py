"""How many operations a second a device's matrix units can do at best: the measure of MFU."""

import time

import torch

CARD_FLOPS = {
    "V100": {torch.float16: 125e12, torch.float32: 15.7e12},
    "A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51e12},
    "H100": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    "H200": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
}
"""Dense figures of NVIDIA's data sheets (SXM, where they differ), fp32 without TF32; the first name
that fits counts.
"""

_SECONDS = 0.1


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second: of the data sheet for known cards, else of the best of some matrix
    products of this moment.

    The measured figure holds for the current number of threads; it takes under 0.3 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, figures in CARD_FLOPS.items():
            if card in name and dtype in figures:
                return figures[dtype]
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    best, size = 0.0, 256
    begun = time.perf_counter()
    a = torch.ones(size, size, device=device, dtype=dtype)
    while not best or time.perf_counter() - begun < _SECONDS:
        seconds = _product_seconds(a)
        best = max(best, 2 * size**3 / seconds)
        # Larger products are more efficient; one of twice the size takes eight times as long.
        if seconds < _SECONDS / 20 and size < 8192:
            size *= 2
            a = torch.ones(size, size, device=device, dtype=dtype)
    return best


def _product_seconds(a: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    begun = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - begun
