"""The rules of the repository: who may import whom, without circles; how long a file and a line of
the documentation may be; that every recipe key is explained, every public name documented, and
every command in the documentation exists.
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import memshard
from memshard.launch.cli.main import command_parser
from memshard.trainer.config.explain import fields

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memshard"
ALLOWED_IMPORTS = {
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
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

# gallery.md is written by `make gallery`; the others are long on figures in a row.
NOT_WRAPPED = {"gallery.md", "benchmarks.md", "experiments.md", "search.md"}


def _imports(path: Path) -> Iterator[str]:
    """Yield every module or name imported anywhere in the file, inside functions as well, and every
    use of torch.distributed as an attribute.
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


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    wrong = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for name in _imports(path):
            parts = name.split(".")
            # launch/ may import memshard itself, for its version; io.py and lock.py are for all.
            allowed = ALLOWED_IMPORTS[package] | {package, "io", "lock", "redact", "variables"}
            if parts[0] == "memshard" and not (set(parts[1:2]) or {"launch"}) <= allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            external = {"torch", "memshard"} | (
                {"triton", "fla"} if path.parent.name == "kernels" else set()
            )
            if package == "models" and parts[0] not in sys.stdlib_module_names | external:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}; models/ needs torch alone")
            if package == "models" and _under(name, "torch.distributed"):
                wrong.append(
                    f"{path.relative_to(ROOT)} uses torch.distributed; make it a hook that "
                    "parallel/ fills"
                )
    assert not wrong, "\n".join(wrong)


def _imported_first(path: Path) -> Iterator[str]:
    """Yield the names that importing the file imports: those at its top, outside TYPE_CHECKING."""
    nodes: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.dump(node):
            nodes += node.body + node.orelse


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {
        name: {
            target
            for imported in _imported_first(path)
            for target in (imported, imported.rpartition(".")[0])
            # Packages are loaded before their modules and are nearly all empty.
            if target in modules and target != name and modules[target].name != "__init__.py"
        }
        for name, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_folder_is_a_package_with_rules_and_seven_have_links_at_the_root() -> None:
    folders = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == {*ALLOWED_IMPORTS, "recipes"}
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


def _without_encoding(path: Path) -> Iterator[str]:
    """Yield place and text of the calls that read or write text in the encoding of the locale."""
    binary = ("tarfile.open", "Image.open", "os.open")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {word.arg for word in node.keywords}:
            continue
        called, arguments = ast.unparse(node.func), [ast.unparse(value) for value in node.args]
        name = called.rpartition(".")[2]
        if name in ("open", "fdopen") and called not in binary:
            wrong = not re.search("'[rwax+]*b", " ".join(arguments))
        else:
            wrong = called.endswith((".read_text", ".write_text")) and "'utf-8'" not in arguments
        if wrong:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {called}({', '.join(arguments)})"


def test_every_text_file_is_read_and_written_in_a_stated_encoding() -> None:
    """Else a locale of ISO-8859-1 writes files that no other reads."""
    wrong = [place for path in FILES for place in _without_encoding(path)]
    assert not wrong, "\n".join(wrong)


def test_every_recipe_key_is_explained() -> None:
    assert not [key.name for key in fields() if not key.doc.endswith(".")], (
        "keys without a docstring that is a sentence"
    )


def test_every_public_name_is_documented_and_none_else() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE)
    documented = [name for cell in cells for name in re.findall(r"`(\w+)", cell)]
    assert sorted(documented) == memshard.__all__


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines of a page outside tables and code blocks."""
    code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.lstrip().startswith("```")
        if not code and not line.startswith(("|", "    ")):
            yield number, line


def test_the_readme_fits_into_120_lines_and_pages_into_100_columns() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    long = [
        f"{path.name}:{number}"
        for path in PAGES
        if path.name not in NOT_WRAPPED
        for number, line in _paragraphs(path)
        # A link or picture cannot be wrapped.
        if len(line) > 100 and not re.search(r"\]\([^)]{20,}\)", line)
    ]
    assert not long, long


def test_relative_links_of_the_root_pages_lead_to_files() -> None:
    """Links of docs/ are checked by `make docs`, with their anchors."""
    dead = [
        f"{path.name}: {target}"
        for path in PAGES
        if path.parent == ROOT
        for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
        # GitHub's badge of the workflow is outside the repository.
        if not target.startswith(("https:", "../../actions/")) and not (ROOT / target).exists()
    ]
    assert not dead, dead


def _command_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of what a page says to run: lines of code blocks, and inline code."""
    code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif code:
            yield number, line.removeprefix("$ ")
        else:
            yield from ((number, text) for text in re.findall(r"`([^`]+)`", line))


def _mentioned(command: str) -> Iterator[tuple[str, str]]:
    """Yield page:line and the words behind `command`, at the beginning of a command line or behind
    what launches it.
    """
    launcher = (
        r"(?:^|^\S*torchrun .*-- |^\S*python -m |^OMP_NUM_THREADS=\d+ (?:\S*torchrun .*-- )?)"
    )
    for path in PAGES:
        for number, line in _command_lines(path):
            if match := re.match(rf"{launcher}{command}\s+([^#]*)", line):
                yield f"{path.name}:{number}", match[1]


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def _problem(words: list[str]) -> str | None:
    """Return what is wrong with the words of a `memshard` command line, or None. Words in capitals
    are placeholders, `a|b` alternatives.
    """
    parser: argparse.ArgumentParser = command_parser()
    for word in words:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not nested or word.startswith("-") or word.isupper():
            break
        if unknown := [name for name in word.split("|") if name not in nested[0].choices]:
            return f"there is no command {unknown[0]}"
        parser = nested[0].choices[word.split("|")[0]]
    if words[:1] == ["bench"]:
        return None  # a benchmark's file declares its options when it is run
    named = {
        word.partition("=")[0].strip("[]") for word in words if word.lstrip("[").startswith("--")
    }
    if unknown := sorted(named - _options(parser) - {"--json", "--debug", "--"}):
        return f"there is no option {', '.join(unknown)}"
    return None


def test_every_memshard_command_in_the_documentation_exists() -> None:
    commands = list(_mentioned("memshard"))
    assert len(commands) > 100, "the pattern finds the commands"
    wrong = []
    for place, text in commands:
        words = shlex.split(text.replace("'", ""), comments=True)
        if problem := _problem(words):
            wrong.append(f"{place}: memshard {text}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_every_make_target_in_the_documentation_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    wrong = [
        f"{place}: make {word}"
        for place, text in _mentioned("make")
        for word in text.split()
        if word not in targets and "=" not in word
    ]
    assert not wrong, wrong


def test_modules_and_files_named_in_the_documentation_exist() -> None:
    wrong = []
    for path in PAGES:
        for name in re.findall(r"python -m ([\w.]+)", path.read_text(encoding="utf-8")):
            if find_spec(name) is None:
                wrong.append(f"{path.name}: python -m {name}")
        if path.name != "log.md":
            for name in re.findall(
                r"`((?:memshard|tests|examples|docs)/[\w./-]+\.\w+)`", path.read_text("utf-8")
            ):
                if "NAME" not in name and not (ROOT / name).exists():
                    wrong.append(f"{path.name}: {name}")
    assert not wrong, wrong


def _loaded(code: str) -> set[str]:
    """Return the top-level modules in memory after running the code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_the_package_is_light_until_a_name_is_used() -> None:
    assert "torch" not in _loaded("import memshard; assert memshard.__all__")
    for name in memshard.__all__:
        assert getattr(memshard, name).__name__ == name


def test_layers_and_optimizers_are_light_to_import() -> None:
    loaded = _loaded("from memshard import ProductKeyMemory, RowAdam")
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


def test_the_page_of_faults_names_tests_that_exist() -> None:
    page = (ROOT / "docs/faults.md").read_text("utf-8")
    rows = [
        row for row in page.splitlines() if row.startswith("| ") and " What happened" not in row
    ]
    missing = []
    for row in rows:
        tests = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row.split("|")[-2])
        missing += [row] * (not tests)
        for file, name in tests:
            path = ROOT / "tests" / file
            if not path.is_file() or (name and f"def {name}(" not in path.read_text("utf-8")):
                missing.append(f"{file}::{name}")
    assert rows and not missing
