"""A small Llama with a memory, as adopters build one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from memshard import CombinedOptimizer, ProductKeyMemory, RowAdam, ValueTable

MEMORY: dict[str, Any] = {"keys": 8, "heads": 2, "topk": 4, "key_dim": 8}
LLAMA: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tiny_llama(**changes: Any) -> nn.Module:
    """Return a Llama of three layers, whose second has a memory. changes: of its arguments."""
    import transformers

    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.model.layers[1].mlp = ProductKeyMemory(16, **MEMORY, **changes)
    return model


def tokens(seed: int = 0) -> Tensor:
    """Return 4 texts of 8 tokens."""
    return torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(seed))


def both_optimizers(model: nn.Module, tables: list[ValueTable]) -> CombinedOptimizer:
    """Return AdamW for what is not frozen and RowAdam for the tables."""
    dense = [weight for weight in model.parameters() if weight.requires_grad]
    return CombinedOptimizer(AdamW(dense, 3e-3), RowAdam(tables, 1e-2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Return the losses of some steps, on a batch of their own each."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def hugging_face_trainer(model: nn.Module, folder: Any, **settings: Any) -> Any:
    """Return a Trainer over one batch. settings: optimizers, and TrainingArguments."""
    import transformers

    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    optimizers = settings.pop("optimizers", (None, None))
    arguments = {"max_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 4, "dataloader_pin_memory": False}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments | settings),
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=optimizers,
    )
