"""A GPT-2 with a memory in place of one feedforward, trained by Lightning, checkpointed and
resumed.

    python examples/lightning_trainer.py --out runs/gpt2

Needs memshard[adopt]. No downloads: the model comes from a config, the text is Python's own help
pages, read as bytes.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from memshard import CombinedOptimizer, ProductKeyMemory, RowAdam, externalize_tables

CONFIG = GPT2Config(
    vocab_size=256,
    n_embd=128,
    n_layer=4,
    n_head=4,
    n_positions=128,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)


class MemoryModel(lightning.LightningModule):
    """A language model of bytes whose third feedforward is a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(CONFIG)
        self.model.transformer.h[2].mlp = ProductKeyMemory(
            128, keys=64, heads=2, topk=16, key_dim=64
        )
        # Here, so that no strategy of Lightning's ever sees the values as a parameter.
        self.tables = externalize_tables(self.model)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """batch: [sequences, length] tokens."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW for what `parameters()` shows, RowAdam for the table, one schedule for both."""
        optimizer = CombinedOptimizer(AdamW(self.parameters(), 3e-3), RowAdam(self.tables, 1e-2))
        warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def text(length: int = 128) -> Tensor:
    """Rows of real text."""
    data = torch.frombuffer(
        bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8
    ).long()
    return data[: len(data) // length * length].view(-1, length)


def train(folder: Path, batches: int, resume: Path | None = None) -> MemoryModel:
    """Two epochs, each of some batches, with a checkpoint after each; resume: such a checkpoint."""
    lightning.seed_everything(0)
    module = MemoryModel()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(
                folder,
                filename="{epoch}",
                save_top_k=-1,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
            )
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader(text()[: 8 * batches], batch_size=8), ckpt_path=resume, weights_only=True
    )  # type: ignore[arg-type]
    return module


def main() -> None:
    """Train, load the checkpoint, resume from its middle."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpt2"))
    parser.add_argument("--batches", type=int, default=60, help="of an epoch")
    args = parser.parse_args()

    module = train(args.out, args.batches)
    print(f"loss {module.losses[0]:.3f} at the first batch, {module.losses[-1]:.3f} at the last")

    loaded = MemoryModel.load_from_checkpoint(args.out / "epoch=1.ckpt", weights_only=True).eval()
    batch = text()[:1]
    with torch.no_grad():
        same = torch.equal(module.eval().model(batch).logits, loaded.model(batch).logits)
    print("loaded model gives the same logits:", same)

    resumed = train(args.out / "resumed", args.batches, args.out / "epoch=0.ckpt")
    states = zip(module.state_dict().values(), resumed.state_dict().values(), strict=True)
    print("resumed run ends in the same weights:", all(torch.equal(a, b) for a, b in states))


if __name__ == "__main__":
    main()
