"""Tokens that count as one in n-grams, since they only differ in case, accents or white space.

Loads no torch.
"""

import re
import unicodedata
from collections.abc import Hashable, Sequence

# Unicode's White_Space; Python's `str.strip` also takes the separators U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"
_ONE_SPACE = "\ue000"


def fold_text(
    texts: Sequence[str | None], pieces: Sequence[str] | None = None
) -> tuple[list[int], int]:
    """Return the id of each token in n-grams, and the number of such ids: tokens whose folded texts
    agree get the same, counted in the order in which they first appear (deepseek-ai/Engram).

    texts: of each token; None for one that stays itself, such as a control token or a byte. pieces:
    what the vocabulary calls each token, which counts instead of a text that is no whole character
    (U+FFFD); without them such a token stays itself.
    """
    ids: dict[Hashable, int] = {}
    mapped = []
    for token, text in enumerate(texts):
        key: Hashable
        if text is not None and _NO_TEXT not in text:
            key = fold(text) or text
        elif text is not None and pieces is not None:
            key = pieces[token]
        else:
            key = token
        mapped.append(ids.setdefault(key, len(ids)))
    return mapped, len(ids)


def fold(text: str) -> str:
    """Return the text in compatibility form, without accents, in lower case, its white space one
    space each and none at the ends, unless it is nothing else.
    """
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    # Character by character: a whole word's last sigma has a form of its own.
    text = re.sub("[ \t\r\n]+", " ", "".join(c.lower() for c in text))
    if text == " ":
        text = _ONE_SPACE
    # The reference keeps a single space by this character, and so takes it for one everywhere.
    return text.strip(_WHITE_SPACE).replace(_ONE_SPACE, " ")
