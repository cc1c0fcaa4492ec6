"""Translation with softmax attention, linear attention and the delta rule (Schlag et al. 2021,
table 1).
"""

from pathlib import Path
from typing import Any

from memshard.data_pipeline.prepare.inputs.files import read_lines
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.curves import bars
from memshard.experiments.common.training_runs import run_folder, trained_run
from memshard.models.seq2seq import EncoderDecoder
from memshard.trainer.evaluation.translation import bleu, translate
from memshard.trainer.loop import evaluate_run

RUNS = Path("runs/reproduce/fast_weights/translation/runs")
_SHOWN = 3

_LINEAR = "model.mixer.kind=linear"
_MODELS: dict[str, list[str]] = {
    "softmax": [],
    "linear, ELU": [_LINEAR],
    "linear, DPFP-2": [_LINEAR, "model.mixer.features=dpfp", "model.mixer.feature_width=2"],
    "delta, DPFP-1": ["model.mixer.kind=delta", "model.mixer.features=dpfp"],
}
# The published ones have heads of width 64.
_ONLY_FULL: dict[str, list[str]] = {
    "linear, DPFP-4": [_LINEAR, "model.mixer.features=dpfp", "model.mixer.feature_width=4"],
    "linear, FAVOR+ 128": [_LINEAR, "model.mixer.features=favor", "model.mixer.feature_width=128"],
    "linear, FAVOR+ 256": [_LINEAR, "model.mixer.features=favor", "model.mixer.feature_width=256"],
}
# Test BLEU on WMT14 English to German, read from table 1.
_PUBLISHED = {
    "softmax": 27.7,
    "linear, ELU": 26.8,
    "linear, DPFP-2": 26.9,
    "linear, DPFP-4": 27.1,
    "linear, FAVOR+ 128": 25.3,
    "linear, FAVOR+ 256": 27.7,
}
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "overrides": [
            "data.path=data/smoke_pairs",
            "train.steps=3",
            "train.batch=4",
            "model.layers=2",
            "model.encoder_layers=1",
        ],
        "test": ["data/smoke_pairs.en", "data/smoke_pairs.de"],
    },
    "small": {"overrides": [], "test": ["data/test_2016_flickr.en", "data/test_2016_flickr.de"]},
    "full": {
        "overrides": [
            "data.path=data/wmt14",
            "data.length=256",
            "model.layers=12",
            "model.encoder_layers=6",
            "model.dim=1024",
            "model.dropout=0.3",
            "model.mixer.heads=16",
            "model.feedforward.hidden=4096",
            "train.steps=33_000",
            "train.batch=6144",
            "train.micro_batch=128",
            "optimizer.lr=1e-3",
            "optimizer.schedule=inverse_sqrt",
            "optimizer.warmup=4000",
        ],
        "test": ["data/newstest2014.en", "data/newstest2014.de"],
    },
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Train a model with the trainer, which can resume, and return the BLEU of its translations of
    the test set.

    FileNotFoundError, with what to do, where the data are missing.
    """
    # Before training: a missing test set should not come to light hours later.
    source, reference = (read_lines(_file(name)) for name in point["test"])
    run = trained_run(
        point,
        run_folder(point, RUNS),
        "train.en train.de --documents pairs --vocab 4096 --held-out 500",
    )
    assert isinstance(run.model, EncoderDecoder)
    translations = translate(run.model.eval(), Tokenizer(run.recipe.data.path), source, run.dtype)
    score, margin, signature = bleu(translations, reference)
    evaluation = evaluate_run(run)
    return {
        "bleu": score,
        "margin": margin,
        "signature": signature,
        "sentences": len(source),
        "loss": evaluation.loss,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "examples": [list(row) for row in zip(source, translations, reference, strict=True)][
            :_SHOWN
        ],
    }


def _file(name: str) -> Path:
    file = next((Path(name + end) for end in ("", ".gz") if Path(name + end).exists()), None)
    if file is None:
        raise FileNotFoundError(
            f"there is no test set {name} (or {name}.gz): put a text there, a sentence a line"
        )
    return file


def _points(scale: Scale) -> list[Point]:
    models = _MODELS | _ONLY_FULL if scale == "full" else _MODELS
    size = {"recipe": "multi30k-softmax", **_SIZES[scale]}
    return [
        {**size, "model": name, "overrides": [*settings, *size["overrides"]]}
        for name, settings in models.items()
    ]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    point, first = rows[0]
    text = (
        f"BLEU of {first['sentences']:,} test sentences ({first['signature']}) with a beam of 4 "
        "(+-: 95 % of draws of the sentences),\n"
        "and held-out loss in nats a target token, without label smoothing. One seed. Published: "
        "WMT14 English to German, 6 + 6\n"
        "layers of width 1,024; delta is not among them.\n\n"
        "| attention | parameters | held-out loss | BLEU | published |\n|---|---|---|---|---|\n"
    )
    for point, result in rows:
        published = f"{_PUBLISHED[point['model']]}" if point["model"] in _PUBLISHED else ""
        score = f"{result['bleu']:.1f} +- {result['margin']:.1f}"
        text += (
            f"| {point['model']} | {result['parameters']:,} | {result['loss']:.3f} | {score} "
            f"| {published} |\n"
        )
    for number, (source, _, reference) in enumerate(first["examples"]):
        text += f"\n- {source}\n  - reference: {reference}\n"
        text += "".join(
            f"  - {point['model']}: {result['examples'][number][1]}\n" for point, result in rows
        )
    scores = {point["model"]: (result["bleu"], result["margin"]) for point, result in rows}
    bars(scores, folder / "translation.png", "BLEU (95 % of draws of the sentences)")
    return text + "\n![BLEU by attention](translation.png)\n"


EXPERIMENT = Experiment(
    what="translation with softmax, linear (ELU, DPFP) and delta attention: BLEU (table 1; needs "
    "data/multi30k and its test set)",
    points=_points,
    run=measure,
    report=_report,
    hours={"smoke": 0.02, "small": 2.7, "full": 40_000.0},
)
