"""The stages of `memshard bench gpu`, in their order. Importing this file does not load torch."""

from dataclasses import dataclass

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Stage:
    """One stage. work: import path of a function that takes a `Bench` and yields (name, result),
    where a result is a dictionary of JSON values; `ok` in it says whether it is as it should be,
    `skipped` why there is none. weight: its share of the time; 480 in all, seconds of eight
    minutes. gpu_only: whether nothing of it runs on a CPU.
    """

    name: str
    work: str
    weight: float
    what: str
    gpu_only: bool = False


def _stage(name: str, weight: float, what: str, gpu_only: bool = False) -> Stage:
    return Stage(name, f"memshard.bench.gpu.stages.{name}:run", weight, what, gpu_only)


STAGES = {
    stage.name: stage
    for stage in (
        # Long for what it does: Triton compiles the kernels here, for all stages.
        _stage("machine", 40, "versions, the device, `memshard doctor`, copy and product rates"),
        _stage("kernels", 55, "kernels against plain torch, beyond 2^31 values too"),
        _stage("twins", 95, "every configuration, checkpoints and text against fp32 on the CPU"),
        _stage("ranks", 35, "two processes on one device over gloo; NCCL with several GPUs"),
        _stage("waits", 25, "how often a step waits for the GPU", gpu_only=True),
        _stage("bandwidth", 40, "reads, gradients, updates, searches and sorts beside a copy"),
        _stage("speed", 70, "MFU and memory of 12 layers of 1,024, with a memory and without"),
        _stage(
            "headline", 110, "6 layers, with either memory, 12 layers: loss by tokens and seconds"
        ),
        _stage("page", 10, "a page and pictures of all of these"),
    )
}
