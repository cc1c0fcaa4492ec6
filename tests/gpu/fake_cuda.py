"""Run memshard on CUDA tensors without a GPU, and count what it asks of the device.

    def body(recipe: Path, folder: Path) -> Counts:          # at the top of a test module
        with fake_cuda() as watch:
            run = set_up(load_recipe(recipe), folder, "cuda:0")
            train_step(run)                                   # the first one makes states
            with watch.counted() as counts:
                train_step(run)
        return counts

    def test_waits(recipe, tmp_path):
        counts = on_fake_cuda(body, recipe, tmp_path)
        assert counts.waits.total() <= 2, counts              # each with its line of memshard

How it works. `guard.cpp` tells torch's CPU build of a CUDA device, and fake_device.py fills
torch.cuda. Tensors on it are FakeTensors (watch.py): shapes, dtypes and devices are checked as on a
GPU, so that mixing devices raises. Those of up to `computed` elements also have numbers, computed
on the CPU: losses, checkpoints and branches that depend on values are those of a CPU run. Tensors
in host memory are ordinary ones. With capability 8.0 or more, Triton's kernels are counted where
they would be launched, and plain torch computes their numbers (fake_triton.py). All this happens
in one process of its own, which the tests of a session share (own_process.py).

What it cannot see: whether real kernels take a dtype, their numbers and speed; memory; NCCL; a
missing wait for a stream, since all is done at once; draws of the CUDA generator, which is the
CPU's; launches inside one operation of torch (a sort is one).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.gpu import fake_device, fake_triton, own_process, python_side
from tests.gpu.python_side import Python
from tests.gpu.watch import Counts, Watch

__all__ = ["Counts", "Watch", "fake_cuda", "on_fake_cuda"]


def on_fake_cuda(body: Callable[..., Any], *args: Any) -> Any:
    """Return body(*args), called in the process that has the device; skip the test where a compiler
    or Triton is missing.

    body is a function at the top of a module; arguments and results are pickled.
    """
    try:
        executor = own_process.process()
    except OSError as problem:
        pytest.skip(str(problem))
    return executor.submit(own_process.call, body, args).result()


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0), computed: int = 1 << 20) -> Iterator[Watch]:
    """Watch the device in the block, whose tensors lose their meaning after it.

    capability: of the GPU; below 8.0 memshard takes plain torch. computed: number of elements up to
    which tensors have numbers; in models too large to compute, a few thousand.
    """
    from memshard.models import random
    from memshard.models.kernels import backend, delta_steps, dropout, scan
    from memshard.models.lsh import hashing, tiles

    fake_device.capability = capability
    # Choices are for a capability, and fakes of another watch are not for this one.
    for choice in (
        backend.backend_for,
        backend._lookup,
        dropout._kernel,
        scan._kernel,
        delta_steps._kernels,
    ):
        choice.cache_clear()
    for made in (hashing.rotations, random.quantiles_on, tiles.outside_window):
        made.cache_clear()
    watch = Watch(computed)
    fake_device.waited = lambda what: watch.count("waits", what)
    fake_triton.launched = python_side.launched = lambda what: watch.count("launches", what)
    own_process.modes = watch, Python(watch)
    try:
        with watch, own_process.modes[1]:
            yield watch
    finally:
        own_process.modes = ()
