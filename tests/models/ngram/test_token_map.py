"""Tokens whose texts agree after folding count as one."""

import random
import subprocess
import sys
import unicodedata

import pytest

from memshard.models.ngram.token_map import fold, fold_text


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        (" Apple", "apple"),
        ("ÉCOLE", "ecole"),
        ("ﬁ", "fi"),
        ("Å", "a"),
        ("\uff21", "a"),  # a letter of full width
        ("ΟΔΟΣ", "οδοσ"),
        ("a \t\n b", "a b"),
        ("\n\n", " "),
        ("   ", " "),
        ("\u3000", " "),  # an ideographic space
        ("\x1c", "\x1c"),  # a separator, no white space
        ("\u2028", ""),  # white space that is none of the collapsed
        ("\u0301", ""),
        ("", ""),
    ],
)
def test_a_text_is_folded(text: str, folded: str) -> None:
    assert fold(text) == folded


def test_ids_count_folded_texts_as_they_appear() -> None:
    texts = ["the", " The", "dog", "THE", " ", "\n", "Dog", "\u0301", "\u0301\u0301"]
    assert fold_text(texts) == ([0, 0, 1, 0, 2, 2, 1, 3, 4], 5)


def test_what_is_no_text_stays_itself() -> None:
    texts = [None, "a", "\ufffd", "\ufffd", None, "A"]
    assert fold_text(texts) == ([0, 1, 2, 3, 4, 1], 5)
    assert fold_text(texts, ["s", "a", "Ġ½", "½", "/s", "A"]) == ([0, 1, 2, 3, 4, 1], 5)
    # A piece may be called what another token's text is.
    assert fold_text(["\ufffd", "x"], ["x", "x"]) == ([0, 0], 1)


def _reference() -> object:
    normalizers = pytest.importorskip("tokenizers").normalizers
    expression = pytest.importorskip("tokenizers").Regex
    space = "\ue000"
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(expression(r"[ \t\r\n]+"), " "),
            normalizers.Replace(expression(r"^ $"), space),
            normalizers.Strip(),
            normalizers.Replace(space, " "),
        ]
    )


def test_folding_is_that_of_the_normalizers_the_reference_uses() -> None:
    """Of characters of Unicode 3.2: the two libraries know others of later versions."""
    normalize = _reference().normalize_str  # type: ignore[attr-defined]
    known = [
        chr(code)
        for code in range(0, 0x30000)
        if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    draw = random.Random(0)
    texts = known[::7] + ["".join(draw.choices(known, k=4)) for _ in range(2000)]
    spaces = [*" \n\t\rAéΣ\u3000\xa0\x1c\x0b\u0301\ue000\u2028"]
    texts += ["".join(draw.choices(spaces, k=5)) for _ in range(5000)]
    different = [text for text in texts if normalize(text) != fold(text)]
    assert not different


def test_folding_loads_no_torch() -> None:
    script = (
        "import sys\nfrom memshard.models.ngram.token_map import fold_text\n"
        "fold_text(['a'])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
