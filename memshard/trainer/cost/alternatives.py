"""Find other settings for a recipe on the same devices: what they need, which fit and are fast."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.devices import Device
from memshard.trainer.cost.estimate import Estimate, estimate
from memshard.trainer.cost.step_time import step_time

Settings = dict[str, Any]
"""Values by recipe key, such as {"train.zero": 1}."""

_HALF_TABLES: Settings = {"tables.dtype": "fp16", "tables.rounding": "stochastic"}


@dataclass(frozen=True)
class Site:
    """Where a recipe is to run. node: ranks on a node."""

    device: Device
    ranks: int
    vocab_size: int
    precision: str
    node: int = 8

    def estimate(self, recipe: Recipe) -> Estimate:
        """Return what the recipe costs here."""
        return estimate(recipe, self.ranks, self.vocab_size, half=self.precision != "fp32")

    def bytes(self, recipe: Recipe) -> float:
        """Return the bytes that a rank needs on its device."""
        return self.estimate(recipe).bytes.total

    def fits(self, recipe: Recipe) -> bool:
        """Return whether a rank's device has that much memory."""
        return self.bytes(recipe) <= self.device.memory

    def seconds(self, recipe: Recipe) -> float:
        """Return the seconds of a step."""
        return step_time(
            recipe, self.estimate(recipe), self.device, self.precision, self.node
        ).total


@dataclass(frozen=True)
class Variant:
    """The recipe with other activations kept. largest: the largest micro-batch that fits, or 0."""

    name: str
    bytes: float
    largest: int
    seconds: float


def changed_by(config: Any, settings: Settings) -> Any:
    """Return a recipe, or a section of one, with some keys set to other values. ValueError where
    they do not go together.
    """
    direct = {key: value for key, value in settings.items() if "." not in key}
    inner: dict[str, Settings] = {}
    for key, value in settings.items():
        section, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(section, {})[rest] = value
    sections = {
        section: changed_by(getattr(config, section), values) for section, values in inner.items()
    }
    return replace(config, **direct, **sections)


def remedies(recipe: Recipe, site: Site) -> list[str]:
    """Return, in words, all single changes after which a recipe that does not fit does: more ranks,
    one other setting, or fewer keys.
    """
    changes = []
    if site.device.name != "cpu":  # there, more ranks share the same memory
        more = (site.ranks << doublings for doublings in range(1, 11))
        ranks = next((ranks for ranks in more if replace(site, ranks=ranks).fits(recipe)), None)
        changes += [f"use {ranks} ranks"] * (ranks is not None)
    for settings in _single_changes(recipe, site):
        text = f"set {' '.join(f'{key}={value}' for key, value in settings.items())}"
        if settings.get("tables.place") == "host":
            size = site.estimate(changed_by(recipe, settings)).host.total
            text += f" ({size / 1e9:,.1f} GB a rank in host memory)"
        changes.append(text)
    return changes


def suggestion(recipe: Recipe, site: Site) -> tuple[Settings, float] | None:
    """Return the settings with which the recipe fits and should be fastest, and the seconds of a
    step; None if nothing fits.

    They leave what is trained as it is, except for tables in fp16 where nothing else fits.
    """
    for fixed in ({}, _HALF_TABLES) if _has_wide_tables(recipe) else ({},):
        fitting = list(_fitting(recipe, site, fixed))
        if fitting:
            # Below a tenth the model of time knows no better than chance: then the fewest changes,
            # and best none that needs fairscale.
            fastest = min(seconds for _, seconds in fitting)
            equal = (entry for entry in fitting if entry[1] <= 1.1 * fastest)
            return min(
                equal, key=lambda entry: (len(entry[0]), "parallel.tensor" in entry[0], entry[1])
            )
    return None


def variants(recipe: Recipe, site: Site) -> Iterator[Variant]:
    """Yield what can be kept for backward, side by side, without what the recipe's other settings
    do not allow.
    """
    plain = "post" if recipe.model.residual == "post" else "pre"
    ways: dict[str, Settings] = {
        f"checkpointing {how}": {"model.residual": plain, "train.checkpointing": how}
        for how in ("none", "selective", "full")
    }
    ways["reversible"] = {"model.residual": "reversible", "train.checkpointing": "none"}
    for name, settings in ways.items():
        try:
            changed = changed_by(recipe, settings)
        except ValueError:
            continue
        yield Variant(
            name, site.bytes(changed), largest_micro_batch(changed, site), site.seconds(changed)
        )


def largest_micro_batch(recipe: Recipe, site: Site) -> int:
    """Return the most sequences that a rank can process at once, of its share of the recipe's
    batch; 0 if not even one fits.
    """
    share = site.estimate(changed_by(recipe, {"train.micro_batch": None})).micro_batch
    return _largest(
        lambda size: site.fits(changed_by(recipe, {"train.micro_batch": size})), up_to=share
    )


def largest_batch(recipe: Recipe, site: Site) -> int:
    """Return the largest train.batch, the same for each data-parallel rank, that fits in
    micro-batches of at most the recipe's; 0 if none.
    """
    data_ranks = site.ranks // recipe.parallel.tensor
    micro_batch = site.estimate(recipe).micro_batch

    def fits(share: int) -> bool:
        settings = {
            "train.batch": share * data_ranks,
            "train.micro_batch": min(share, micro_batch),
        }
        return site.fits(changed_by(recipe, settings))

    return _largest(fits, up_to=1 << 20) * data_ranks


def _single_changes(recipe: Recipe, site: Site) -> Iterator[Settings]:
    """Yield the smallest change of each key with which the recipe fits."""
    choices = _choices(recipe, site)
    del choices["parallel.tensor"]  # needs fairscale: left to `suggestion`
    options = [
        [{key: value} for value in values[values.index(_current(recipe, site, key)) + 1 :]]
        for key, values in choices.items()
    ]
    memory, ngram = recipe.model.memory, recipe.model.ngram
    if _has_wide_tables(recipe):
        options.append([_HALF_TABLES])
    if memory.layers:
        halves = (memory.keys >> halvings for halvings in range(1, memory.keys.bit_length()))
        options.append([{"model.memory.keys": keys} for keys in halves if keys >= memory.topk])
    if ngram.layers:
        halves = (ngram.rows >> halvings for halvings in range(1, ngram.rows.bit_length() - 1))
        options.append([{"model.ngram.rows": rows} for rows in halves])
    for settings in options:
        fitting = (values for values in settings if _fits(recipe, values, site))
        yield from [values for values in [next(fitting, None)] if values is not None]


def _fitting(recipe: Recipe, site: Site, fixed: Settings) -> Iterator[tuple[Settings, float]]:
    """Yield all combinations of choices that fit together with `fixed`, each with the largest
    micro-batch that fits: what they change, and the seconds of a step.
    """
    choices = _choices(recipe, site)
    micro_batches = choices.pop("train.micro_batch")
    # At most 2 x 3 x 2 x 4 = 48 combinations, each of which costs a closed form and no allocation.
    for values in product(*choices.values()):
        settings = dict(zip(choices, values, strict=True)) | fixed
        if recipe.model.mixer.heads % settings["parallel.tensor"]:
            continue
        sizes = (
            size
            for size in micro_batches
            if _fits(recipe, settings | {"train.micro_batch": size}, site)
        )
        # From large to small: the first that fits is the fastest.
        size = next(sizes, None)
        if size is not None:
            seconds = site.seconds(changed_by(recipe, settings))
            settings["train.micro_batch"] = size
            yield (
                {
                    key: value
                    for key, value in settings.items()
                    if value != _current(recipe, site, key)
                },
                seconds,
            )


def _choices(recipe: Recipe, site: Site) -> dict[str, tuple[Any, ...]]:
    """Return the keys that change memory and time but not what is trained, with their values, from
    the most memory to the least.
    """
    reversible = recipe.model.residual == "reversible"
    has_host = _has_tables(recipe) and site.device.name != "cpu"
    micro_batch = _current(recipe, site, "train.micro_batch")
    tensor = (1, 2, 4, 8)
    return {
        "train.zero": (recipe.train.zero,) if recipe.train.zero else (0, 1),
        "train.checkpointing": ("none",) if reversible else ("none", "selective", "full"),
        "train.micro_batch": tuple(
            micro_batch >> halvings for halvings in range(micro_batch.bit_length())
        ),
        "tables.place": ("device", "host") if has_host else (recipe.tables.place,),
        "parallel.tensor": tuple(
            ranks for ranks in tensor if ranks <= site.node and site.ranks % ranks == 0
        ),
    }


def _current(recipe: Recipe, site: Site, key: str) -> Any:
    """Return the value of a key; for a micro-batch that is not set, its size."""
    if key == "train.micro_batch":
        return site.estimate(recipe).micro_batch
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _fits(recipe: Recipe, settings: Settings, site: Site) -> bool:
    try:
        return site.fits(changed_by(recipe, settings))
    except ValueError:  # they do not go together
        return False


def _has_tables(recipe: Recipe) -> bool:
    return bool(recipe.model.memory.layers or recipe.model.ngram.layers)


def _has_wide_tables(recipe: Recipe) -> bool:
    return _has_tables(recipe) and recipe.tables.dtype == "fp32"


def _largest(fits: Callable[[int], bool], up_to: int) -> int:
    """Return the largest number that fits, by bisection, where all smaller ones fit as well."""
    low, high = 0, up_to + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
