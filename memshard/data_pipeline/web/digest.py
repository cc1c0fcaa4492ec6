"""Digests of WARC records, such as `sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ`."""

import base64
import hashlib
from collections.abc import Iterable

ALGORITHMS = ("md5", "sha1", "sha256", "sha384", "sha512")


def is_wrong(digest: str, contents: Iterable[bytes]) -> bool:
    """Return whether a digest is that of none of the contents. False for one that is not known."""
    label, _, value = digest.strip().partition(":")
    algorithm = label.strip().lower().replace("-", "")
    if algorithm not in ALGORITHMS or not value:
        return False
    return all(value.strip() not in _spelled(algorithm, content) for content in contents)


def _spelled(algorithm: str, content: bytes) -> set[str]:
    """Return a digest in the ways that archives write it."""
    computed = hashlib.new(algorithm, content, usedforsecurity=False)
    base32 = base64.b32encode(computed.digest()).decode().rstrip("=")
    return {
        *(computed.hexdigest(), computed.hexdigest().upper()),
        *(base32, base32.lower(), base32 + "=" * (-len(base32) % 8)),
        base64.b64encode(computed.digest()).decode(),
    }
