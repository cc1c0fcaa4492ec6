"""The gallery of experiments, written from result files; `make gallery` runs this on docs/.

Reads DIR/results/NAME.json, the result.json of `memshard reproduce NAME` with "_" for "/", and
DIR/results/NAME.md, what its readers should know, where those files exist; writes DIR/gallery.md
and the pictures in DIR/pictures/NAME.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from memshard.experiments.common import catalogue

_PAPERS = {
    "pkm": "Product-key memories (Lample et al. 2019; Berges et al. 2024)",
    "lookup": "Product keys and n-grams",
    "fast_weights": "Fast weights (Schlag et al. 2021)",
    "reformer": "Reformer (Kitaev et al. 2020)",
    "primer": "Primer (So et al. 2021)",
    "data": "The order of training data",
}
_OPENING = """<!-- `make gallery` generates this page from results/: change those, not this. -->

# Gallery: the papers' experiments, measured here

Every number comes from a result file in [results](results) that `memshard reproduce` wrote, with
all settings, seeds and versions; `make gallery` writes this page from them.
[experiments.md](experiments.md) says how to run them and which data they need. Small models and
little text: differences count, not absolute numbers. Published figures were partly taken from
secondary sources and are there for the direction, not for the digits. Hours leave out runs that
another study had made before: studies of memories share their models. Language models were trained
on contiguous sequences (data.order), unless an entry says otherwise; on shuffled ones losses are
lower ([data/order](#dataorder)).
"""


def write_gallery(folder: Path, pictures: Path) -> str:
    """Return the page made of folder/results, and draw its pictures in the folder `pictures`."""
    parts = [_OPENING]
    for paper, title in _PAPERS.items():
        names = [name for name in catalogue.names() if name.startswith(f"{paper}/")]
        if names:
            parts += [
                f"## {title}\n",
                *(_entry(name, folder / "results", pictures) for name in names),
            ]
    return "\n".join(parts)


def _entry(name: str, results: Path, pictures: Path) -> str:
    experiment, file = catalogue.find(name), name.replace("/", "_")
    text = f"### {name}\n\n{experiment.what[0].upper()}{experiment.what[1:]}.\n\n"
    result, notes = results / f"{file}.json", results / f"{file}.md"
    if result.exists():
        summary = json.loads(result.read_text(encoding="utf-8"))
        drawn = pictures / file
        drawn.mkdir(parents=True, exist_ok=True)
        text += (
            f"{_measured(summary)} [All "
            f"numbers](results/{result.name}).\n\n```\n{_command(name, summary['scale'])}\n```\n\n"
        )
        # Written anew from the stored points, so a better table needs no new run.
        report = experiment.report(
            [(row["point"], row["result"]) for row in summary["points"]], drawn
        )
        # A report names its pictures as if it lay beside them; this page lies above them.
        text += re.sub(r"(!\[[^]]*\]\()", rf"\1pictures/{file}/", report)
    else:
        text += (
            f"**Not measured yet.** About {experiment.hours['small']:g} hours of one "
            f"core:\n\n```\n{_command(name, 'small')}\n```\n"
        )
    # Links of the notes lead out of results/, where they lie; this page is outside already.
    return text + (
        f"\n{notes.read_text(encoding='utf-8').replace('](../', '](')}" if notes.exists() else ""
    )


def _command(name: str, scale: str) -> str:
    return f"memshard reproduce {name} --scale {scale}"


def _measured(summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in summary["versions"].items())
    number = len(summary["points"])
    points = f"{number} point{'s' if number > 1 else ''}"
    return (
        f"Scale {summary['scale']}: {points}, {summary['seconds'] / 3600:.2f} hours of one "
        f"core ({versions})."
    )


if __name__ == "__main__":
    docs = Path(sys.argv[1])
    (docs / "gallery.md").write_text(write_gallery(docs, docs / "pictures"), encoding="utf-8")
