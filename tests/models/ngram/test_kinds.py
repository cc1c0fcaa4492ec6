"""The registry of rules, the settings of n-gram tables, and their sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memshard
from memshard.models.load_class import load_class
from memshard.models.ngram.kinds import RULES, NgramConfig
from memshard.models.ngram.primes import first_primes, is_prime


def test_a_prime_has_no_divisor() -> None:
    assert [n for n in range(-2, 60) if is_prime(n)] == [
        *(2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59),
    ]
    assert all(
        is_prime(n) == all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(9_000, 9_999)
    )


@pytest.mark.parametrize(
    ("number", "prime"),
    [
        (561, False),  # the least Carmichael number
        (3_215_031_751, False),  # passes the test with bases 2, 3, 5 and 7
        (2**61 - 1, True),
        (2**63 - 25, True),  # the greatest below 2**63
        (2**64 - 59, True),  # the greatest below 2**64
        ((2**31 - 1) * (2**31 - 19), False),
    ],
)
def test_primes_of_64_bits_are_decided_exactly(number: int, prime: bool) -> None:
    assert is_prime(number) is prime


def test_primes_begin_at_the_start_itself() -> None:
    assert first_primes(11, 3) == (11, 13, 17)


def test_the_published_tables_have_their_published_number_of_rows() -> None:
    """Qwen3.8's PLE has 320,001,536 rows; the sizes of the Engram demo are its own."""
    qwen = NgramConfig(layers=(1,), rule="qwen", rows=20_000_000)
    assert qwen.slots(248_320, 1) == 320_001_536
    engram = NgramConfig(layers=(1, 15), rows=129_280 * 5)
    assert engram.sizes(1, 1)[:3] == (646_403, 646_411, 646_421)
    assert engram.sizes(1, 15)[:2] == (646_631, 646_637)
    assert not set(engram.sizes(1, 1)) & set(engram.sizes(1, 15))


def test_sizes_of_each_rule() -> None:
    def sizes(rule: str, **settings: object) -> tuple[int, ...]:
        return NgramConfig(rule=rule, layers=(3, 1), rows=10, **settings).sizes(50, 1)

    assert sizes("token") == (50,)
    assert sizes("bigram") == (10,)
    assert sizes("longcat", heads=2) == (11, 13, 15, 17)
    assert sizes("engram", heads=2, order=2) == (17, 19)
    assert sizes("engram", heads=2, order=2, share=True) == (11, 13)


def test_reads_follow_from_order_and_heads() -> None:
    assert {name: NgramConfig(rule=name).reads for name in RULES} == {
        "bigram": 1,
        "longcat": 8,
        "engram": 16,
        "qwen": 16,
        "token": 1,
    }
    assert NgramConfig(order=4).reads == 24


def test_rows_share_the_models_width() -> None:
    assert NgramConfig().width(512) == 32
    assert NgramConfig(value_dim=40).width(100) == 40
    with pytest.raises(ValueError, match="model.dim is 100 and a token reads 16 rows"):
        NgramConfig().width(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "trigram"}, "rule is 'trigram'; expected one of bigram, longcat"),
        ({"place": "end"}, "place is 'end'; expected one of embedding, mixer"),
        ({"rule": "bigram", "order": 3}, "order is 3; that of rule bigram is 2: leave it out"),
        ({"order": 1}, "order is 1; that of rule engram is at least 2"),
        ({"rule": "token", "heads": 2}, "heads is 2; rule token has 1: leave it out"),
        ({"rows": 1}, "rows is 1; it must be at least 2"),
        ({"rows": 1 << 41}, "rows is 2199023255552; the limit is 1,099,511,627,776"),
        ({"heads": 1 << 20}, "heads is 1048576; the limit is 1,024: check the number"),
        ({"heads": 2.0}, "heads is 2.0; it must be a whole number"),
        ({"pad": -1}, "pad is -1; it must be at least 0"),
        ({"convolution": 1}, "convolution is 1; a width is at least 2"),
        ({"layers": (1, 1)}, r"layers is \[1, 1\]; name each layer once"),
        ({"place": "embedding", "layers": (1,)}, r"set model.ngram.layers to \[0\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"model.ngram.{message}|{message}$"):
        NgramConfig(**settings)


def test_the_padding_is_the_rules_unless_set() -> None:
    assert NgramConfig(eos=5).padding == 0
    assert NgramConfig(rule="qwen", eos=5).padding == 5
    assert NgramConfig(rule="qwen", pad=7).padding == 7
    with pytest.raises(ValueError, match="set model.ngram.eos"):
        assert NgramConfig(rule="qwen").padding


def test_settings_load_no_torch() -> None:
    script = (
        "import sys\nfrom memshard.models.ngram.kinds import NgramConfig\n"
        "NgramConfig(layers=(0,)).slots(9, 0)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rules_lead_to_what_builds_their_addresses() -> None:
    for name, rule in RULES.items():
        settings = NgramConfig(rule=name, layers=(2,), eos=1)
        addresses = load_class(rule.path)(settings, 50, 2)
        assert rule.name == name
        assert (addresses.reads, addresses.order) == (settings.reads, settings.length)
        assert addresses.slots == settings.slots(50, 2)


def test_no_other_file_names_a_rule() -> None:
    """But the public formats, one a rule. `token` means much else."""
    package = Path(memshard.__file__).parent
    rooms = [package / room for room in ("models", "parallel", "trainer")]
    files = [path for room in rooms for path in room.rglob("*.py")]
    named = [
        f"{path}:{node.lineno}"
        for path in files
        if path.name not in ("kinds.py", "ngram_formats.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in RULES.keys() - {"token"}
    ]
    assert not named
