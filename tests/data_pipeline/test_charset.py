"""The characters of a page: what browsers read, whatever header, declaration and bytes say."""

import codecs

import pytest

pytest.importorskip("resiliparse", reason="pip install 'memshard[data]'")

from memshard.data_pipeline.web.charset import decode

KOREAN = (
    "모든 인류 구성원의 천부의 존엄성과 동등하고 양도할 수 없는 권리를 인정하는 것이 세계의 자유"
)
RUSSIAN = (
    "Принимая во внимание, что признание достоинства, присущего всем членам человеческой семьи"
)
ICELANDIC = "Það ber að viðurkenna, að hver maður sé jafnborinn til virðingar og réttinda"
JAPANESE = "人類社会のすべての構成員の固有の尊厳と平等で譲ることのできない権利とを承認することは"
CHINESE = "鉴于对人类家庭所有成员的固有尊严及其平等的和不移的权利的承认"


def page(text: str, codec: str, meta: str = "") -> bytes:
    declaration = f'<meta charset="{meta}">' if meta else ""
    return f"<html><head>{declaration}</head><p>{text}</p></html>".encode(codec)


@pytest.mark.parametrize(
    ("text", "codec", "header"),
    [
        (KOREAN, "euc_kr", "text/html; charset=euc-kr"),
        (KOREAN + "똠방각하 펲시", "cp949", "text/html; charset=EUC-KR"),  # outside Python's euc_kr
        (KOREAN, "cp949", 'text/html;charset="ks_c_5601-1987"'),
        (RUSSIAN, "cp1251", "text/html; charset=windows-1251"),
        (RUSSIAN, "koi8_r", "text/html; charset='koi8-r'"),
        (RUSSIAN, "mac_cyrillic", "text/html; charset=x-mac-cyrillic"),
        (ICELANDIC, "cp1252", "text/html; charset=iso-8859-1"),
        (ICELANDIC + " “€”", "cp1252", "text/html; Charset = latin1"),
        (JAPANESE, "cp932", "text/html; charset=x-sjis"),
        (JAPANESE + "①㈱", "cp932", "text/html; charset=shift_jis"),
        (JAPANESE, "iso2022_jp", "text/html; charset=iso-2022-jp"),
        (CHINESE + "镕", "gb18030", "text/html; charset=gb2312"),
        (ICELANDIC, "utf-8", "text/html; charset=UTF8"),
        (RUSSIAN, "utf-16-le", "text/html; charset=utf-16"),
        (RUSSIAN, "utf-8", "a/b; charset=koi8-r, text/html; charset=utf-8"),
    ],
)
def test_the_header_says_it_by_the_labels_of_browsers(text: str, codec: str, header: str) -> None:
    assert text in decode(page(text, codec), header)


@pytest.mark.parametrize("meta", ["utf-8", "windows-1252", "koi8-r", "shift_jis"])
@pytest.mark.parametrize(("text", "codec"), [(KOREAN, "euc-kr"), (RUSSIAN, "windows-1251")])
def test_the_header_wins_over_a_declaration(text: str, codec: str, meta: str) -> None:
    assert text in decode(page(text, codec, meta), f"text/html; charset={codec}")


@pytest.mark.parametrize("header", ["", "text/html; charset=koi8-r"])
@pytest.mark.parametrize("meta", ["", "windows-1251"])
@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_a_byte_order_mark_wins_over_both(mark: bytes, codec: str, meta: str, header: str) -> None:
    decoded = decode(mark + page(RUSSIAN, codec, meta), header)
    assert RUSSIAN in decoded and decoded.startswith("<html>")


@pytest.mark.parametrize(
    "declaration",
    [
        "<meta charset=koi8-r>",
        "<META CHARSET = 'KOI8-R' />",
        '<meta content="text/html; charset=koi8-r" http-equiv="content-type">',
        '<?xml version="1.0" encoding="koi8-r"?>',
        "<!-- <meta charset=utf-8> --><meta charset=koi8-r>",
        "<meta name=description content=utf-8>\n<meta\ncharset=koi8-r>",
        "<meta charset=unknown><meta charset=koi8-r>",
        f"<style>{'p {} ' * 1000}</style><meta charset=koi8-r>",
    ],
)
def test_declarations_count_where_no_header_says_it(declaration: str) -> None:
    body = f"{declaration}<p>{RUSSIAN}".encode("koi8-r")
    for header in ("", "text/html", "text/html; charset=nonsense"):
        assert RUSSIAN in decode(body, header)


def test_a_declaration_that_can_be_read_is_not_in_utf_16() -> None:
    assert RUSSIAN in decode(page(RUSSIAN, "utf-8", "utf-16"))


def test_a_bad_byte_costs_one_character_and_not_the_encoding() -> None:
    """A library's fallback to windows-1252 made `naÃ¯ve` of whole pages."""
    for text, codec, header in (
        ("naïve Größe, café " * 50, "utf-8", "text/html; charset=utf-8"),
        (KOREAN, "cp949", "text/html; charset=euc-kr"),
    ):
        decoded = decode(page(text, codec).replace(b"</p>", b"\xff</p>"), header)
        assert text in decoded and decoded.count("\ufffd") == 1
    assert "naïve" in decode(page("naïve " * 50, "utf-8", "utf-8") + b"\xff")


def test_bytes_that_are_utf_8_are_read_as_that_where_nothing_says_it() -> None:
    assert "Café" in decode(b"<p>Caf\xc3\xa9")
    assert RUSSIAN * 5 in decode(page(RUSSIAN * 5, "cp1251"))
