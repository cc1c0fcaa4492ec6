"""Run EleutherAI's lm-evaluation-harness on a trained model (extra `eval`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.models.decode.generate import generate, left_padded
from memshard.models.transformer import Transformer
from memshard.trainer.precision import autocast

_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """Answers the harness's requests, `batch` at a time: log-likelihoods and generation.

    length: most tokens that the model sees at once; longer inputs lose their beginning.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        length: int,
        batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model, self.encoder, self.length, self.batch, self.dtype = (
            model,
            tokenizer,
            length,
            batch,
            dtype,
        )
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The <eos> token, which precedes every document and so stands for an empty context."""
        return self.encoder.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return token ids."""
        return self.encoder.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts; each token is predicted once, from what fits."""
        windows_of_all, owner = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                tokens, self.eot_token_id, max_seq_len=self.length, context_len=1
            )
            for context, predicted in map(make_disjoint_window, windows):
                windows_of_all.append((("", ""), context, predicted))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(
            owner, self._loglikelihood_tokens(windows_of_all), strict=True
        ):
            totals[number] += total
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations, each up to the first of the `until` strings."""
        texts = [""] * len(requests)
        for numbers in self._batches(
            requests, lambda request: (str(request.args[1]), len(request.args[0]))
        ):
            settings = requests[numbers[0]].args[1]
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            limit = min(settings.get("max_gen_toks", _MAX_NEW_TOKENS), self.length - 1)
            heat = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
            prompts = [
                self.tok_encode(requests[number].args[0]) or [self.eot_token_id]
                for number in numbers
            ]
            prompt, real = left_padded(
                # The end of a long prompt is kept: it has the question, and the examples come
                # before it.
                [tokens[-(self.length - limit) :] for tokens in prompts],
                self.eot_token_id,
            )
            with autocast(self.dtype, self._device):
                new = generate(
                    self.model,
                    prompt,
                    limit,
                    real=real,
                    temperature=heat,
                    topp=settings.get("top_p"),
                    stop=self.eot_token_id,
                )
            for number, row in zip(numbers, new.tolist(), strict=True):
                text = self.encoder.decode(
                    row[: row.index(self.eot_token_id)] if self.eot_token_id in row else row
                )
                texts[number] = text[
                    : min(
                        (text.find(stop) for stop in until if stop and stop in text),
                        default=len(text),
                    )
                ]
        return texts

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for numbers in self._batches(
            requests, lambda request: (0, len(request[1]) + len(request[2]))
        ):
            rows = [(requests[n][1] + requests[n][2])[-(self.length + 1) :] for n in numbers]
            width = max(map(len, rows)) - 1
            # Models look back only, so padding at the end changes nothing before it.
            inputs = torch.tensor(
                [row[:-1] + [self.eot_token_id] * (width - len(row) + 1) for row in rows],
                device=self._device,
            )
            with autocast(self.dtype, self._device):
                # One pass for all continuations: log-likelihoods need no decoding.
                logits = self.model(inputs)[0]
            for n, row, scores in zip(numbers, rows, logits, strict=True):
                # A continuation longer than the window keeps its last tokens only.
                count = min(len(requests[n][2]), len(row) - 1)
                scored[n] = _score(
                    scores[len(row) - 1 - count : len(row) - 1],
                    torch.tensor(row[-count:], device=self._device),
                )
        return scored

    def _batches(self, requests: list[Any], key: Any) -> Iterator[list[int]]:
        """Iterate over numbers of requests with equal settings, longest first."""
        keys = [key(request) for request in requests]
        # Longest first: if memory runs out, it does so in the first batch, and similar lengths
        # share a batch, so little is padding.
        order = sorted(range(len(requests)), key=lambda n: (keys[n][0], -keys[n][1]))
        while order:
            same = [n for n in order[: self.batch] if keys[n][0] == keys[order[0]][0]]
            yield same
            order = order[len(same) :]


def _score(logits: Tensor, tokens: Tensor) -> tuple[float, bool]:
    """Return the log-probability of the tokens, and whether each is the most likely one."""
    logits = logits.float()
    total = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()
    return float(total), bool((logits.argmax(-1) == tokens).all())


def run_tasks(
    model: HarnessModel,
    tasks: list[str],
    folder: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the results of the harness's tasks by name. ValueError for a task that does not exist.

    folder: of your own task files.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; --task-dir names a folder "
            "of task files"
        )
    # It would also ask git for the commit of the current folder, and outside of a repository
    # git complains.
    with patch("lm_eval.evaluator.get_git_commit_hash"):
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            limit=limit,
            task_manager=manager,
            # No bootstrap: its standard errors take minutes for some tasks, and are not reported.
            bootstrap_iters=0,
            log_samples=False,
        )
    assert results is not None
    by_task: dict[str, Any] = results["results"]
    return by_task
