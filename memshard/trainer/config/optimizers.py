"""The optimizers' part of a recipe: one for dense parameters, row-sparse Adam for value tables."""

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

from memshard.trainer.config.fields import check_kinds, may_change
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(DENSE_KINDS)]  # the registry's names, which mypy cannot read


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of the dense parameters: everything but value tables."""

    kind: Kind = "adamw"
    """Update rule."""

    lr: float = 1e-3
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moment."""

    eps: float = 1e-8
    """Added to the denominator."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""

    schedule: Literal["constant", "inverse_sqrt", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, lr * sqrt(warmup / step), or half a cosine to
    final_lr at train.steps.
    """

    warmup: int = 100
    """Steps of linear warm-up from 0."""

    final_lr: float = 0.1
    """Where the cosine ends, as a share of lr."""

    def __post_init__(self) -> None:
        check_kinds(self, "optimizer")
        _check_adam("optimizer", self.lr, self.betas, self.eps)
        for name in ("weight_decay", "warmup", "final_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be at least 0"
                )


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The value tables and their row-sparse Adam (Lample et al. 2019), with a constant learning
    rate and without decay.
    """

    lr: float = 1e-3
    """Learning rate, constant."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moment of a touched row."""

    eps: float = 1e-8
    """Added to the denominator."""

    semantics: Literal["lazy", "row-step", "catch-up", "dense"] = "lazy"
    """Rows that a step does not read: lazy lets their moments wait, catch-up decays them later,
    row-step counts the steps of each row separately, dense moves every row in every step.
    """

    clip: float = 0.0
    """Largest norm of all tables' gradients together; 0 switches clipping off and saves a pass over
    the gradients.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How values are stored; moments, sums and gradients stay fp32."""

    rounding: Literal["master", "stochastic"] = "master"
    """How fp16 and bf16 values take small changes: through an fp32 copy, or rounded up or down at
    random (4 bytes a value less).
    """

    place: Literal["device", "host"] = may_change("device")
    """Where values and moments are: with the model, or in host memory while the model is on a GPU;
    the CPU then sums and updates rows.
    """

    dead_after: int = 1000
    """Steps without a read after which a row, or a sub-key, counts as dead."""

    revive: bool = False
    """Every dead_after steps, move dead sub-keys next to hot ones and copy the hot ones' values to
    their dead rows.
    """

    def __post_init__(self) -> None:
        check_kinds(self, "tables")
        _check_adam("tables", self.lr, self.betas, self.eps)
        if not self.clip >= 0:
            raise ValueError(f"tables.clip is {self.clip}; it must be at least 0")
        if self.dead_after < 1:
            raise ValueError(f"tables.dead_after is {self.dead_after}; it must be at least 1")

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored value."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def state_bytes(self) -> int:
        """Bytes kept for each value: two moments, and the fp32 copy where there is one."""
        # 4 bytes a moment, and 4 for the copy.
        return 12 if self.dtype != "fp32" and self.rounding == "master" else 8


def _check_adam(section: str, lr: float, betas: tuple[float, float], eps: float) -> None:
    for name, value in (("lr", lr), ("eps", eps)):
        if not value >= 0:  # also refuses NaN
            raise ValueError(f"{section}.{name} is {value}; it must be at least 0")
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (pair and all(isinstance(beta, Real) for beta in betas)):
        raise ValueError(f"{section}.betas is {betas!r}; it must be two numbers")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{section}.betas is {list(betas)}; both must be at least 0 and below 1")
