"""Settings of a search: text and model, how programs are bred, and what training them may cost."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from memshard.io import read_small
from memshard.trainer.config.fields import check_finite
from memshard.trainer.config.text import MOST_BYTES, parse

_POSITIVE = (
    *(
        "children",
        "copies",
        "population",
        "tournament",
        "window",
        "ahead",
        "budget",
        "layers",
        "length",
        "batch",
    ),
    *("lr", "eval_tokens", "final_seeds", "size_seeds", "timeout", "memory"),
)


@dataclass(frozen=True)
class Settings:
    """All settings of a search.

    The defaults take some 50 minutes of one core; the published search took 1,145.8 TPUv2-days.
    """

    text: str
    """File of text, plain or .gz: bytes are the tokens; its last tenth is held out, half for the
    search and half for the verdict.
    """
    start: Literal["transformer", "transformer-pp", "primer-ez", "primer"] = "transformer"
    """Program that the population starts with."""
    seed: int = 1
    """Seed of the whole search: the same settings find the same programs again, if step_costs is
    not time.
    """
    children: int = 400
    """Programs born in the search, the copies of the start among them."""
    copies: int = 8
    """Copies of the start that are trained from different initial values: they are the first
    population and give the noise band.
    """
    population: int = 48
    """Programs that can become parents: the latest born (published: 100)."""
    tournament: int = 8
    """Programs sampled from the population; the best becomes the parent (published: 10)."""
    mutations: tuple[float, float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    """Weights of delete, insert, replace, field, swap and bank; equal in AutoML-Zero, the paper
    gives none.
    """
    hurdles: int = 3
    """Stops on the way at which half of the programs end (published: 4)."""
    window: int = 16
    """Number of the latest losses at a hurdle that set it, so that half pass."""
    free: int = 8
    """Number of losses at a hurdle before it stops any program."""
    deterministic: bool = True
    """true: the same history with any number of workers; false: every finished program counts at
    once, and no worker waits.
    """
    ahead: int = 8
    """For deterministic searches: programs that may be in work at once. Program n is bred from
    those up to n - ahead.
    """
    budget: int = 900
    """Steps of a whole training, for the start program."""
    step_costs: Literal["time", "flops", "same"] = "time"
    """How a step of another program is charged to the budget: time: a probe compares it with the
    start's, and a step twice as slow counts two; flops: the same with floating-point operations of
    matrix products; same: every step counts one.
    """
    layers: int = 2
    """Blocks of the model: the program, repeated."""
    length: int = 64
    """Tokens of a sequence."""
    batch: int = 16
    """Sequences of a step."""
    parameters: tuple[int, int] = (88_000, 118_000)
    """Fewest and most parameters of a model: programs are widened or narrowed into that band."""
    lr: float = 3e-3
    """Learning rate of AdamW after warm-up; then it falls with the root of the steps."""
    warmup: int = 100
    """Steps of warm-up."""
    eval_tokens: int = 16_384
    """Held-out tokens that a loss is measured on."""
    finalists: int = 3
    """Best programs that are trained again from fresh initial values on data in another order."""
    ancestors: int = 2
    """Nearest ancestors of the winner that are trained again as well."""
    final_seeds: int = 4
    """Trainings of each of them and of the start."""
    sizes: tuple[float, ...] = (0.5, 2.0)
    """Multiples of parameters and budget at which start and winner are trained for the power law;
    [] for none.
    """
    size_seeds: int = 2
    """Trainings at each of these sizes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where programs are trained; on cuda worker processes share the GPU, and each of Ray's has one
    to itself.
    """
    timeout: float = 300.0
    """Seconds without a sign of life until a worker is killed."""
    memory: float = 4.0
    """GiB that a worker process on cpu may take beyond what it has at its start; not for Ray, which
    sets limits itself.
    """

    def __post_init__(self) -> None:
        check_finite(self)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if min(self.sizes, default=1) <= 0:
            raise ValueError(f"sizes is {list(self.sizes)}; multiples must be positive")
        for name in ("hurdles", "finalists", "ancestors", "free"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.tournament <= self.population:
            raise ValueError(
                f"tournament is {self.tournament}; it must not be larger than population, "
                f"{self.population}"
            )
        if not self.copies <= self.children:
            raise ValueError(
                f"copies is {self.copies}; it must not be larger than children, {self.children}"
            )
        if min(self.mutations) < 0 or not any(self.mutations):
            raise ValueError(
                f"mutations is {list(self.mutations)}; weights must not be negative, and not all 0"
            )
        if not 0 < self.parameters[0] <= self.parameters[1]:
            raise ValueError(f"parameters is {list(self.parameters)}; it must be [fewest, most]")


def load_settings(
    path: Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings of a YAML file, or `values`, with `key=value` overrides.

    ValueError names the wrong key, FileNotFoundError the missing file.
    """
    values = dict(values or {})
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no settings file {path}")
        values = parse(read_small(path, MOST_BYTES).decode(), str(path)) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected keys such as 'text: FILE'")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override '{override}': expected key=value, such as children=100")
        # As YAML, like a value in the file: children=100 is a number, sizes=[] an empty list.
        values[key] = parse(text, f"override '{override}'")
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> Settings:
    """Return checked settings. ValueError names the first wrong key."""
    names = [item.name for item in fields(Settings)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(
                f"unknown key '{key}'{hint} (memshard search run --explain lists them)"
            )
    if "text" not in values:
        raise ValueError("text is required: a file of text to train on; add text=FILE")
    try:
        # Through JSON: there strict takes a list for a tuple and an integer for a float, but
        # neither "8" for a number nor 1 for true.
        return TypeAdapter(Settings).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":
            # `__post_init__` has named key and bound already; pydantic's wording adds nothing.
            cause: ValueError = problem["ctx"]["error"]
            raise cause from None
        key = str(problem["loc"][0])
        raise ValueError(
            f"{key} is {values[key]!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"
        ) from None


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain JSON values."""
    # Tuples become lists, so that settings read back from a journal are equal to these.
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return values
