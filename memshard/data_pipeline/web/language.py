"""Which language a text is in, without a model to download."""

from resiliparse.parse.lang import detect_fast

# resiliparse's distance to its nearest profile; above it, or on short text, it errs often.
CERTAIN_RANK = 400
CERTAIN_CHARACTERS = 600
OPINION_CHARACTERS = 1000


def detect_language(text: str) -> str:
    """Return an ISO 639-1 code, from resiliparse's linear-time detector where that is certain, else
    from py3langid.
    """
    language, rank = detect_fast(text)
    if rank <= CERTAIN_RANK and len(text) >= CERTAIN_CHARACTERS:
        return str(language)
    import py3langid

    return str(py3langid.classify(text[:OPINION_CHARACTERS])[0])


def may_be(text: str, language: str) -> bool:
    """Return quickly whether a text may be in a language; False only with near certainty."""
    # The fast detector may confirm; only the slower one may deny.
    return detect_fast(text, n_results=1)[0] == language or detect_language(text) == language
