"""The dense optimizers, one row each: all that the rest of the trainer needs to know about them.

Adding one takes a file in this folder and a row here. Checkpoints, ZeRO, DeepSpeed, exports and
the planner read the row; none of them names an optimizer or its states. No torch here, because
`memshard config` and `memshard plan` answer without it.
"""

from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DenseKind:
    """One optimizer. name: the value of `optimizer.kind`. title: its name in reports.

    build: "module:function"; function(groups, config) returns the torch optimizer over parameter
    groups whose weight decay is set.

    moments: for a parameter of this shape, names and shapes of the arrays that the optimizer keeps
    for it, as in its `state`; all begin as zeros. counts: names of the numbers it keeps besides
    them, fp32 scalars that begin at 0. Under DeepSpeed's ZeRO, parameters are flattened and cut,
    which only moments of the parameter's own shape survive.

    state_bytes: moments, for each value of a parameter, in fp32. update_bytes: memory that an
    update reads and writes for each value.
    """

    name: str
    title: str
    build: str
    moments: Callable[[Shape], dict[str, Shape]]
    counts: tuple[str, ...]
    state_bytes: float
    update_bytes: float


DENSE_KINDS = {
    kind.name: kind
    for kind in (
        DenseKind(
            name="adamw",
            title="AdamW",
            build="memshard.trainer.optim.dense.adamw:build",
            moments=lambda shape: {"exp_avg": shape, "exp_avg_sq": shape},
            counts=("step",),
            state_bytes=8,
            update_bytes=28,  # reads value, gradient, two moments; writes value, two moments
        ),
    )
}
