from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memshard.models.config import MemoryConfig, ModelConfig
from memshard.trainer.config.diff import diff
from memshard.trainer.config.explain import explain, fields
from memshard.trainer.config.load import RecipeError, bundled, dump, load_recipe
from memshard.trainer.config.optimizers import OptimizerConfig, TableOptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.parameters import count_parameters
from memshard.trainer.training import build_for_training
from tests.models.tiny import tiny_config

MINIMAL = "data: {path: shards}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_later_values_win_along_base_file_and_overrides(write) -> None:
    write(
        "data: {path: shards, length: 64}\nmodel: {layers: 2, memory: {keys: 64, layers: "
        "[1]}}\ntrain: {steps: 7}",
        "deep/a.yaml",
    )
    write("base: deep/a.yaml\nmodel: {layers: 3, memory: {heads: 2}}\n", "b.yaml")
    path = write("base: b.yaml\ntrain: {steps: 9, batch: 4}\n")
    recipe = load_recipe(
        path, ["train.batch=8", "model.memory.layers=[0, 2]", "optimizer={lr: 2e-4, warmup: 5}"]
    )
    assert (recipe.data.length, recipe.model.layers, recipe.train.steps, recipe.train.batch) == (
        64,
        3,
        9,
        8,
    )
    assert (recipe.model.memory.keys, recipe.model.memory.heads, recipe.model.memory.layers) == (
        64,
        2,
        (0, 2),
    )
    assert (recipe.optimizer.lr, recipe.optimizer.warmup) == (2e-4, 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("2", 2.0),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("1_000.0", 1000.0),
    ],
)
def test_numbers_are_read_as_people_write_them(write, text: str, value: float) -> None:
    path = write(f"{MINIMAL}optimizer: {{lr: {text}}}")
    assert load_recipe(path).optimizer.lr == value
    assert load_recipe(path, [f"tables.lr={text}"]).tables.lr == value


@pytest.mark.parametrize(
    "name", ["1e-3", "yes", "010", "1:30", "null", "2024-01-01", "a: b", "~", "#x", "  x "]
)
def test_a_dumped_recipe_reads_back_equal(write, name: str) -> None:
    model, optimizer = (
        ModelConfig(memory=MemoryConfig(layers=(0,))),
        OptimizerConfig(eps=1e-30, betas=(0.5, 0.25)),
    )
    recipe = Recipe(data=DataConfig(path=name), model=model, optimizer=optimizer)
    assert load_recipe(write(dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.memory.tpok=3",
            "unknown key 'model.memory.tpok'; did you mean 'model.memory.topk'?",
        ),
        ("model.topk=3", "did you mean 'model.memory.topk'?"),
        ("modle.layers=3", "unknown key 'modle'; did you mean 'model'?"),
        ("model.layers=3.7", "model.layers is 3.7 (float); expected integer"),
        ("model.layers=3.0", "expected integer"),
        ("model.layers=true", "expected integer"),
        ("model.layers=yes", "model.layers is 'yes' (str); expected integer"),
        ("model.layers='3'", "expected integer"),
        ("model.layers=", "model.layers is None (NoneType); expected integer"),
        ("model.tie_head=yes", "expected true or false"),
        ("model.tie_head=1", "expected true or false"),
        ("data.path=3", "data.path is 3 (int); expected text"),
        ("model.max_length=x", "expected integer or null"),
        ("model.memory.layers=1,3", "expected list [integer, ...]"),
        ("model.memory.layers=[1, a]", "expected list [integer, ...]"),
        (
            "optimizer.betas=[0.9]",
            "optimizer.betas is [0.9] (list); expected list [number, number]",
        ),
        ("model.norm=batch", "expected one of layer, rms"),
        ("model.layers.deep=1", "expected integer"),
        (
            "model.memory=4",
            "model.memory is 4; expected a section with keys such as model.memory.layers",
        ),
        ("model.layers", "override 'model.layers': expected key=value"),
        ("=3", "expected key=value"),
        ("model.layers=[1", "override 'model.layers=[1': not valid YAML"),
        ("model.memory.topk=999", "model.memory.topk is 999 but there are only 128 sub-keys"),
        (
            "model.memory.layers=[6]",
            "model.memory.layers names layer 6, but the model has 6 layers",
        ),
    ],
)
def test_a_wrong_override_is_one_clear_line(write, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(MINIMAL), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3}", "run.yaml: data.path is required"),
        ("", "data.path is required"),
        (
            f"{MINIMAL}model:\n  memory:\n    tpok: 3\n",
            "run.yaml: unknown key 'model.memory.tpok'; did you mean 'model.memory.topk'?",
        ),
        (
            f"{MINIMAL}train:\n  steps: ten\n",
            "run.yaml: train.steps is 'ten' (str); expected integer",
        ),
        (f"{MINIMAL}train:\n", "run.yaml: train is None; expected a section"),
        (f"{MINIMAL}train: {{steps: 1\nmodel: {{}}\n", "run.yaml, line 3: not valid YAML"),
        (f"{MINIMAL}train:\n\tsteps: 1\n", "run.yaml, line 3: not valid YAML"),
        (
            f"{MINIMAL}train: {{steps: 1}}\ntrain: {{batch: 2}}\n",
            "run.yaml, line 3: not valid YAML: 'train' is given twice",
        ),
        (f"{MINIMAL}1: 2\n", "run.yaml, line 2: not valid YAML: 1 is not a key"),
        ("- data\n- model\n", "run.yaml: not a recipe"),
        (
            f"{MINIMAL}base: [a, b]\n",
            "run.yaml: base is ['a', 'b']; expected the name or path of one recipe",
        ),
        (f"{MINIMAL}base: gone.yaml\n", "run.yaml: base: there is no recipe file"),
        (f"{MINIMAL}base: run.yaml\n", "recipes are each other's base"),
    ],
)
def test_a_wrong_file_is_one_clear_line(write, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cycle_of_bases_names_its_members(write) -> None:
    write("base: run.yaml\n", "b.yaml")
    with pytest.raises(ValueError, match=r"run.yaml -> .*b.yaml -> .*run.yaml"):
        load_recipe(write("base: b.yaml\n"))


def test_a_wrong_type_in_the_base_blames_the_base(write) -> None:
    write("train: {steps: x}\n", "b.yaml")
    with pytest.raises(ValueError, match=r"b.yaml: train.steps is 'x'"):
        load_recipe(write(f"{MINIMAL}base: b.yaml\n"))


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe named 'no-such-recipe'") as caught:
        load_recipe("no-such-recipe")
    assert all(name in str(caught.value) for name in bundled())
    for path in ("gone.yaml", "gone/"):
        with pytest.raises(FileNotFoundError, match="gone"):
            load_recipe(f"{tmp_path}/{path}")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.yaml: not a recipe: not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_load(name: str) -> None:
    assert load_recipe(name) == load_recipe(name, [])


def test_numbers_are_finite(write) -> None:
    """Every key that takes a number refuses NaN and infinity, alone or in a list, but the one that
    says when a loss is a spike.
    """
    path = write(MINIMAL)
    keys = [key for key in fields() if "number" in key.type]
    assert len(keys) > 20
    forms = {"list [number, number]": "[{}, 0.5]", "mapping {text: number}": "{{a: 1, b: {}}}"}
    for key in keys:
        for value in (".nan", ".inf", "-.inf"):
            override = f"{key.name}={forms.get(key.type, '{}').format(value)}"
            if override == "guards.threshold=.inf":
                assert load_recipe(path, [override]).guards.threshold == float("inf")
                continue
            # The loss scale's numbers are checked together.
            named = "train.loss_scale" if "loss_scale" in key.name else key.name
            with pytest.raises(RecipeError, match=rf"^{named}.* must be "):
                load_recipe(path, [override])


def test_numbers_of_settings_made_in_python_are_finite() -> None:
    for name, settings in (
        ("train.clip", {"train": TrainConfig(clip=float("nan"))}),
        ("optimizer.lr", {"optimizer": OptimizerConfig(lr=float("inf"))}),
        ("tables.clip", {"tables": TableOptimizerConfig(clip=float("inf"))}),
    ):
        with pytest.raises(ValueError, match=f"{name} is (nan|inf); it must be finite"):
            build_for_training(tiny_config(), **settings)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (OptimizerConfig, {"lr": "x"}, "optimizer.lr is 'x'; it must be a number"),
        (OptimizerConfig, {"betas": 3}, "optimizer.betas is 3; it must be two numbers"),
        (OptimizerConfig, {"betas": ("a", 0.9)}, "optimizer.betas is .*; it must be two numbers"),
        (TableOptimizerConfig, {"eps": None}, "tables.eps is None; it must be a number"),
        (TableOptimizerConfig, {"semantics": "x"}, "tables.semantics is 'x'; choose one of lazy"),
        (TrainConfig, {"steps": "x"}, "train.steps is 'x'; it must be a whole number"),
        (TrainConfig, {"batch": 8.5}, "train.batch is 8.5; it must be a whole number"),
    ],
)
def test_settings_made_in_python_are_of_their_kind(
    section: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        section(**settings)


def test_a_run_folder_stands_for_its_recipe(write) -> None:
    path = write(MINIMAL, "runs/x/config.yaml")
    assert load_recipe(path.parent) == load_recipe(path)


def test_diff_names_the_keys_that_differ(write) -> None:
    path = write(MINIMAL)
    a, b = load_recipe(path), load_recipe(path, ["model.memory.layers=[1]", "optimizer.lr=0.5"])
    assert diff(a, a) == []
    assert diff(a, b) == [("model.memory.layers", [], [1]), ("optimizer.lr", 0.001, 0.5)]


def test_explain_shows_type_default_and_meaning() -> None:
    assert (
        explain("model.memory.topk") == "model.memory.topk: integer; default 32; fixed for a run\n"
        "    Number of slots read per head and token."
    )
    assert "data.path: text; required; may change on resume" in explain("data")
    assert "model.mixer.heads" not in explain("model.memory")
    assert "tables.eps" in explain()
    with pytest.raises(ValueError, match="did you mean 'model.memory.topk'"):
        explain("model.memory.top")


def test_primer_and_its_baselines_have_equal_parameters() -> None:
    counts = {}
    for name in ("transformer", "transformer-gelu", "transformer-pp", "primer-ez", "primer"):
        counts[name] = count_parameters(replace(load_recipe(name).model, vocab_size=32_000)).dense
    assert counts["transformer-gelu"] == counts["transformer"] == pytest.approx(35.3e6, rel=0.01)
    for name, count in counts.items():
        assert count == pytest.approx(counts["transformer"], rel=2e-3), name
    assert (
        load_recipe("primer").model.mixer.convolution
        == load_recipe("primer-ez").model.mixer.convolution
        == 3
    )
