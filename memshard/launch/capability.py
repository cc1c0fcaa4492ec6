"""Whether the torch that is installed has kernels for a GPU, and which one would."""

import re


def lacks_kernels(capability: tuple[int, int], built: list[str]) -> str | None:
    """What to install where a GPU's code is missing; None if all is well.

    capability: of the GPU, such as (7, 0). built: `torch.cuda.get_arch_list()`: sm_XY is machine
    code, which runs on the same major version from minor version Y on; compute_XY can be compiled
    for anything newer.
    """
    major, minor = capability
    found = [
        (kind, int(x), int(y))
        for arch in built
        for kind, x, y in re.findall(r"^(sm|compute)_(\d+)(\d)[a-z]?$", arch)
    ]
    if not found or any(
        (x, y) <= capability and (kind == "compute" or x == major) for kind, x, y in found
    ):
        return None
    lowest = min((x, y) for _, x, y in found)
    advice = (
        "install torch's build for CUDA 12.6 (docs/volta.md)"
        if capability < lowest
        else "install a newer torch"
    )
    return (
        f"this torch has no code for GPUs of capability {major}.{minor}, only "
        f"{', '.join(built)}: {advice}"
    )
