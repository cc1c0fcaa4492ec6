"""A Hugging Face Llama with a memory in place of one feedforward, trained by its Trainer, saved,
loaded and resumed.

    python examples/huggingface.py --out runs/llama
    torchrun --standalone --nproc-per-node 2 examples/huggingface.py --out runs/llama2

Needs memshard[adopt]. No downloads: the model comes from a config, the text is Python's own help
pages, read as bytes.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.optim import AdamW
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from memshard import (
    CombinedOptimizer,
    ProductKeyMemory,
    RowAdam,
    externalize_tables,
    full_state_dict,
    shard_tables,
)


class MemoryLlamaConfig(LlamaConfig):
    """The config of a Llama with memories, under a name of its own: as a "llama", a saved model
    would be loaded without them.
    """

    model_type = "memory_llama"
    memory_layers: tuple[int, ...] | list[int] = ()
    """Layers whose feedforward is a memory; they share one table."""
    memory: dict | None = None
    """Arguments of `ProductKeyMemory`."""


CONFIG = MemoryLlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    memory_layers=(2,),
    memory={"keys": 64, "heads": 2, "topk": 16, "key_dim": 64},
)


class MemoryLlamaForCausalLM(LlamaForCausalLM):
    """Llama with memories in place of some feedforwards; its config says which and how large."""

    config_class = MemoryLlamaConfig

    def __init__(self, config: MemoryLlamaConfig) -> None:
        super().__init__(config)
        values, names = None, []
        for number in config.memory_layers:
            memory = ProductKeyMemory(config.hidden_size, values=values, **config.memory)
            self.model.layers[number].mlp = memory
            values = memory.values
            names.append(f"model.layers.{number}.mlp.values.weight")
        # Files hold a shared table once, under its first name.
        self._tied_weights_keys = {
            **(self._tied_weights_keys or {}),
            **dict.fromkeys(names[1:], *names[:1]),
        }
        self.post_init()

    def initialize_weights(self) -> None:
        """Draw weights that are not in what is loaded: transformers knows no memories."""
        super().initialize_weights()
        for memory in self.modules():
            if not isinstance(memory, ProductKeyMemory):
                continue
            for part in memory.modules():
                tensors = part.state_dict(keep_vars=True).values()
                loaded = all(getattr(x, "_is_hf_initialized", False) for x in tensors)
                if hasattr(part, "reset_parameters") and not loaded:
                    part.reset_parameters()


AutoConfig.register("memory_llama", MemoryLlamaConfig)
AutoModelForCausalLM.register(MemoryLlamaConfig, MemoryLlamaForCausalLM)


class MemoryTrainer(Trainer):
    """A Trainer whose checkpoints hold whole tables, also where several processes split them.

    Its own would write, from the first process, what that process stores.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; all processes call it."""
        if not dist.is_initialized():
            super().save_model(output_dir, _internal_call)
        elif full := full_state_dict(self.model, self.optimizer):
            self._save(output_dir, full[0])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if dist.is_initialized() and (full := full_state_dict(self.model, self.optimizer)):
            torch.save(full[1], Path(output_dir) / "optimizer.pt")


def text(length: int = 128) -> list[dict[str, torch.Tensor]]:
    """Rows of real text."""
    data = torch.frombuffer(
        bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8
    ).long()
    return [
        {"input_ids": row, "labels": row}
        for row in data[: len(data) // length * length].view(-1, length)
    ]


def trainer(model: MemoryLlamaForCausalLM, folder: Path, steps: int) -> Trainer:
    """A Trainer with the row-sparse optimizer; everything else is its own: schedule, clipping,
    accumulation, checkpoints.
    """
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        logging_steps=1,
        lr_scheduler_type="cosine",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    # Under torchrun the arguments have set up the processes, among which tables are split.
    tables = shard_tables(model) if dist.is_initialized() else externalize_tables(model)
    optimizer = CombinedOptimizer(AdamW(model.parameters(), 3e-3), RowAdam(tables, 1e-2))
    return MemoryTrainer(model, arguments, train_dataset=text(), optimizers=(optimizer, None))


def train(
    folder: Path, steps: int, resume: Path | None = None
) -> tuple[MemoryLlamaForCausalLM, list[float]]:
    """The trained model and the loss of every step; resume: one of the Trainer's checkpoints."""
    set_seed(0)
    model = MemoryLlamaForCausalLM(CONFIG)
    run = trainer(model, folder, steps)
    run.train(resume_from_checkpoint=str(resume) if resume else None)
    return model, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main() -> None:
    """Train; save and load; resume from the middle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/llama"))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    model, losses = train(args.out, args.steps)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    loaded = AutoModelForCausalLM.from_pretrained(args.out / f"checkpoint-{args.steps}").eval()
    # Else torch would sum the rows, in another order than the kernels for hidden tables.
    externalize_tables(loaded)
    batch = text()[0]["input_ids"][None]
    with torch.no_grad():
        logits = model.eval()(batch).logits
        # Processes add up their parts of a sum: equal but for rounding.
        same = torch.allclose if dist.is_initialized() else torch.equal
        same_logits = same(logits, loaded(batch).logits)
    if first:
        print("loaded model gives the same logits:", same_logits)

    resumed, _ = train(args.out / "resumed", args.steps, args.out / f"checkpoint-{args.steps // 2}")
    states = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    same_weights = all(torch.equal(a, b) for a, b in states)
    if first:
        print("resumed run ends in the same weights:", same_weights)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
