"""The file of the results, and what in it is not as it should be."""

from typing import Any

from memshard.bench.gpu.catalogue import NEEDS_GPU

RESULT = "gpu.json"
RUNNING = "running"


def wrong(result: dict[str, Any]) -> list[str]:
    """Return a line for every stage that did not end and every result that is not `ok`.

    result: the content of the file.
    """
    lines = []
    for name, stage in result["stages"].items():
        if stage["outcome"] not in ("done", RUNNING, NEEDS_GPU):
            lines.append(f"{name}: {stage['outcome']}, {stage['problem']}")
        lines += [
            f"{name}: {what}" for what, r in stage["results"].items() if not r.get("ok", True)
        ]
    return lines
