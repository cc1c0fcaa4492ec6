"""Decide whether a document is prose, by rules of Gopher (Rae et al. 2021, appendix A.1.1) and C4
(Raffel et al. 2020, section 2.2).

Code, menus and lists of products fail. The name of the first rule that fails is returned, so that
each can be counted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice

MIN_WORDS, MAX_WORDS = 50, 100_000
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)]*(?:\s|$)")
# (n, largest share of characters in the most frequent n-gram)
REPEATED_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))


def failed_rule(text: str, english: bool = True) -> str | None:
    """Return the name of the first rule that the text fails, or None. english: also require English
    stop words.
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return "words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "word_length"
    if (text.count("#") + text.count("...") + text.count("\u2026")) / len(words) > 0.1:
        return "symbols"
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if sum(line.startswith(("\u2022", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "alphabetic"
    lower = [word.lower() for word in words]
    if english and len(STOP_WORDS.intersection(lower)) < 2:
        return "stop_words"
    if _repeated_share(lines) > 0.3:
        return "repeated_lines"
    if any(_most_frequent_share(lower, count) > share for count, share in REPEATED_NGRAMS):
        return "repeated_ngrams"
    # Stops at the third: a long document need not be searched to its end.
    if sum(1 for _ in islice(SENTENCE_END.finditer(text), 3)) < 3:
        return "sentences"
    folded = text.casefold()
    if "lorem ipsum" in folded:
        return "lorem_ipsum"
    return "curly_bracket" if "{" in text else None


def _repeated_share(lines: Sequence[str]) -> float:
    """Return the share of lines that repeat an earlier one."""
    return 1 - len(set(lines)) / len(lines)


def _most_frequent_share(words: Sequence[str], count: int) -> float:
    """Return the most frequent repeated n-gram's share of the characters. count: words of one."""
    ngrams = Counter(zip(*(words[start:] for start in range(count)), strict=False))
    ngram, times = ngrams.most_common(1)[0]
    return times * sum(map(len, ngram)) / sum(map(len, words)) if times > 1 else 0.0
