"""Section `train` of a recipe: steps, batches, precision, when to log, evaluate and save."""

from dataclasses import dataclass, field
from typing import Literal

from memshard.trainer.config.fields import check_kinds, may_change


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """The dynamic loss scale of fp16; unused in other arithmetic."""

    initial: float = may_change(65536.0)
    """First scale. If it is too high, a few steps at the start are skipped."""

    growth_interval: int = may_change(1000)
    """Steps without overflow after which the scale grows. Growing too far costs a skipped step."""

    backoff: float = may_change(0.5)
    """Factor of the scale after an overflow; growth divides by it. Powers of 2 are exact."""

    minimum: float = may_change(1.0)
    """The run stops when the scale falls below this: gradients are then wrong, not just large."""

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
    """The training loop."""

    steps: int = may_change(1000)
    """Optimizer steps of the whole run."""

    batch: int = 32
    """Sequences in a step over all ranks, whatever the number of ranks."""

    micro_batch: int | None = may_change(None)
    """Sequences that a rank processes at once; by default its whole share of the batch. Batch
    statistics (model.memory.query_norm batch or lagged) are those of the sequences that all ranks
    process at once: on other ranks keep micro_batch x ranks as it was.
    """

    seed: int = 0
    """Decides initial weights, data order and dropout."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = may_change("auto")
    """Arithmetic of matrix products. auto: bf16 on GPUs of capability 8.0 and newer, fp16 on older
    ones, fp32 on CPU. Parameters stay fp32.
    """

    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    engine: Literal["torch", "deepspeed"] = may_change("torch")
    """What trains the dense parameters: torch, or DeepSpeed (pip install 'memshard[deepspeed]')."""

    zero: Literal[0, 1, 2] = may_change(0)
    """ZeRO stage, with the same results: 1 splits the optimizer's states over the ranks (and under
    DeepSpeed the fp32 masters); 2, which needs DeepSpeed, also splits gradients.
    """

    offload: bool = may_change(False)
    """Keep the optimizer's states and updates in host memory; needs DeepSpeed, zero of 1 or 2."""

    clip: float = 1.0
    """Largest global norm of the dense gradient; 0: no clipping. For tables see tables.clip."""

    key_balance: float = 0.0
    """Weight of an added loss that is 1 if all sub-keys are read equally often, and larger if not;
    0: none. Try 0.01 to 0.1.
    """

    log_every: int = may_change(10)
    """Steps between two lines of metrics."""

    wandb: str | None = may_change(None)
    """Project at Weights & Biases to send the lines to (pip install 'memshard[wandb]'), next to
    metrics.jsonl and TensorBoard.
    """

    eval_every: int = may_change(200)
    """Steps between two evaluations on held-out text; 0: only at the end."""

    eval_tokens: int = may_change(262_144)
    """Most held-out tokens to read in an evaluation during training."""

    save_every: int = may_change(200)
    """Steps between two checkpoints; the last step is always saved."""

    keep: int = may_change(2)
    """Newest checkpoints to keep, at least 2."""

    keep_every: int = may_change(0)
    """Checkpoints of steps that are multiples of this are kept for good; 0: only the newest."""

    max_skipped: int = may_change(10)
    """The run stops after more consecutive skipped steps than this. In fp16, where a gradient that
    is not finite lowers the loss scale, loss_scale.minimum decides instead.
    """

    compile: bool = may_change(False)
    """Compile blocks, or their mixers and feedforwards: the first step takes minutes, later ones
    less time.
    """

    profile: tuple[int, int] | None = may_change(None)
    """First and last step, counted from 1, that each rank traces into the run's folder."""

    checkpointing: Literal["none", "full", "selective"] = may_change("none")
    """Activations that backward recomputes. full: whole blocks, of which only the input is kept (a
    third more multiplications). selective: their feedforward half (a ninth more; about half of
    the activations are kept). Results stay the same. Reversible blocks need none.
    """

    chunk: int = may_change(0)
    """Tokens of a sequence that feedforward, memory, head and loss process at a time, so that for
    long texts neither hidden layers nor logits are ever whole in memory; backward recomputes
    each chunk. 0: all at once.
    """

    carry_state: bool = False
    """Let each row of the batch continue the text of the step before: mixers start from their last
    state (without gradient). data.document_mask resets it where a document ends. For mixers with
    a state of constant size, in models without positions.
    """

    segments: int = may_change(1)
    """Segments of a sequence that a step processes one after the other: gradients flow through the
    states between them (truncated backpropagation over this many segments), one segment's
    activations are in memory at a time, and backward recomputes each. For mixers with a state of
    constant size.
    """

    label_smoothing: float = 0.0
    """Share of each target that is spread over the vocabulary; 0.1 is common in translation."""

    mask_share: float = 0.15
    """For masked-token models (encoder_layers equals layers): share of the tokens to predict."""

    check_inversion: bool = may_change(False)
    """For debugging reversible blocks: compare the input that each block reconstructs with a
    checksum of the true one, and fail if they differ.
    """

    def __post_init__(self) -> None:
        check_kinds(self, "train")
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
