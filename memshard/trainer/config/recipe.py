"""A recipe: everything that decides one training run. Each field's docstring is what `memshard config explain` prints."""

from dataclasses import dataclass, field
from typing import Literal

from memshard.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which token shards to read, and how they are cut."""

    path: str
    """Folder that `memshard data build` wrote, or the http(s) or s3 URL of a copy, or `pipe:` and a command that prints {file}."""

    length: int = 256
    """Tokens in a training sequence; the most in a record (pair or image), longer ones are left out."""

    mixture: dict[str, float] = field(default_factory=dict)
    """Folders to train on together, each with its weight, built with the same tokenizer; `path` is then for evaluation only."""

    mixture_by: Literal["weight", "epochs"] = "weight"
    """What a folder's weight in the mixture says: its share of the samples, or how often it is read while the others are once."""

    document_mask: bool = False
    """Keep attention inside a document (slower: an explicit mask) instead of letting packed documents see each other."""

    workers: int = 0
    """Processes a rank reads ahead with: of use for raw text, which is tokenised while it is read."""

    damage_tolerance: float = 0.001
    """Share of the tokens that may be unreadable: they are masked, and beyond it the run fails."""


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """The dynamic loss scale of fp16; idle in other arithmetic."""

    initial: float = 65536.0
    """First scale. Too high costs a few skipped steps at the start."""

    growth_interval: int = 1000
    """Steps without overflow after which the scale grows; each growth that turns out too much costs a skipped step."""

    backoff: float = 0.5
    """Factor of the scale after an overflow; growth undoes one. Powers of 2 keep the arithmetic exact."""

    minimum: float = 1.0
    """The run stops when the scale falls below this: the gradients are then not just too large for fp16."""

    def __post_init__(self) -> None:
        if self.growth_interval < 1:
            raise ValueError(f"train.loss_scale.growth_interval is {self.growth_interval}; it must be at least 1")
        if not 0 < self.backoff < 1:
            raise ValueError(f"train.loss_scale.backoff is {self.backoff}; it must be between 0 and 1")
        if not 0 < self.minimum <= self.initial < float("inf"):
            raise ValueError(
                f"train.loss_scale goes from {self.initial} down to {self.minimum}; minimum must be above 0 and initial at least minimum"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps of the whole run."""

    batch: int = 32
    """Sequences in a step, over all ranks; the number of ranks never changes what a step trains on."""

    micro_batch: int | None = None
    """Sequences a rank processes at once; by default the rank's whole share of the batch."""

    seed: int = 0
    """Decides initial weights, data order and dropout."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Arithmetic of matrix products: auto is bf16 on GPUs of capability 8.0 and newer, fp16 on older ones, fp32 on CPU. Parameters
    stay fp32."""

    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """The dynamic loss scale of fp16; idle in other arithmetic."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """What trains the dense parameters: plain torch, or DeepSpeed (pip install 'memshard[deepspeed]')."""

    zero: Literal[0, 1, 2] = 0
    """ZeRO stage, with the same results: 1 splits AdamW's moments over the ranks (under DeepSpeed fp32 masters too), 2, which needs
    DeepSpeed, gradients too."""

    offload: bool = False
    """Keep AdamW's states in host memory and update there; needs DeepSpeed and zero of at least 1."""

    clip: float = 1.0
    """Largest global norm of the dense gradient; 0 switches clipping off. Tables have their own, tables.clip."""

    key_balance: float = 0.0
    """Weight of a loss that is 1 where all sub-keys are read equally often and more where they are not; 0 is none. Try 0.01 to 0.1."""

    log_every: int = 10
    """Steps between two lines of metrics."""

    wandb: str | None = None
    """Project at Weights & Biases to send the lines to (pip install 'memshard[wandb]'), next to metrics.jsonl and TensorBoard."""

    eval_every: int = 200
    """Steps between two evaluations on held-out text; 0 evaluates only at the end."""

    eval_tokens: int = 262_144
    """Held-out tokens read in an evaluation during training, at most."""

    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""

    keep: int = 2
    """Newest checkpoints to keep, at least 2."""

    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none but the newest."""

    max_skipped: int = 10
    """Consecutive steps that may be skipped because of a gradient that is not finite, before the run stops; in fp16, where such
    steps lower the loss scale, loss_scale.minimum decides instead."""

    compile: bool = False
    """Compile mixers and feedforwards with torch.compile: the first step takes minutes, later ones less time."""

    profile: tuple[int, int] | None = None
    """First and last step, counted from 1, of which each rank writes a trace into the run's folder."""

    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activations that backward computes again: full is whole blocks (a third more multiplications, a block's input is kept), selective
    their feedforward half (a ninth more, about half is kept). Results stay the same. Reversible blocks need none."""

    chunk: int = 0
    """Tokens of a sequence that feedforward, memory, head and loss take at a time, so that for long texts neither hidden layers nor logits
    are ever whole in memory; backward computes each piece again. 0 for all at once."""

    carry_state: bool = False
    """Let a row of the batch go on where it ended a step before: mixers start from the state they had there (without gradient) instead
    of nothing. data.document_mask forgets it where a document ends. For linear and delta mixers without positions."""

    segments: int = 1
    """Pieces of a sequence that a step takes one after the other: gradients flow through the states between them (truncated backpropagation
    over so many segments), only one piece's activations are in memory, and backward computes each again. For linear and delta mixers."""

    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary in training; 0.1 is usual in translation."""

    mask_share: float = 0.15
    """Of masked-token models (model.encoder_layers of all layers): share of a text's tokens that are to be found."""

    check_inversion: bool = False
    """For debugging reversible blocks: compare each block's rebuilt input with a checksum of the true one, and fail where they differ."""

    def __post_init__(self) -> None:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"train.profile is {list(self.profile)}; expected the first and last step, counted from 1, such as [11, 13]")
        for name in ("steps", "batch", "segments", "log_every", "save_every", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"train.micro_batch is {self.micro_batch}; it must be at least 1, or null for the rank's whole share")
        for name in ("chunk", "clip", "key_balance", "eval_every", "keep_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"train.mask_share is {self.mask_share}; it must be between 0 and 1")
        if self.zero == 2 and self.engine != "deepspeed":
            raise ValueError("train.zero is 2, which only DeepSpeed has: set train.engine=deepspeed, or train.zero=1")
        if self.offload and (self.engine != "deepspeed" or not self.zero):
            raise ValueError("train.offload needs train.engine=deepspeed and train.zero of 1 or 2")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"train.seed is {self.seed}; it must be at least 0 and below 2^63")
        if self.keep < 2:
            raise ValueError(f"train.keep is {self.keep}; at least 2, so that a damaged newest checkpoint costs little")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW over the dense parameters."""

    lr: float = 1e-3
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moment."""

    eps: float = 1e-8
    """Added to the denominator."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""

    schedule: Literal["constant", "inverse_sqrt", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, lr * sqrt(warmup / step), or half a cosine to final_lr at train.steps."""

    warmup: int = 100
    """Steps of linear warm-up from 0."""

    final_lr: float = 0.1
    """Where the cosine ends, as a share of lr."""

    def __post_init__(self) -> None:
        _check_adam("optimizer", self.lr, self.betas, self.eps)
        for name in ("weight_decay", "warmup", "final_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The value tables and their row-sparse Adam: constant learning rate, no decay (Lample et al. 2019)."""

    lr: float = 1e-3
    """Learning rate, constant."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moment of a touched row."""

    eps: float = 1e-8
    """Added to the denominator."""

    semantics: Literal["lazy", "row-step", "catch-up", "dense"] = "lazy"
    """Rows that a step does not read: lazy lets their moments wait, catch-up decays them later, row-step counts each row's own steps,
    dense moves every row in every step."""

    clip: float = 0.0
    """Largest norm of all tables' gradients together; 0 switches clipping off and saves a pass over the gradients."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How values are stored; moments, sums and gradients stay fp32."""

    rounding: Literal["master", "stochastic"] = "master"
    """How fp16 and bf16 values take small changes: through an fp32 copy, or rounded up or down at random (4 bytes a value less)."""

    place: Literal["device", "host"] = "device"
    """Where values and moments lie: with the model, or in host memory while the model is on a GPU; the CPU then sums and updates rows."""

    dead_after: int = 1000
    """Steps without a read after which a row, or a sub-key, counts as dead."""

    revive: bool = False
    """Every dead_after steps, move dead sub-keys next to hot ones and copy the hot ones' values to their dead rows."""

    def __post_init__(self) -> None:
        _check_adam("tables", self.lr, self.betas, self.eps)
        if not self.clip >= 0:
            raise ValueError(f"tables.clip is {self.clip}; it must be at least 0")
        if self.dead_after < 1:
            raise ValueError(f"tables.dead_after is {self.dead_after}; it must be at least 1")

    @property
    def value_bytes(self) -> int:
        """Of one stored value."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def state_bytes(self) -> int:
        """Of two moments, and of the fp32 copy where there is one."""
        return 12 if self.dtype != "fp32" and self.rounding == "master" else 8


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks; nothing here changes what is trained."""

    tensor: int = 1
    """Neighbouring ranks that share the large matrices and the tokens of a sequence (tensor parallelism); it divides heads and widths."""

    share: Literal["heads", "sequence"] = "heads"
    """What the ranks of parallel.tensor share: heads, that is large matrices and, between them, the tokens of a sequence; or sequence, the
    tokens alone: matrices are copied, and only states of linear and delta mixers travel."""

    memory: int | None = None
    """Ranks that split a table; by default all. Fewer make several groups, each with a copy, whose row gradients are summed."""

    layout: Literal["auto", "rows", "columns", "tensor"] = "auto"
    """What a rank holds: a range of rows, or a slice of every value; auto takes what sends least (`memshard plan` tells). tensor: slices
    of every value over each group of parallel.tensor ranks, which look up the same tokens and send no row numbers."""

    exchange: Literal["auto", "pooled", "unique"] = "auto"
    """What travels with layout rows: pooled sums of each token's reads, or each distinct row once; auto takes what sends least."""

    checksum_every: int = 1000
    """Steps between two proofs that copies of weights on different ranks are equal to the last bit; 0 proves it only at the start."""

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor is {self.tensor}; it must be at least 1")
        if self.layout == "tensor" and self.tensor == 1:
            raise ValueError("parallel.layout is tensor, which needs parallel.tensor of at least 2: raise that, or set layout to auto")
        if self.layout == "tensor" and self.share == "sequence":
            raise ValueError("parallel.layout is tensor, for ranks that look up equal tokens, and parallel.share sequence: leave one out")
        if self.checksum_every < 0:
            raise ValueError(f"parallel.checksum_every is {self.checksum_every}; it must be at least 0")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"parallel.memory is {self.memory}; it must be at least 1, or null for all ranks")


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """What to do about a loss that jumps, and how long ranks wait for each other. A gradient that is not finite is always skipped."""

    loss_spike: Literal["warn", "skip", "rewind"] = "warn"
    """A step whose loss stands out: say so, drop its update, or go back to the last checkpoint and on with the data after it.
    With rewind, more than train.max_skipped skipped steps in a row rewind, too."""

    threshold: float = 6.0
    """How many robust standard deviations (median distance from the median) above the median of recent losses is a spike."""

    window: int = 64
    """How many recent losses that is; before so many steps nothing is a spike."""

    rewinds: int = 5
    """How often a run may rewind before it stops."""

    first_timeout: float = 1800.0
    """Seconds a rank waits for another in set-up, the first step, evaluations and saves, before it gives up."""

    timeout: float = 300.0
    """The same in later steps: the time in which a dead or hanging rank is noticed."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"guards.threshold is {self.threshold}; it must be above 0")
        if self.window < 2:
            raise ValueError(f"guards.window is {self.window}; it must be at least 2")
        for name in ("first_timeout", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"guards.{name} is {getattr(self, name)}; it must be above 0")
        if self.rewinds < 0:
            raise ValueError(f"guards.rewinds is {self.rewinds}; it must be at least 0")


def _check_adam(section: str, lr: float, betas: tuple[float, float], eps: float) -> None:
    for name, value in (("lr", lr), ("eps", eps)):
        if not value >= 0:  # NaN, too
            raise ValueError(f"{section}.{name} is {value}; it must be at least 0")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{section}.betas is {list(betas)}; both must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    data: DataConfig
    """Which token shards to read, and how they are cut."""

    init_from: str | None = None
    """A run folder or checkpoint whose weights and moments a new run begins with; memory layers and convolutions may be new, tables have
    more keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """A transformer of three-slot blocks: decoder, encoder, or both."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW over the dense parameters."""

    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    """Row-sparse Adam over the value tables."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How a run is spread over ranks; nothing here changes what is trained."""

    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """What to do about a loss that jumps, and how long ranks wait for each other."""

    def __post_init__(self) -> None:
        reversible = self.model.residual == "reversible"
        if reversible and self.train.checkpointing != "none":
            raise ValueError(
                f"train.checkpointing is {self.train.checkpointing}, but reversible blocks keep nothing that could be computed again: "
                "leave it out, or set model.residual to pre or post"
            )
        _check_states(self)
        if self.parallel.share == "sequence" and self.parallel.tensor > 1:
            check_states(self.model, "parallel.share=sequence", endless=False)
        if self.model.program is not None and self.data.document_mask:
            raise ValueError("data.document_mask is set, but model.program sees all earlier tokens: leave one of them out")
        memory = self.model.memory
        if self.train.chunk and memory.layers and memory.query_norm == "batch":
            raise ValueError(
                f"train.chunk is {self.train.chunk}, but model.memory.query_norm=batch normalises over all tokens of a batch: "
                "use lagged, layer, rms or none, or leave train.chunk out"
            )
        if self.model.encoder_layers and (self.parallel.tensor > 1 or self.data.document_mask):
            raise ValueError(
                f"model.encoder_layers is {self.model.encoder_layers}, and encoders know neither parallel.tensor nor data.document_mask: "
                "leave those out"
            )
        if self.train.label_smoothing and self.model.adaptive_cutoffs:
            raise ValueError("train.label_smoothing needs one softmax, and model.adaptive_cutoffs makes several: leave one of them out")
        if self.train.label_smoothing and self.parallel.tensor > 1:
            raise ValueError("train.label_smoothing needs the whole vocabulary on a rank: set parallel.tensor to 1, or leave it out")
        if self.train.check_inversion and not reversible:
            raise ValueError(f"train.check_inversion is for model.residual=reversible, which is {self.model.residual} here: leave it out")
        if self.tables.revive and self.train.engine == "deepspeed" and self.train.zero:
            raise ValueError("tables.revive moves sub-keys, and DeepSpeed keeps copies of its own: set train.engine=torch, or train.zero=0")


def check_states(model: ModelConfig, what: str, endless: bool) -> None:
    """ValueError unless all mixers of a model have states of constant size; endless: and no positions, so that text may go on forever.

    what: needs it, for the message.
    """
    if model.program is not None:
        raise ValueError(f"{what} is for linear and delta mixers, whose state keeps its size, and model.program is a block without one")
    if model.encoder_layers:
        raise ValueError(f"{what} is for language models, and model.encoder_layers is {model.encoder_layers}: leave one of them out")
    if other := sorted({model.mixer.kind_of(layer) for layer in range(model.layers)} - {"linear", "delta"}):
        raise ValueError(f"{what} is for linear and delta mixers, whose state keeps its size, and model.mixer has {', '.join(other)}")
    if endless and model.position != "none":
        raise ValueError(f"{what} goes on without end, but model.position is {model.position}: it needs a model with model.position=none")


def _check_states(recipe: Recipe) -> None:
    """Whether mixers can go on from a state in training."""
    train, model = recipe.train, recipe.model
    if not train.carry_state and train.segments == 1:
        return
    key = "train.carry_state" if train.carry_state else "train.segments"
    check_states(model, key, endless=train.carry_state)
    if recipe.parallel.tensor > 1:
        raise ValueError(f"{key} does not work where ranks share a sequence, and parallel.tensor is {recipe.parallel.tensor}: set it to 1")
    if train.carry_state and recipe.data.mixture:
        raise ValueError("train.carry_state needs rows that go on, and data.mixture draws each from any folder: leave one of them out")
    reversible = model.residual == "reversible"
    if train.segments > 1 and (reversible or train.checkpointing != "none" or train.chunk):
        other_key = "model.residual=reversible" if reversible else "train.chunk" if train.chunk else "train.checkpointing"
        raise ValueError(f"train.segments keeps one piece in memory and computes it again: leave out {other_key}, or train.segments")
