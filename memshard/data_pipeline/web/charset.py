"""Which characters the bytes of a page stand for, as browsers decide it (encoding.spec.whatwg.org,
and "determining the character encoding" of html.spec.whatwg.org).
"""

import codecs
import re

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from memshard.data_pipeline.web.records import Content

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Browsers look at 1,024 bytes at least, and some on to the end of <head>.
DECLARED_BYTES = 16_384
COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
DECLARED = re.compile(
    rb"""<meta\s[^>]*?charset\s*=\s*(?:["']\s*)?([^\s"'/>;]+)"""
    rb"""|^\s*<\?xml\s[^>]*?encoding\s*=\s*["']([^"']+)""",
    re.IGNORECASE,
)
LABEL = re.compile(r"""charset\s*=\s*(?:["']\s*)?([^\s"';,]+)""", re.IGNORECASE)
# Labels of browsers that resiliparse's table leaves out.
MORE_LABELS = {
    "x-user-defined": "cp1252",
    "x-mac-cyrillic": "mac_cyrillic",
    "x-mac-ukrainian": "mac_cyrillic",
}
# Python's codecs of these names lack characters that browsers read under them.
SUPERSETS = {
    "euc_kr": "cp949",
    "shift_jis": "cp932",
    "big5": "big5hkscs",
    "gbk": "gb18030",
    "iso8859-11": "cp874",
}


def decode(body: Content, content_type: str = "") -> str:
    """Return the text of a page. What is no character in its encoding becomes U+FFFD.

    The encoding is that of a byte order mark, else of the HTTP header (content_type), else of a
    <meta> or XML declaration, else UTF-8 if the bytes are, else what statistics suggest.
    """
    for mark, codec in BYTE_ORDER_MARKS:
        if body[: len(mark)] == mark:
            return str(body[len(mark) :], codec, "replace")
    labels = LABEL.findall(content_type)
    codec = (_codec(labels[-1]) if labels else None) or _declared(body) or ""
    if not codec:
        try:
            return str(body, "utf-8")
        except UnicodeDecodeError:
            detected = detect_encoding(bytes(body), html5_compatible=True) or "utf-8"
            codec = SUPERSETS.get(detected, detected)
    return str(body, codec, "replace")


def _declared(body: Content) -> str | None:
    """Return the codec of the first declaration in the page that browsers know, or None."""
    for match in DECLARED.finditer(COMMENT.sub(b"", bytes(body[:DECLARED_BYTES]))):
        if codec := _codec((match[1] or match[2]).decode("latin-1")):
            # It was read as ASCII, so it cannot be in UTF-16.
            return "utf-8" if codec in ("utf-16-le", "utf-16-be") else codec
    return None


def _codec(label: str) -> str | None:
    """Return the codec that browsers use for a label, or None for one that they do not know."""
    label = label.strip().lower()
    if label in MORE_LABELS:
        return MORE_LABELS[label]
    codec = map_encoding_to_html5(label, fallback_utf8=False)
    return SUPERSETS.get(codec, codec) if codec else None
