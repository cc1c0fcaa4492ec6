"""lm-evaluation-harness on a local task of each kind, against plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.models.decode.generate import generate
from memshard.trainer.checkpoint.load_model import LoadedModel, load_model
from tests.trainer.tiny_run import train_run

pytest.importorskip("lm_eval")

from memshard.trainer.evaluation.harness import HarnessModel

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: "
    "'{{choices}}'\ndoc_to_target: '{{answer}}'\n",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: "
    "'{{reference}}'\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 6, do_sample: false}\nmetric_list:\n  - "
    "metric: exact_match\n",
}


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("harness") / "run"
    train_run(recipe, folder, "train.steps=4")
    return load_model(folder)


def _greedy(loaded: LoadedModel, text: str, count: int) -> str:
    ids = generate(
        loaded.model,
        torch.tensor([loaded.tokenizer.encode(text)]),
        count,
        temperature=0,
        stop=loaded.tokenizer.eos_id,
    )[0].tolist()
    text = loaded.tokenizer.decode(
        ids[: ids.index(loaded.tokenizer.eos_id)] if loaded.tokenizer.eos_id in ids else ids
    )
    return text.partition("\n")[0]


def _loglikelihood(loaded: LoadedModel, context: list[int], tokens: list[int]) -> float:
    """Sum token by token, each predicted from the last 32 before it."""
    total = 0.0
    with torch.no_grad():
        for place, token in enumerate(tokens):
            seen = (context + tokens[:place])[-32:]
            total += float(loaded.model(torch.tensor([seen]))[0][0, -1].log_softmax(-1)[token])
    return total


def test_a_local_task_of_each_kind(
    trained: LoadedModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # no git repository
    questions = ["w1 w2 w3", "w7 w7", "w2"]
    rows = [
        {
            "question": q,
            "choices": [" w4", " w1 w1"],
            "answer": n % 2,
            "reference": _greedy(trained, q, 6) if n else "something else",
        }
        for n, q in enumerate(questions)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
            f"{tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
        )
        (tmp_path / f"{name}.yaml").write_text(data + task)
    command = [
        "eval",
        str(trained.path),
        "--tasks",
        ",".join(TASKS),
        "--task-dir",
        str(tmp_path),
        "--batch",
        "2",
        "--json",
    ]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "git" not in err
    results: dict[str, Any] = json.loads(out)["tasks"]

    encode, eos = trained.tokenizer.encode, trained.tokenizer.eos_id
    right = 0
    for row in rows:
        likelihoods = [
            _loglikelihood(trained, encode(row["question"]), encode(choice))
            for choice in row["choices"]
        ]
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    assert results["choice"]["acc,none"] == pytest.approx(right / 3)
    total = sum(_loglikelihood(trained, [eos], encode(text)) for text in questions)
    assert results["text"]["bits_per_byte,none"] == pytest.approx(
        -total / math.log(2) / sum(map(len, questions)), rel=1e-4
    )
    assert results["write"]["exact_match,none"] == pytest.approx(2 / 3)
    assert main(["eval", str(trained.path), "--tasks", "no_such_task"]) == 2
    assert "has no task no_such_task" in capfd.readouterr().err


def test_scores_do_not_depend_on_what_is_beside_them(recipe: Path, tmp_path: Path) -> None:
    """LSH that leaves the number of buckets to the training length."""
    settings = ("model.mixer.kind=lsh", "model.mixer.chunk=2", "model.position=rotary")
    train_run(recipe, tmp_path, "train.steps=1", *settings)
    loaded = load_model(tmp_path)
    ids = torch.randint(3, 290, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [(None, ids[:2], ids[2:4]), (None, ids[:8], ids[8:40]), (None, ids[:1], ids[1:2])]
    alone, together = (
        HarnessModel(loaded.model, loaded.tokenizer, 64, batch)._loglikelihood_tokens(requests)
        for batch in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)


def test_long_inputs_keep_their_end_and_long_texts_are_read_in_windows(
    trained: LoadedModel,
) -> None:
    model = HarnessModel(trained.model, trained.tokenizer, 32, 3)
    ids = torch.randint(3, 290, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    (score, _), (short, greedy) = model._loglikelihood_tokens(
        [(None, ids[:60], ids[60:]), (None, ids[:5], ids[5:6])]
    )
    with torch.no_grad():
        logits = trained.model(torch.tensor([ids[-33:-1]]))[0][0, -10:].log_softmax(-1)
    assert score == pytest.approx(
        float(logits.gather(1, torch.tensor(ids[60:])[:, None]).sum()), rel=1e-5
    )
    assert short == pytest.approx(_loglikelihood(trained, ids[:5], ids[5:6]), rel=1e-5)
    assert isinstance(greedy, bool)
