"""Other ways to run a recipe on the same devices: what they take, and which of those that fit is
fastest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.devices import Device
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.cost.step_time import step_time


@dataclass(frozen=True)
class Site:
    """Where a recipe is to run. node: ranks on a node."""

    device: Device
    ranks: int
    vocab_size: int
    precision: str
    node: int = 8

    def bytes(self, recipe: Recipe) -> float:
        """What a rank needs on its device."""
        return estimate(recipe, self.ranks, self.vocab_size, self.precision != "fp32").bytes.total

    def seconds(self, recipe: Recipe) -> float:
        """Of a step."""
        cost = estimate(recipe, self.ranks, self.vocab_size, self.precision != "fp32")
        return step_time(recipe, cost, self.device, self.precision, self.node).total


@dataclass(frozen=True)
class Variant:
    """The recipe with other activations kept. largest: the largest micro-batch that fits, 0 for
    none.
    """

    name: str
    bytes: float
    largest: int
    seconds: float


def changed_by(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with some keys, such as train.zero, set to others. ValueError where they do not go
    together.
    """
    sections = {key.partition(".")[0] for key in values}
    parts = {
        section: replace(
            getattr(recipe, section),
            **{
                key.partition(".")[2]: value
                for key, value in values.items()
                if key.startswith(f"{section}.")
            },
        )
        for section in sections
    }
    return replace(recipe, **parts)


def variants(recipe: Recipe, site: Site) -> Iterator[Variant]:
    """What can be kept for backward, side by side; what the recipe's other settings do not allow is
    left out.
    """
    plain = "post" if recipe.model.residual == "post" else "pre"
    ways: dict[str, dict[str, Any]] = {
        f"checkpointing {how}": {"model.residual": plain, "train.checkpointing": how}
        for how in ("none", "selective", "full")
    }
    ways["reversible"] = {"model.residual": "reversible", "train.checkpointing": "none"}
    for name, values in ways.items():
        try:
            changed = changed_by(recipe, values)
        except ValueError:
            continue
        yield Variant(
            name, site.bytes(changed), largest_micro_batch(changed, site), site.seconds(changed)
        )


def largest_micro_batch(recipe: Recipe, site: Site) -> int:
    """The most sequences that a rank can process at once, of its share of the recipe's batch; 0 if
    not even one.
    """
    share = estimate(
        changed_by(recipe, {"train.micro_batch": None}), site.ranks, site.vocab_size
    ).micro_batch
    return _largest(
        lambda size: (
            site.bytes(changed_by(recipe, {"train.micro_batch": size})) <= site.device.memory
        ),
        share,
    )


def largest_batch(recipe: Recipe, site: Site) -> int:
    """The largest train.batch, the same for each data-parallel rank, that fits in micro-batches of
    the recipe's at most; 0 if none.
    """
    shares = site.ranks // recipe.parallel.tensor
    most = 1 << 20
    micro_batch = estimate(recipe, site.ranks, site.vocab_size).micro_batch

    def fits(share: int) -> bool:
        changed = changed_by(
            recipe, {"train.batch": share * shares, "train.micro_batch": min(share, micro_batch)}
        )
        return site.bytes(changed) <= site.device.memory

    return _largest(fits, most) * shares


def suggestion(recipe: Recipe, site: Site) -> tuple[dict[str, Any], float] | None:
    """Settings under which the recipe fits and should be fastest, of those that leave what is
    trained alone (but for tables in fp16 where nothing else fits), and the seconds of a step;
    None if nothing fits.
    """
    reversible, memory = recipe.model.residual == "reversible", bool(recipe.model.memory.layers)
    micro_batch = estimate(recipe, site.ranks, site.vocab_size).micro_batch
    sizes = [micro_batch >> halvings for halvings in range(micro_batch.bit_length())]
    choices: dict[str, tuple[Any, ...]] = {
        "train.zero": (recipe.train.zero,) if recipe.train.zero else (0, 1),
        "train.checkpointing": ("none",) if reversible else ("none", "selective", "full"),
        "tables.place": ("device", "host")
        if memory and site.device.name != "cpu"
        else (recipe.tables.place,),
        "parallel.tensor": tuple(
            tensor for tensor in (1, 2, 4, 8) if tensor <= site.node and site.ranks % tensor == 0
        ),
    }
    narrow: tuple[dict[str, Any], ...] = (
        {},
        {"tables.dtype": "fp16", "tables.rounding": "stochastic"},
    )
    for fixed in narrow[: 2 if memory and recipe.tables.dtype == "fp32" else 1]:
        found = []
        for values in product(*choices.values()):
            settings = dict(zip(choices, values, strict=True)) | fixed
            if recipe.model.mixer.heads % settings["parallel.tensor"]:
                continue
            try:
                changed = changed_by(recipe, settings)
                fitting = (
                    size
                    for size in sizes
                    if site.bytes(changed_by(changed, {"train.micro_batch": size}))
                    <= site.device.memory
                )
                size = next(fitting, 0)
            except ValueError:  # they do not go together
                continue
            if size:
                seconds = site.seconds(changed)
                settings |= {"train.micro_batch": size} if size != micro_batch else {}
                made = {key: value for key, value in settings.items() if value != _get(recipe, key)}
                found.append((made, seconds))
        if found:
            # Below a tenth the model of time knows no better than chance: then the fewest changes,
            # and best none that needs fairscale.
            fastest = min(seconds for _, seconds in found)
            equal = (each for each in found if each[1] <= 1.1 * fastest)
            return min(
                equal, key=lambda each: (len(each[0]), "parallel.tensor" in each[0], each[1])
            )
    return None


def _get(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _largest(fits: Any, most: int) -> int:
    """The largest number up to `most` that fits, where what fits stays so when it gets smaller."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
