"""The loop's part of a recipe: steps, batches, precision, and when to log, evaluate and save."""

from dataclasses import dataclass, field
from typing import Literal

from memshard.trainer.config.fields import may_change


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """The dynamic loss scale of fp16; idle in other arithmetic."""

    initial: float = may_change(65536.0)
    """First scale. Too high costs a few skipped steps at the start."""

    growth_interval: int = may_change(1000)
    """Steps without overflow after which the scale grows; each growth that turns out too much costs
    a skipped step.
    """

    backoff: float = may_change(0.5)
    """Factor of the scale after an overflow; growth undoes one. Powers of 2 keep the arithmetic
    exact.
    """

    minimum: float = may_change(1.0)
    """The run stops when the scale falls below this: the gradients are then not just too large for
    fp16.
    """

    def __post_init__(self) -> None:
        if self.growth_interval < 1:
            raise ValueError(
                f"train.loss_scale.growth_interval is {self.growth_interval}; it must be at least 1"
            )
        if not 0 < self.backoff < 1:
            raise ValueError(
                f"train.loss_scale.backoff is {self.backoff}; it must be between 0 and 1"
            )
        if not 0 < self.minimum <= self.initial < float("inf"):
            raise ValueError(
                f"train.loss_scale goes from {self.initial} down to {self.minimum}; minimum must "
                "be above 0 and initial at least minimum"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = may_change(1000)
    """Optimizer steps of the whole run."""

    batch: int = 32
    """Sequences in a step, over all ranks; the number of ranks never changes what a step trains on.
    """

    micro_batch: int | None = may_change(None)
    """Sequences a rank processes at once; by default the rank's whole share of the batch."""

    seed: int = 0
    """Decides initial weights, data order and dropout."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = may_change("auto")
    """Arithmetic of matrix products: auto is bf16 on GPUs of capability 8.0 and newer, fp16 on
    older ones, fp32 on CPU. Parameters stay fp32.
    """

    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    """The dynamic loss scale of fp16; idle in other arithmetic."""

    engine: Literal["torch", "deepspeed"] = may_change("torch")
    """What trains the dense parameters: plain torch, or DeepSpeed (pip install
    'memshard[deepspeed]').
    """

    zero: Literal[0, 1, 2] = may_change(0)
    """ZeRO stage, with the same results: 1 splits the optimizer's states over the ranks (and under
    DeepSpeed the fp32 masters); 2, which needs DeepSpeed, also splits gradients.
    """

    offload: bool = may_change(False)
    """Keep the optimizer's states in host memory and update there; needs DeepSpeed and zero of at
    least 1.
    """

    clip: float = 1.0
    """Largest global norm of the dense gradient; 0 switches clipping off. Tables have their own,
    tables.clip.
    """

    key_balance: float = 0.0
    """Weight of a loss that is 1 where all sub-keys are read equally often and more where they are
    not; 0 is none. Try 0.01 to 0.1.
    """

    log_every: int = may_change(10)
    """Steps between two lines of metrics."""

    wandb: str | None = may_change(None)
    """Project at Weights & Biases to send the lines to (pip install 'memshard[wandb]'), next to
    metrics.jsonl and TensorBoard.
    """

    eval_every: int = may_change(200)
    """Steps between two evaluations on held-out text; 0 evaluates only at the end."""

    eval_tokens: int = may_change(262_144)
    """Held-out tokens read in an evaluation during training, at most."""

    save_every: int = may_change(200)
    """Steps between two checkpoints; the last step is always saved."""

    keep: int = may_change(2)
    """Newest checkpoints to keep, at least 2."""

    keep_every: int = may_change(0)
    """Checkpoints of steps that this divides are kept for good; 0 keeps none but the newest."""

    max_skipped: int = may_change(10)
    """Consecutive steps that may be skipped because of a gradient that is not finite, before the
    run stops; in fp16, where such steps lower the loss scale, loss_scale.minimum decides
    instead.
    """

    compile: bool = may_change(False)
    """Compile mixers and feedforwards with torch.compile: the first step takes minutes, later ones
    less time.
    """

    profile: tuple[int, int] | None = may_change(None)
    """First and last step, counted from 1, of which each rank writes a trace into the run's folder.
    """

    checkpointing: Literal["none", "full", "selective"] = may_change("none")
    """Activations that backward computes again: full is whole blocks (a third more multiplications,
    a block's input is kept), selective their feedforward half (a ninth more, about half is
    kept). Results stay the same. Reversible blocks need none.
    """

    chunk: int = may_change(0)
    """Tokens of a sequence that feedforward, memory, head and loss take at a time, so that for long
    texts neither hidden layers nor logits are ever whole in memory; backward computes each piece
    again. 0 for all at once.
    """

    carry_state: bool = False
    """Let a row of the batch go on where it ended a step before: mixers start from the state they
    had there (without gradient) instead of nothing. data.document_mask forgets it where a
    document ends. For linear and delta mixers without positions.
    """

    segments: int = may_change(1)
    """Pieces of a sequence that a step takes one after the other: gradients flow through the states
    between them (truncated backpropagation over so many segments), only one piece's activations
    are in memory, and backward computes each again. For linear and delta mixers.
    """

    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary in training; 0.1 is usual in
    translation.
    """

    mask_share: float = 0.15
    """Of masked-token models (model.encoder_layers of all layers): share of a text's tokens that
    are to be found.
    """

    check_inversion: bool = may_change(False)
    """For debugging reversible blocks: compare each block's rebuilt input with a checksum of the
    true one, and fail where they differ.
    """

    def __post_init__(self) -> None:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"train.profile is {list(self.profile)}; expected the first and last step, "
                "counted from 1, such as [11, 13]"
            )
        for name in ("steps", "batch", "segments", "log_every", "save_every", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}; it must be at least 1, or null for the "
                "rank's whole share"
            )
        for name in ("chunk", "clip", "key_balance", "eval_every", "keep_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing is {self.label_smoothing}; it must be at least 0 and "
                "below 1"
            )
        if not 0 < self.mask_share < 1:
            raise ValueError(f"train.mask_share is {self.mask_share}; it must be between 0 and 1")
        if self.zero == 2 and self.engine != "deepspeed":
            raise ValueError(
                "train.zero is 2, which only DeepSpeed has: set train.engine=deepspeed, or "
                "train.zero=1"
            )
        if self.offload and (self.engine != "deepspeed" or not self.zero):
            raise ValueError("train.offload needs train.engine=deepspeed and train.zero of 1 or 2")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"train.seed is {self.seed}; it must be at least 0 and below 2^63")
        if self.keep < 2:
            raise ValueError(
                f"train.keep is {self.keep}; at least 2, so that a damaged newest checkpoint "
                "costs little"
            )
