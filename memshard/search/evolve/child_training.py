"""The training of one child: steps, held-out loss, and a file for another attempt to go on from."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memshard.io import atomic_write
from memshard.search.dna.compile import Compiled
from memshard.search.evolve.journal import Event
from memshard.search.evolve.settings import Settings
from memshard.search.evolve.text import Text
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.training import build_for_training, training_step


class ChildTraining:
    """A model in training and its position in the data.

    AdamW, a learning rate that warms up and then falls with the root of the steps, gradient norm at
    most 1.
    """

    def __init__(
        self, program: Compiled, settings: Settings, text: Text, seed: int, data_seed: int
    ) -> None:
        self.step = 0
        self._settings, self._text, self._data_seed = settings, text, data_seed
        self._training = build_for_training(
            program.build(seed),
            OptimizerConfig(lr=settings.lr, weight_decay=0.0),
            train=TrainConfig(precision="fp32", clip=1.0),
            device=settings.device,
        )
        self._training.learning_rate = self._learning_rate
        self._model, self._optimizer = self._training.model, self._training.engine.optimizer

    def _learning_rate(self, step: int) -> float:
        done, warmup = step + 1, max(1, self._settings.warmup)
        # No end is built into the schedule: losses at a hurdle compare programs of any
        # number of steps.
        return self._settings.lr * min(done / warmup, math.sqrt(warmup / done))

    def advance(self) -> float:
        """Take a step; return its loss in nats a token, or the gradient norm if that is not finite,
        when nothing is updated.
        """
        settings = self._settings
        tokens = self._text.batch(self._data_seed, self.step, settings.batch, settings.length).to(
            settings.device
        )
        outcome = training_step(self._training, [tokens], _loss, self.step)
        self.step += 1
        return outcome.norm if outcome.skipped else outcome.loss

    @torch.no_grad()
    def loss(self, split: str) -> float:
        """Return the loss on a held-out part, "valid" or "test", in nats a token."""
        settings = self._settings
        windows = self._text.held_out(split, settings.eval_tokens, settings.length).to(
            settings.device
        )
        total = sum(
            _loss(self._model, part).item() * len(part)
            # Four times a training batch: without gradients nothing is kept, and larger
            # calls are faster.
            for part in windows.split(4 * settings.batch)
        )
        return total / len(windows)

    def save(self, path: Path, identity: str, rungs: list[Event]) -> None:
        """Write weights, moments, step and the rungs so far, atomically. identity: says which
        training this is.
        """
        tensors = {
            f"weight/{name}": weight.detach() for name, weight in self._model.named_parameters()
        }
        for name, weight in self._model.named_parameters():
            tensors |= {
                f"{key}/{name}": value for key, value in self._optimizer.state[weight].items()
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"identity": identity, "step": str(self.step), "rungs": json.dumps(rungs)}
        # Whole or not at all: the worker may be killed at any time, and the next attempt
        # reads the file.
        with atomic_write(path, durable=True) as file:
            try:
                save_file({key: value.contiguous() for key, value in tensors.items()}, file, kept)
            except SafetensorError as error:  # of a full disk, too
                raise OSError(f"{path} could not be written ({error})") from error

    def load(self, path: Path, identity: str) -> list[Event]:
        """Restore a saved file, bit for bit, and return its rungs.

        Where there is no whole file of this training, return none and change nothing.
        """
        try:
            with safe_open(path, "pt", device=self._settings.device) as file:
                kept = file.metadata() or {}
                # Read whole before anything is changed: a file that was cut must not leave half of
                # its weights.
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        # No file, or one of a worker that was killed: the training starts anew.
        except (OSError, SafetensorError):
            return []
        if kept.get("identity") != identity:
            return []
        self.step = int(kept["step"])
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            weight = self._model.get_parameter(name)
            if kind == "weight":
                weight.data.copy_(value)
            else:
                # AdamW's state is empty until its first step, so there is nothing to copy into.
                self._optimizer.state[weight][kind] = value
        rungs: list[Event] = json.loads(kept["rungs"])
        return rungs


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
