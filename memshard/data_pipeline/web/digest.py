"""Digests of WARC records, such as `sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ`."""

import base64
import binascii
import hashlib
from collections.abc import Iterable

from memshard.data_pipeline.web.records import Content

ALGORITHMS = ("md5", "sha1", "sha256", "sha384", "sha512")
# From the digits of base 32 (RFC 4648) to those of Python's int.
BASE32 = str.maketrans("abcdefghijklmnopqrstuvwxyz234567", "0123456789abcdefghijklmnopqrstuv")


def is_wrong(digest: str, contents: Iterable[Content]) -> bool:
    """Return whether a digest is that of none of the contents. False for one that is not known."""
    label, _, value = digest.partition(":")
    algorithm = label.strip().lower().replace("-", "")
    if algorithm not in ALGORITHMS or not value:
        return False
    hashes = (hashlib.new(algorithm, content, usedforsecurity=False) for content in contents)
    return all(hashed.digest() != _spelled(value, hashed.digest_size) for hashed in hashes)


def _spelled(value: str, size: int) -> bytes | None:
    """Return the bytes of a digest that is written in base 16, 32 or 64; None if it is in none."""
    digits = value.strip().rstrip("=")
    try:
        if len(digits) == 2 * size:
            return bytes.fromhex(digits)
        if len(digits) == -(-8 * size // 5):
            # base64.b32decode takes 30 times as long, a quarter of the digest's own time.
            spare = 5 * len(digits) - 8 * size
            return (int(digits.lower().translate(BASE32), 32) >> spare).to_bytes(size, "big")
        return base64.urlsafe_b64decode(digits.replace("+", "-").replace("/", "_") + "==")
    except (ValueError, OverflowError, binascii.Error):
        return None
