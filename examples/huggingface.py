"""A Hugging Face Llama with a memory in place of one feedforward, trained by its Trainer, saved,
loaded and resumed.

    python examples/huggingface.py --out runs/llama

Needs memshard[adopt]. No downloads: the model comes from a config, the text is Python's own help
pages, read as bytes.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from memshard import CombinedOptimizer, ProductKeyMemory, RowAdam, externalize_tables

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    # Whatever else a config is given, it keeps, saves and loads.
    memory_layer=2,
    memory={"keys": 64, "heads": 2, "topk": 16, "key_dim": 64},
)


class MemoryLlamaForCausalLM(LlamaForCausalLM):
    """Llama with a memory in place of one feedforward; its config says which one and how large."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[config.memory_layer].mlp = ProductKeyMemory(
            config.hidden_size, **config.memory
        )


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
    tables = externalize_tables(model)
    optimizer = CombinedOptimizer(AdamW(model.parameters(), 3e-3), RowAdam(tables, 1e-2))
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
    return Trainer(model, arguments, train_dataset=text(), optimizers=(optimizer, None))


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
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")

    model.save_pretrained(args.out / "final")
    loaded = MemoryLlamaForCausalLM.from_pretrained(args.out / "final").eval()
    # Else torch would sum the rows, in another order than the kernels for hidden tables.
    externalize_tables(loaded)
    batch = text()[0]["input_ids"][None]
    with torch.no_grad():
        print(
            "loaded model gives the same logits:",
            torch.equal(model.eval()(batch).logits, loaded(batch).logits),
        )

    resumed, _ = train(args.out / "resumed", args.steps, args.out / f"checkpoint-{args.steps // 2}")
    states = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    print("resumed run ends in the same weights:", all(torch.equal(a, b) for a, b in states))


if __name__ == "__main__":
    main()
