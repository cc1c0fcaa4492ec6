"""A recipe: everything that decides a training run. `memshard config explain` prints a field's
docstring, and for a section the docstring of its class.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from memshard.data_pipeline.format.kinds import Order
from memshard.models.config import ModelConfig
from memshard.models.mixers.kinds import MixerKind, names
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.trainer.config.fields import check_finite, may_change
from memshard.trainer.config.optimizers import OptimizerConfig, TableOptimizerConfig
from memshard.trainer.config.training import TrainConfig

if TYPE_CHECKING:
    LayoutSetting = str
else:
    # The registry's names, which mypy cannot read.
    LayoutSetting = Literal[("auto", *LAYOUTS)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which token shards to read, and how they are cut."""

    path: str = may_change()
    """Folder that `memshard data build` wrote, or the http(s) or s3 URL of a copy, or `pipe:` and a
    command that prints {file}; the latter two in a file need --allow.
    """

    length: int = 256
    """Tokens in a training sequence. Records (pairs, images) with more tokens are left out."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Folders to train on together, with their weights, built with the same tokenizer; `path` is
    then used for evaluation only.
    """

    mixture_by: Literal["weight", "epochs"] = "weight"
    """Meaning of a weight in the mixture: weight, the folder's share of the samples; epochs, how
    often the folder is read in an epoch of the mixture.
    """

    order: Order = "auto"
    """Order of the training sequences. contiguous: each row of a batch goes on where that of the
    step before ended, as train.carry_state needs; shuffled: the sequences of joined documents,
    permuted; best-fit: whole documents packed into sequences, which begin with a document or go on
    in a long one, permuted. auto: shuffled, but contiguous for train.carry_state. Records (pairs,
    images) have an order of their own.
    """

    document_mask: bool = False
    """Keep attention inside a document (slower: an explicit mask) instead of letting packed
    documents see each other.
    """

    workers: int = may_change(0)
    """Processes of each rank that read ahead; useful for raw text, which is tokenised when read."""

    damage_tolerance: float = may_change(0.001)
    """Share of the tokens that may be unreadable: they are masked. With more, the run fails."""

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The spread of a run over ranks; nothing here changes what is trained (where train.micro_batch
    and batch statistics meet, see docs/parallel.md).
    """

    tensor: int = may_change(1)
    """Number of neighbouring ranks that share the large matrices and the tokens of a sequence
    (tensor parallelism). Must divide heads and widths.
    """

    share: Literal["heads", "sequence"] = may_change("heads")
    """What the ranks of parallel.tensor share. heads: the large matrices and, between them, the
    tokens of a sequence. sequence: only the tokens; every rank has whole matrices, and ranks send
    each other the states of mixers that have one of constant size.
    """

    memory: int | None = may_change(None)
    """Number of ranks that split a table; null for all. Fewer ranks make several groups, each with
    a copy of the table, whose row gradients are summed.
    """

    layout: LayoutSetting = may_change("auto", choices=LAYOUTS)
    """How a value table is split over ranks, and what they send to read it; auto takes the layout
    that costs least to send and sort (`memshard plan` shows the comparison).
    """

    checksum_every: int = may_change(1000)
    """Number of steps between two checks that copies of weights and optimizer states on different
    ranks are equal to the last bit; 0: no regular ones. All runs check at each start, 1, 2 and 10
    steps later, and before a checkpoint is written.
    """

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor is {self.tensor}; it must be at least 1")
        layout = LAYOUTS.get(self.layout)
        if layout is not None and layout.within_tensor_group:
            _check_layout_of_tensor_groups(self)
        if self.checksum_every < 0:
            raise ValueError(
                f"parallel.checksum_every is {self.checksum_every}; it must be at least 0"
            )
        if self.memory is not None and self.memory < 1:
            raise ValueError(
                f"parallel.memory is {self.memory}; it must be at least 1, or null for all ranks"
            )


def _check_layout_of_tensor_groups(settings: ParallelConfig) -> None:
    """Raise ValueError unless ranks along the tensor axis look up the same tokens."""
    if settings.tensor == 1:
        raise ValueError(
            f"parallel.layout is {settings.layout}, which needs parallel.tensor of at least 2: "
            "raise that, or set layout to auto"
        )
    if settings.share == "sequence":
        raise ValueError(
            f"parallel.layout is {settings.layout}, for ranks that look up equal tokens, and "
            "parallel.share sequence: leave one out"
        )


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """Responses to a loss that jumps, and how long ranks wait for each other. A step whose gradient
    is not finite is always skipped.
    """

    loss_spike: Literal["warn", "skip", "rewind"] = may_change("warn")
    """Response to a spike, a loss far above recent ones: warn, skip its update, or rewind to the
    last checkpoint and continue with the data after the step. With rewind, exceeding
    train.max_skipped consecutive skips also triggers a rewind.
    """

    threshold: float = may_change(6.0, infinite=True)
    """A loss is a spike if it exceeds the median of recent losses by this many robust standard
    deviations (1.48 times the median distance from the median); .inf: none ever is.
    """

    window: int = may_change(64)
    """Number of recent losses to compare with; earlier steps are never spikes."""

    rewinds: int = may_change(5)
    """How often a run may rewind before it stops."""

    first_timeout: float = may_change(1800.0)
    """Seconds after which a rank that waits for another gives up, during set-up, the first step,
    evaluations and saves.
    """

    timeout: float = may_change(300.0)
    """The same for later steps: a dead or hanging rank is noticed within this time."""

    def __post_init__(self) -> None:
        # Written so that it also refuses NaN.
        if not self.threshold > 0:
            raise ValueError(f"guards.threshold is {self.threshold}; it must be above 0")
        # Of a single loss the median distance from the median is 0.
        if self.window < 2:
            raise ValueError(f"guards.window is {self.window}; it must be at least 2")
        for name in ("first_timeout", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"guards.{name} is {getattr(self, name)}; it must be above 0")
        if self.rewinds < 0:
            raise ValueError(f"guards.rewinds is {self.rewinds}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    data: DataConfig
    init_from: str | None = may_change(None)
    """Run folder or checkpoint whose weights and moments a new run starts from. Memory layers and
    convolutions may be added, and tables may have more keys.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        _check_recomputation(self.train, self.model)
        _check_states(self)
        if self.parallel.share == "sequence" and self.parallel.tensor > 1:
            check_states(
                self.model, "parallel.share=sequence", able=lambda kind: kind.sequence_bytes
            )
        _check_masks(self)
        _check_label_smoothing(self)
        _check_engine(self)
        _check_sub_keys(self)


def _check_recomputation(train: TrainConfig, model: ModelConfig) -> None:
    reversible = model.residual == "reversible"
    if reversible and train.checkpointing != "none":
        raise ValueError(
            f"train.checkpointing is {train.checkpointing}, but reversible blocks keep "
            "nothing that could be computed again: "
            "leave it out, or set model.residual to pre or post"
        )
    if train.check_inversion and not reversible:
        raise ValueError(
            "train.check_inversion is for model.residual=reversible, which is "
            f"{model.residual} here: leave it out"
        )
    memory = model.memory
    # A chunk's statistics would differ from the batch's, and results would depend on the chunk.
    if train.chunk and memory.layers and memory.query_norm == "batch":
        raise ValueError(
            f"train.chunk is {train.chunk}, but model.memory.query_norm=batch normalises "
            "over all tokens of a batch: "
            "use lagged, layer, rms or none, or leave train.chunk out"
        )


def _check_masks(recipe: Recipe) -> None:
    model = recipe.model
    if model.program is not None and recipe.data.document_mask:
        raise ValueError(
            "data.document_mask is set, but model.program sees all earlier tokens: leave one "
            "of them out"
        )
    if model.encoder_layers and (recipe.parallel.tensor > 1 or recipe.data.document_mask):
        raise ValueError(
            f"model.encoder_layers is {model.encoder_layers}, and encoders know neither "
            "parallel.tensor nor data.document_mask: "
            "leave those out"
        )


def _check_label_smoothing(recipe: Recipe) -> None:
    if recipe.train.label_smoothing and recipe.model.adaptive_cutoffs:
        raise ValueError(
            "train.label_smoothing needs one softmax, and model.adaptive_cutoffs makes "
            "several: leave one of them out"
        )
    if recipe.train.label_smoothing and recipe.parallel.tensor > 1:
        raise ValueError(
            "train.label_smoothing needs the whole vocabulary on a rank: set parallel.tensor "
            "to 1, or leave it out"
        )


def _check_engine(recipe: Recipe) -> None:
    # Its fp32 copies would put the old sub-keys back at the next update.
    if recipe.tables.revive and recipe.train.engine == "deepspeed" and recipe.train.zero:
        raise ValueError(
            "tables.revive moves sub-keys, of which DeepSpeed keeps copies: set "
            "train.engine=torch, or train.zero=0"
        )


def _check_sub_keys(recipe: Recipe) -> None:
    model = recipe.model
    for key, value in (
        ("tables.revive", recipe.tables.revive),
        ("train.key_balance", recipe.train.key_balance),
    ):
        if value and model.ngram.layers and not model.memory.layers:
            raise ValueError(
                f"{key} is {value}, and is for the sub-keys of product-key memories; tables of "
                "n-grams have none: leave it out"
            )


def check_states(
    model: ModelConfig,
    what: str,
    endless: bool = False,
    able: Callable[[MixerKind], object] = lambda kind: kind.constant_state,
) -> None:
    """Raise ValueError unless all mixers of a model have states of constant size.

    what: the key that needs them, for the message. endless: the model must also have no positions,
    so that text may go on forever. able: whether a kind has what is needed.
    """
    required = f"{names(able)} mixers, whose state keeps its size"
    if model.program is not None:
        raise ValueError(f"{what} is for {required}, and model.program is a block without one")
    if model.encoder_layers:
        raise ValueError(
            f"{what} is for language models, and model.encoder_layers is {model.encoder_layers}: "
            "leave one of them out"
        )
    kinds = {model.mixer.kind_of(layer) for layer in range(model.layers)}
    if other := sorted(kind.name for kind in kinds if not able(kind)):
        raise ValueError(f"{what} is for {required}, and model.mixer has {', '.join(other)}")
    if endless and model.position != "none":
        raise ValueError(
            f"{what} goes on without end, but model.position is {model.position}: it needs a "
            "model with model.position=none"
        )


def _check_states(recipe: Recipe) -> None:
    """Raise ValueError if mixers are to continue from states in training and cannot."""
    train, model = recipe.train, recipe.model
    if not train.carry_state and train.segments == 1:
        return
    key = "train.carry_state" if train.carry_state else "train.segments"
    check_states(model, key, endless=train.carry_state)
    if recipe.parallel.tensor > 1:
        raise ValueError(
            f"{key} does not work where ranks share a sequence, and parallel.tensor is "
            f"{recipe.parallel.tensor}: set it to 1"
        )
    if train.carry_state and recipe.data.mixture:
        raise ValueError(
            "train.carry_state needs rows that go on, and data.mixture draws each from any "
            "folder: leave one of them out"
        )
    if train.carry_state and recipe.data.order not in ("auto", "contiguous"):
        raise ValueError(
            "train.carry_state needs rows that go on, and data.order is "
            f"{recipe.data.order}: leave one of them out, or set data.order to contiguous"
        )
    reversible = model.residual == "reversible"
    if train.segments > 1 and (reversible or train.checkpointing != "none" or train.chunk):
        other_key = (
            "model.residual=reversible"
            if reversible
            else "train.chunk"
            if train.chunk
            else "train.checkpointing"
        )
        raise ValueError(
            "train.segments keeps one segment in memory and computes it again: leave out "
            f"{other_key}, or train.segments"
        )
