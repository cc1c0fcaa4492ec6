"""Evaluate a loaded model on held-out data: what `memshard eval` reports."""

import time
from dataclasses import asdict
from typing import Any

import torch

from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.open_stream import open_held_out
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.trainer.checkpoint.load_model import LoadedModel
from memshard.trainer.evaluation.masked_tokens import masked_accuracy
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.tasks.build import Task, build_task
from memshard.trainer.tasks.masked_tokens import MaskedTokenTask
from memshard.trainer.tasks.translation import TranslationTask


def open_for_evaluation(
    loaded: LoadedModel,
    data: str,
    device: torch.device,
    length: int,
    max_tokens: int,
    stride: int | None = None,
    untruncated: bool = False,
) -> tuple[HeldOutStream | HeldOutRecords, Task]:
    """Return the held-out data in windows of `length` tokens, and the task to evaluate on them.

    untruncated: the windows will be read as one text. ValueError if the data does not fit the model
    or its tokenizer.
    """
    held_out = open_held_out(data, length, max_tokens, stride)
    if untruncated and not isinstance(held_out, HeldOutStream):
        raise ValueError(
            f"{data} holds whole records, none of which goes on: leave out --untruncated"
        )
    loaded.check_tokenizer(data)
    return held_out, build_task(loaded.recipe, device, data=data)


def evaluate_held_out(
    loaded: LoadedModel,
    held_out: HeldOutStream | HeldOutRecords,
    task: Task,
    batch: int,
    dtype: torch.dtype,
    rank: int = 0,
    ranks: int = 1,
    untruncated: bool = False,
) -> tuple[Evaluation, dict[str, Any]]:
    """Return the evaluation and its numbers for a report. All ranks call it.

    batch: windows at a time; 1 if `untruncated`, which reads them as one text.
    """
    begun = time.perf_counter()
    rows = 1 if untruncated else batch
    evaluation = evaluate(loaded.model, task, held_out, rows, dtype, rank, ranks, carry=untruncated)
    result: dict[str, Any] = {
        "tokens": evaluation.tokens,
        "tokens_per_s": evaluation.tokens / (time.perf_counter() - begun),
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
    }
    if isinstance(task, MaskedTokenTask):
        result["accuracy"] = masked_accuracy(
            loaded.model, task, held_out, batch, dtype, rank, ranks
        )
    elif isinstance(task, TranslationTask):
        pass  # words and bytes would be those of sources and targets together
    elif evaluation.tokens < held_out.tokens:
        pass  # bytes and words are also those of damaged documents, whose tokens do not count
    elif held_out.words is not None and held_out.text_bytes is not None:
        result["word_perplexity"] = evaluation.word_perplexity(held_out.words)
        result["bits_per_byte"] = evaluation.bits_per_byte(held_out.text_bytes)
    result["by_position"] = evaluation.by_position()
    result["usage"] = {name: asdict(report) for name, report in evaluation.usage.items()}
    return evaluation, result
