"""Mixers and memories describe themselves in registries, and nothing else names a kind."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memshard
from memshard.models.config import MemoryConfig, MixerConfig
from memshard.models.load_class import load_class
from memshard.models.memory.kinds import MEMORIES
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.mixers.kinds import MIXERS, names
from memshard.models.mixers.mixer import Mixer
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.trainer.optim.dense.kinds import DENSE_KINDS
from tests.models.tiny import tiny_config, tiny_model

PACKAGE = Path(memshard.__file__).parent
HOMES = ("models/mixers", "models/memory", "models/lsh", "models/fast_weights")


@pytest.mark.parametrize("name", MIXERS)
def test_a_rows_path_leads_to_its_mixer(name: str) -> None:
    kind = MIXERS[name]
    model = tiny_model(tiny_config(memory={"layers": ()}, mixer={"kind": name}))
    assert kind.name == name
    assert issubclass(load_class(kind.path), Mixer)
    assert all(type(block.mixer) is load_class(kind.path) for block in model.blocks)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_rows_path_leads_to_its_memory(name: str) -> None:
    kind = MEMORIES[name]
    model = tiny_model(tiny_config(memory={"kind": name, "share": True}))
    assert kind.name == name
    assert issubclass(load_class(kind.path), ProductKeyMemory)
    first, second = (memory for _, memory in model.memories())
    assert type(first) is load_class(kind.path)
    assert len(first.tables) == kind.tables
    assert all(a is b for a, b in zip(first.tables, second.tables, strict=True))


def test_a_wrong_kind_names_the_choices() -> None:
    with pytest.raises(ValueError, match="model.mixer.kind is 'lsj'; expected one of softmax, lo"):
        MixerConfig(kind="lsj")
    with pytest.raises(ValueError, match="model.memory.kind is 'pkn'; expected one of pkm, peer"):
        MemoryConfig(kind="pkn")
    assert names(lambda kind: kind.constant_state) == "linear and delta"


def test_explain_lists_the_kinds_without_torch() -> None:
    script = (
        "import sys\nfrom memshard.launch.cli.main import main\n"
        "assert main(['config', 'explain', 'model']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for kind in (*MIXERS.values(), *MEMORIES.values()):
        assert f"{kind.name}: {kind.description}" in text


def test_no_other_file_names_a_kind() -> None:
    # Not launch, whose `local` is a launcher; experiments and benchmarks choose kinds. Imports and
    # kernels mean the softmax that weighs reads.
    weighing = (
        "trainer/export/foreign.py",
        "models/kernels/triton_search",
        "models/kernels/self_test",
    )
    rooms = [PACKAGE / room for room in ("models", "parallel", "trainer")]
    files = [path for room in rooms for path in room.rglob("*.py")]
    named = [
        f"{path}:{node.lineno}"
        for path in files
        if not str(path.relative_to(PACKAGE)).startswith((*HOMES, *weighing))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in (MIXERS.keys() | MEMORIES.keys())
    ]
    assert not named


def test_no_sentence_of_the_planner_or_the_commands_names_a_kind() -> None:
    # The words that mean nothing else: `local` is also a launcher, `rows` also rows, `softmax` also
    # weighs reads.
    names = {*MIXERS, *MEMORIES, *LAYOUTS, *DENSE_KINDS} - {"local", "rows", "columns", "softmax"}
    word = re.compile(rf"\b({'|'.join(sorted(names, key=len, reverse=True))})\b", re.IGNORECASE)
    rooms = ("launch/cli", "trainer/cost", "trainer/watch")
    named = [
        f"{path}:{node.lineno}: {match[0]}"
        for path in (path for room in rooms for path in (PACKAGE / room).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (match := word.search(node.value))
    ]
    assert not named
