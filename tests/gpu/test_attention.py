"""Which attention kernels a GPU runs, and what it casts."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.decode.generate import generate, left_padded
from memshard.models.seq2seq import build_model
from tests.gpu.fake_cuda import fake_cuda, on_fake_cuda
from tests.gpu.test_training import train

GROUPS = ("model.mixer.kv_heads=1", "data.document_mask=true")


def test_groups_of_heads_under_a_mask_have_a_fused_kernel(recipe: Path, tmp_path: Path) -> None:
    losses, counts = on_fake_cuda(train, recipe, tmp_path / "cuda", GROUPS, "cuda:0")
    twin, _ = on_fake_cuda(train, recipe, tmp_path / "cpu", GROUPS, "cpu")
    assert losses == pytest.approx(twin, rel=1e-5)
    kinds = {what for what, _ in counts.launches if "attention" in what}
    assert kinds == {"efficient attention", "efficient attention backward"}


def _generated(device: str, window: int, padded: bool) -> tuple[list[list[int]], Counter[str]]:
    kind = "local" if window else "softmax"
    mixer = MixerConfig(kind=kind, heads=4, kv_heads=2, **({"window": window} if window else {}))
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=50, max_length=32, dim=32, layers=2, mixer=mixer))
    prompts = [[1, 2, 3], [4, 5] if padded else [4, 5, 6]]
    with fake_cuda() as watch:
        model = model.eval().to(device)
        prompt, real = left_padded(prompts, 0)
        with torch.autocast(device, torch.bfloat16), watch.counted() as counts:
            tokens = generate(model, prompt, 5, real=real, temperature=0.0)
    attention = Counter[str]()
    for (what, place), number in counts.launches.items():
        if "attention" in what or ("softmax.py" in place and what == "_to_copy"):
            attention[what] += number
    return tokens.tolist(), attention


@pytest.mark.parametrize(("window", "padded"), [(0, False), (0, True), (2, False)])
def test_generation_casts_no_cache_and_has_fused_kernels(window: int, padded: bool) -> None:
    tokens, counts = on_fake_cuda(_generated, "cuda", window, padded)
    assert tokens == on_fake_cuda(_generated, "cpu", window, padded)[0]
    assert counts.pop("_to_copy") <= 2  # the weights of two layers, once
    assert counts == {"efficient attention": 10}
