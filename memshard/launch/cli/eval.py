"""`memshard eval`: held-out loss, perplexity, bits per byte, BLEU, and how slots are used."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.generate import add_beam_options, beam_options, refuse_options
from memshard.launch.cli.outcome import rank, usage_errors
from memshard.launch.cli.parser import Subparsers, add_allow, whole
from memshard.models.mixers.kinds import names

if TYPE_CHECKING:
    import torch

    from memshard.trainer.checkpoint.load_model import LoadedModel
    from memshard.trainer.evaluation.perplexity import Evaluation

# Seconds; the longest wait is for a rank that is still loading its model.
_TIMEOUT = 600.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "eval", help="perplexity, bits per byte, BLEU, slot usage; tasks of lm-evaluation-harness"
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a run folder (its newest checkpoint), a checkpoint or an export",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="data set whose held-out text is read (default: that of the run; exports name none)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole(),
        metavar="N",
        help="held-out tokens to read at most (default all)",
    )
    parser.add_argument(
        "--batch",
        type=whole(),
        default=16,
        metavar="N",
        help="sequences at a time, on each process (default 16)",
    )
    parser.add_argument(
        "--length",
        type=whole(),
        metavar="N",
        help="tokens in a window (default: the run's data.length)",
    )
    parser.add_argument(
        "--stride",
        type=whole(),
        metavar="N",
        help="slide windows by N tokens; 1: full context for each (default --length)",
    )
    parser.add_argument(
        "--untruncated",
        action="store_true",
        help="read the text as one, with carried states "
        f"({names(lambda kind: kind.constant_state)} mixers, no positions)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic of matrix products",
    )
    parser.add_argument(
        "--memmap",
        action="store_true",
        help="leave value tables on disk; always so on several processes",
    )
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="draw the loss curve and each table's used-slots map (needs memshard[eval])",
    )
    parser.add_argument(
        "--dead-rows",
        metavar="FILE",
        help="write slots i1 * keys + i2 that no held-out token reads, as JSON by table",
    )
    parser.add_argument(
        "--pairs",
        nargs=2,
        metavar=("SRC", "REF"),
        help="of translators: BLEU on these files, a sentence a line (or .gz)",
    )
    add_beam_options(parser)
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, comma-separated, instead of held-out text",
    )
    parser.add_argument("--task-dir", metavar="DIR", help="folder of your own task files")
    parser.add_argument(
        "--limit",
        type=whole(),
        metavar="N",
        help="examples of a task to read at most (default all)",
    )
    add_allow(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate on the processes that have joined."""
    from memshard.launch.env import joined_ranks

    with joined_ranks(_TIMEOUT) as (device, _):
        with usage_errors():
            import torch.distributed as dist

            from memshard.trainer.checkpoint.load_model import load_model

            ranks = dist.get_world_size() if dist.is_initialized() else 1
            # Memory-mapped on several processes: they share the pages of one machine's cache.
            loaded = load_model(args.checkpoint, args.memmap or ranks > 1, device)
            if loaded.recipe.model.translates and ranks > 1:
                raise ValueError(
                    "translation is evaluated on one process: start it without torchrun"
                )
            if not loaded.recipe.model.translates:
                refuse_options(args, "translate", "beam", "length_penalty", "pairs")
        # After loading, which all three need.
        if args.tasks:
            return _run_tasks(args, loaded, device, ranks)
        if args.pairs:
            return _score_files(args, loaded, device)
        return _read_held_out(args, loaded, device, ranks)


def _read_held_out(
    args: argparse.Namespace, loaded: "LoadedModel", device: "torch.device", ranks: int
) -> dict[str, Any]:
    from memshard.data_pipeline.stream.records import HeldOutRecords
    from memshard.trainer.evaluation.held_out import evaluate_held_out, open_for_evaluation
    from memshard.trainer.evaluation.translation import held_out_texts
    from memshard.trainer.precision import compute_dtype
    from memshard.trainer.tasks.translation import TranslationTask

    with usage_errors():
        data, length = args.data or _own_data(args, loaded), _length(args, loaded)
        if args.untruncated:
            _check_untruncated(args, loaded, ranks)
            # One row of batch x length tokens does in a call what batch rows do otherwise.
            length *= args.batch
        held_out, task = open_for_evaluation(
            loaded, data, device, length, args.max_tokens, args.stride, args.untruncated
        )
    dtype = compute_dtype(args.precision, device)
    evaluation, numbers = evaluate_held_out(
        loaded, held_out, task, args.batch, dtype, rank(), ranks, args.untruncated
    )
    result: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "data": data,
        "untruncated": args.untruncated,
        **numbers,
    }
    if isinstance(task, TranslationTask) and isinstance(held_out, HeldOutRecords):
        result |= _scores(args, loaded, dtype, *held_out_texts(held_out, loaded.tokenizer))
    # All ranks took part in the evaluation; one writes and prints.
    if rank() != 0:
        return result
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


def _own_data(args: argparse.Namespace, loaded: "LoadedModel") -> str:
    """Return the data set that the model was trained on. ValueError if that is not known, or may
    not be fetched because a file alone says so.
    """
    from memshard.data_pipeline.fetch import check_allowed

    path = loaded.recipe.data.path
    if not path:
        raise ValueError(
            f"{loaded.path} does not say which data it was trained on, as exports do not: give "
            "--data DIR"
        )
    check_allowed(path, f"{loaded.path}/config.yaml: data.path", args.allow)
    return path


def _check_untruncated(args: argparse.Namespace, loaded: "LoadedModel", ranks: int) -> None:
    from memshard.trainer.config.recipe import check_states

    check_states(loaded.recipe.model, "--untruncated", endless=True)
    if args.stride is not None:
        raise ValueError(
            "--untruncated reads every token after all before it, where --stride slides a window: "
            "leave one of them out"
        )
    if ranks > 1:
        raise ValueError(
            "--untruncated reads one text from its start to its end: start it without torchrun"
        )


def _score_files(
    args: argparse.Namespace, loaded: "LoadedModel", device: "torch.device"
) -> dict[str, Any]:
    """Return BLEU of translated files."""
    from memshard.data_pipeline.prepare.inputs.files import read_lines
    from memshard.trainer.precision import compute_dtype

    with usage_errors():
        source, reference = (read_lines(Path(file)) for file in args.pairs)
        scores = _scores(args, loaded, compute_dtype(args.precision, device), source, reference)
    if not args.json:
        print(f"{loaded.path} on {args.pairs[0]}: {len(source):,} texts")
        _show_scores(scores)
    return {"checkpoint": str(loaded.path), "step": loaded.step, "pairs": args.pairs, **scores}


def _scores(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    dtype: "torch.dtype",
    source: list[str],
    reference: list[str],
) -> dict[str, Any]:
    from memshard.models.seq2seq import EncoderDecoder
    from memshard.trainer.evaluation.translation import bleu, translate

    assert isinstance(loaded.model, EncoderDecoder)
    begun = time.perf_counter()
    settings = beam_options(args)
    with usage_errors():
        translations = translate(
            loaded.model, loaded.tokenizer, source, dtype, batch=args.batch, **settings
        )
        seconds = time.perf_counter() - begun
        score, margin, signature = bleu(translations, reference)
    # Three for the eye; the longer lists end with the shortest, hence not strict.
    examples = [list(row) for row in zip(source[:3], translations, reference, strict=False)]
    named = {"bleu": score, "bleu_margin": margin, "bleu_signature": signature}
    return {**named, **settings, "sentences_per_s": len(source) / seconds, "examples": examples}


def _show_scores(result: dict[str, Any]) -> None:
    score = f"BLEU {result['bleu']:.2f} +- {result['bleu_margin']:.2f} ({result['bleu_signature']})"
    print(f"  {score}, beam {result['beam']}, {result['sentences_per_s']:.1f} sentences/s")
    for source, translation, reference in result["examples"]:
        print(f"  {source}\n    model      {translation}\n    reference  {reference}")


def _run_tasks(
    args: argparse.Namespace, loaded: "LoadedModel", device: "torch.device", ranks: int
) -> dict[str, Any]:
    from memshard.trainer.precision import compute_dtype

    with usage_errors():
        if ranks > 1:
            raise ValueError("--tasks runs on one process: start it without torchrun")
        if loaded.recipe.model.encoder_layers:
            raise ValueError(
                "--tasks are for language models, and this one has an encoder "
                "(model.encoder_layers): leave it out"
            )
        try:
            from memshard.trainer.evaluation.harness import HarnessModel, run_tasks
        except ModuleNotFoundError as error:
            raise ValueError(
                "--tasks needs lm-evaluation-harness: pip install 'memshard[eval]'"
            ) from error
        dtype = compute_dtype(args.precision, device)
        model = HarnessModel(
            loaded.model, loaded.tokenizer, _length(args, loaded), args.batch, dtype
        )
        results = run_tasks(model, args.tasks.split(","), args.task_dir, args.limit)
    if not args.json:
        for task, numbers in results.items():
            for name, value in numbers.items():
                if isinstance(value, float):
                    print(f"{task}: {name.removesuffix(',none')} {value:.4f}")
    return {"checkpoint": str(loaded.path), "step": loaded.step, "tasks": results}


def _length(args: argparse.Namespace, loaded: "LoadedModel") -> int:
    length = args.length or loaded.recipe.data.length
    model = loaded.recipe.model
    if model.position in ("learned", "axial") and length > (model.max_length or length):
        raise ValueError(
            f"--length is {length}, but the model has {model.max_length} {model.position} "
            "positions: use at most that many"
        )
    return length


def _write_dead_rows(loaded: "LoadedModel", evaluation: "Evaluation", file: Path) -> None:
    from memshard.models.memory.product_key import row_slots
    from memshard.models.memory.table import find_tables

    keys = {name: table.keys for name, table in find_tables(loaded.model)}
    # Row numbers would mean nothing outside: slots are what keys and exports speak of.
    dead = {
        name: rows if of_table is None else row_slots(rows, of_table)
        for name, counter in evaluation.counters.items()
        for rows, of_table in [((counter.counts == 0).nonzero().flatten(), keys[name])]
    }
    file.write_text(
        json.dumps({name: slots.sort().values.tolist() for name, slots in dead.items()}),
        encoding="utf-8",
    )


def _draw(loaded: "LoadedModel", evaluation: "Evaluation", folder: Path) -> list[str]:
    import torch

    from memshard.models.memory.product_key import row_slots
    from memshard.models.memory.table import find_tables
    from memshard.trainer.evaluation.pictures import loss_curve, usage_map
    from memshard.trainer.watch.metrics import METRICS_FILE

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    # A checkpoint is RUN/checkpoints/step-N. Two folders above an export there are no metrics, and
    # no curve is drawn.
    metrics = loaded.path.parent.parent / METRICS_FILE
    if metrics.exists():
        loss_curve({metrics.parent.name: metrics}, folder / "loss.png")
        drawn.append(str(folder / "loss.png"))
    keys = {name: table.keys for name, table in find_tables(loaded.model)}
    for name, counter in evaluation.counters.items():
        if (side := keys[name]) is None:
            continue
        # Rows are stored diagonal by diagonal; the map shows slots i1 * keys + i2 as a square.
        counts = counter.counts.cpu()  # a table's are on its device
        in_slot_order = torch.empty_like(counts)
        in_slot_order[row_slots(torch.arange(len(counts)), side)] = counts
        picture = folder / f"{name.removesuffix('.memory.values')}.png"
        usage_map(in_slot_order, side, picture)
        drawn.append(str(picture))
    return drawn


def _show(result: dict[str, Any]) -> None:
    print(
        f"{result['checkpoint']} on {result['data']}: {result['tokens']:,} held-out "
        f"tokens{', read as one text' * result['untruncated']}"
    )
    print(
        f"  loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f} a token",
        end="",
    )
    if "bits_per_byte" in result:
        print(
            f", {result['word_perplexity']:.1f} a word, {result['bits_per_byte']:.4f} bits a byte",
            end="",
        )
    print(f", {result['accuracy']:.1%} of the hidden tokens found" if "accuracy" in result else "")
    if "bleu" in result:
        _show_scores(result)
    places = (f"{bucket['first']}: {bucket['loss']:.3f}" for bucket in result["by_position"])
    print(f"  loss from position on  {', '.join(places)}")
    for name, report in result["usage"].items():
        print(
            f"  {name}: {report['usage']:.1%} of slots read ({report['reads_per_slot']:.1f} reads "
            "a slot), "
            f"KL to uniform {report['kl_weighted']:.3f} weighted, {report['kl_count']:.3f} by "
            f"count, Gini {report['gini']:.3f}; "
            f"50, 90, 99 % of the reads take {report['top50']:,}, {report['top90']:,}, "
            f"{report['top99']:,} slots"
        )
    if "dead_rows" in result:
        print(f"  {result['dead_rows']}")
    for picture in result.get("pictures", ()):
        print(f"  {picture}")
