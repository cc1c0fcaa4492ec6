"""Choose the task that a recipe's model is made for."""

from collections.abc import Callable

import torch
from torch import Tensor

from memshard.data_pipeline.format.index import load_index
from memshard.models.loss import token_losses
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.tasks.language_model import LanguageModelTask
from memshard.trainer.tasks.masked_tokens import MaskedTokenTask
from memshard.trainer.tasks.translation import TranslationTask

Task = LanguageModelTask | TranslationTask | MaskedTokenTask


def build_task(
    recipe: Recipe,
    device: torch.device,
    losses: Callable[[Tensor, Tensor], Tensor] = token_losses,
    data: str | None = None,
) -> Task:
    """Return the language modelling, translation or masked-token task, as model.encoder_layers
    says. `model.vocab_size` must be set.

    losses: see LanguageModelTask. data: in place of the recipe's. ValueError if the data folder
    holds something else.
    """
    model, seed, data = recipe.model, recipe.train.seed, data or recipe.data.path
    if not model.encoder_layers:
        return LanguageModelTask(device, recipe.data.document_mask, seed, losses)
    index = load_index(data)
    if model.translates:
        if index.kind != "pairs":
            raise ValueError(
                f"{data} holds {index.kind}, and model.encoder_layers, {model.encoder_layers} of "
                f"{model.layers}, asks for translation: "
                "build it from sentence pairs (--documents pairs), or set model.encoder_layers to 0"
            )
        return TranslationTask(device, index.eos_id, seed)
    if index.kind == "images":
        raise ValueError(
            f"{data} holds images, and masked tokens (model.encoder_layers) are for text: set "
            "model.encoder_layers to 0"
        )
    assert model.vocab_size is not None
    return MaskedTokenTask(device, seed, recipe.train.mask_share, model.vocab_size)
