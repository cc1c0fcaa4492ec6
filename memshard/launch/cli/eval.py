"""`memshard eval`: held-out loss, perplexity, bits per byte, and how the memory is used."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import Subparsers

if TYPE_CHECKING:
    from memshard.trainer.checkpoint.load_model import LoadedModel
    from memshard.trainer.evaluation.perplexity import Evaluation


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("eval", help="perplexity, bits per byte, memory usage")
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder (its newest checkpoint) or a checkpoint")
    parser.add_argument("--data", metavar="DIR", help="data set whose held-out text is read (default: the one of the run)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="held-out tokens to read at most (default all)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences at a time (default 16)")
    parser.add_argument("--pictures", metavar="DIR", help="draw the loss curve and each table's used-slots map (needs memshard[eval])")
    parser.add_argument("--dead-rows", metavar="FILE", help="write slots i1 * keys + i2 that no held-out token reads, as JSON by table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates in this process."""
    with usage_errors():
        import torch

        from memshard.data_pipeline.stream.open import open_held_out
        from memshard.trainer.checkpoint.load_model import load
        from memshard.trainer.evaluation.perplexity import evaluate
        from memshard.trainer.tasks.language_model import LanguageModelTask

        if args.batch < 1:
            raise ValueError(f"--batch is {args.batch}; it must be at least 1")
        loaded = load(args.checkpoint)
        data = args.data or loaded.recipe.data.path
        held_out = open_held_out(data, loaded.recipe.data.length, args.max_tokens)
        loaded.check_tokenizer(data)
    device = torch.device("cpu")
    task = LanguageModelTask(device, loaded.recipe.data.document_mask, loaded.recipe.train.seed)
    evaluation = evaluate(loaded.model, task, held_out, args.batch, torch.float32)
    result: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "data": data,
        "tokens": evaluation.tokens,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
    }
    if held_out.words is not None and held_out.text_bytes is not None:
        result["word_perplexity"] = evaluation.word_perplexity(held_out.words)
        result["bits_per_byte"] = evaluation.bits_per_byte(held_out.text_bytes)
    result["usage"] = {name: asdict(report) for name, report in evaluation.usage.items()}
    if args.dead_rows:
        with usage_errors():
            _write_dead_rows(loaded, evaluation, Path(args.dead_rows))
        result["dead_rows"] = args.dead_rows
    if args.pictures:
        with usage_errors():
            result["pictures"] = _draw(loaded, evaluation, Path(args.pictures))
    if not args.json:
        _show(result)
    return result


def _write_dead_rows(loaded: "LoadedModel", evaluation: "Evaluation", file: Path) -> None:
    from memshard.models.memory.product_key import row_slots

    keys = loaded.recipe.model.memory.keys
    dead = {name: row_slots((counter.counts == 0).nonzero().flatten(), keys) for name, counter in evaluation.counters.items()}
    file.write_text(json.dumps({name: slots.sort().values.tolist() for name, slots in dead.items()}))


def _draw(loaded: "LoadedModel", evaluation: "Evaluation", folder: Path) -> list[str]:
    import torch

    from memshard.models.memory.product_key import row_slots
    from memshard.trainer.evaluation.pictures import loss_curve, usage_map
    from memshard.trainer.metrics import METRICS_FILE

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    metrics = loaded.path.parent.parent / METRICS_FILE
    if metrics.exists():
        loss_curve({metrics.parent.name: metrics}, folder / "loss.png")
        drawn.append(str(folder / "loss.png"))
    keys = loaded.recipe.model.memory.keys
    for name, counter in evaluation.counters.items():
        in_slot_order = torch.empty_like(counter.counts)
        in_slot_order[row_slots(torch.arange(len(counter.counts)), keys)] = counter.counts
        picture = folder / f"{name.removesuffix('.memory.values')}.png"
        usage_map(in_slot_order, keys, picture)
        drawn.append(str(picture))
    return drawn


def _show(result: dict[str, Any]) -> None:
    print(f"{result['checkpoint']} on {result['data']}: {result['tokens']:,} held-out tokens")
    print(f"  loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f} a token", end="")
    if "bits_per_byte" in result:
        print(f", {result['word_perplexity']:.1f} a word, {result['bits_per_byte']:.4f} bits a byte", end="")
    print()
    for name, report in result["usage"].items():
        print(
            f"  {name}: {report['usage']:.1%} of slots read ({report['reads_per_slot']:.1f} reads a slot), "
            f"KL to uniform {report['kl_weighted']:.3f} weighted, {report['kl_count']:.3f} by count"
        )
    if "dead_rows" in result:
        print(f"  {result['dead_rows']}")
    for picture in result.get("pictures", ()):
        print(f"  {picture}")
