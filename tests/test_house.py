"""The rules of the house: who may import whom, how long a file may be, that every recipe key is
explained.
"""

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshard.trainer.config.explain import fields

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memshard"
ARROWS = {
    "models": set(),
    "data_pipeline": set(),
    "parallel": {"models"},
    "trainer": {"models", "parallel", "data_pipeline"},
    "search": {"trainer", "models", "data_pipeline"},
    "experiments": {"search", "trainer", "models", "data_pipeline"},
    "bench": {"models", "parallel", "data_pipeline", "trainer", "search", "experiments"},
    "launch": {"models", "parallel", "data_pipeline", "trainer", "search", "experiments", "bench"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Every module or name imported anywhere in the file, inside functions too, and every use of
    torch.distributed as an attribute.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: relative import; write it from memshard down"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
        ):
            yield f"{node.value.id}.distributed"


def _under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("room", [room for room in ARROWS if (PACKAGE / room).is_dir()])
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    wrong = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for name in _imports(path):
            parts = name.split(".")
            # launch/ may import the package itself, for its version; io.py is for all.
            allowed = ARROWS[room] | {room, "io"}
            if parts[0] == "memshard" and not (set(parts[1:2]) or {"launch"}) <= allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            here = {"torch", "memshard"} | (
                {"triton", "fla"} if path.parent.name == "kernels" else set()
            )
            if room == "models" and parts[0] not in sys.stdlib_module_names | here:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}; models/ needs torch alone")
            if room == "models" and _under(name, "torch.distributed"):
                wrong.append(
                    f"{path.relative_to(ROOT)} uses torch.distributed; make it a hook that "
                    "parallel/ fills"
                )
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_package_is_a_room_and_seven_have_links_at_the_root() -> None:
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == {*ARROWS, "recipes"}
    links = {
        path.name
        for path in ROOT.iterdir()
        if path.is_symlink() and path.resolve() == PACKAGE / path.name
    }
    assert links == {
        "data_pipeline",
        "launch",
        "models",
        "parallel",
        "recipes",
        "search",
        "trainer",
    }


@pytest.mark.parametrize("package", ["deepspeed", "fairscale", "wandb"])
def test_an_optional_package_has_one_importer(package: str) -> None:
    importers = [
        path.relative_to(ROOT)
        for path in FILES
        if any(_under(name, package) for name in _imports(path))
    ]
    assert len(importers) <= 1, importers


def test_files_are_short() -> None:
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    for path, length in lengths.items():
        if length > 400:
            warnings.warn(f"{path} has {length} lines: split it by idea", stacklevel=1)
    assert not {path: length for path, length in lengths.items() if length > 600}


def test_every_recipe_key_is_explained() -> None:
    assert not [key.name for key in fields() if not key.doc.endswith(".")], (
        "keys without a docstring that is a sentence"
    )


def _loaded(code: str) -> set[str]:
    """Top-level modules in memory after running the code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_layers_and_optimizers_are_light_to_import() -> None:
    homes = ["memshard.models.memory.product_key", "memshard.trainer.optim.rows.adam"]
    if not all((ROOT / f"{home.replace('.', '/')}.py").exists() for home in homes):
        pytest.skip("the layer and its optimizer are not written yet")
    loaded = _loaded(f"import {', '.join(homes)}")
    heavy = loaded & {"pydantic", "webdataset", "tensorboard", "yaml", "sentencepiece"}
    assert "torch" in loaded and not heavy, heavy


def test_help_does_not_load_torch() -> None:
    code = (
        "from memshard.launch.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    )
    heavy = _loaded(code) & {"torch", "numpy", "pydantic", "yaml"}
    assert not heavy, "a command module imports this at its top; import it in run()"


def test_showing_a_recipe_does_not_load_torch(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {path: shards}\n")
    loaded = _loaded(
        "from memshard.launch.cli.main import main\nassert main(['config', 'show', "
        f"{str(tmp_path / 'a.yaml')!r}]) == 0"
    )
    assert "yaml" in loaded and "torch" not in loaded
