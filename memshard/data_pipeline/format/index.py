"""The index of a data folder: which shards each split has, and what they hold."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from memshard.data_pipeline.fetch import is_url
from memshard.data_pipeline.format.kinds import RECORD_KINDS, RecordKind
from memshard.data_pipeline.format.remote import local_copy
from memshard.io import named, parse_json, read_small

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
REPORT_FILE = "report.json"
TRAIN, HELD_OUT, TEST = "train", "heldout", "test"


@dataclass(frozen=True)
class Shard:
    """One tar of tokens or text, and its sidecar (`read_sidecar` says what that holds)."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    sidecar: str
    sidecar_sha256: str


@dataclass(frozen=True)
class Split:
    """Totals over the shards of a split. Tokens include the <eos> after each document; text bytes
    and words do not.
    """

    documents: int
    tokens: int
    text_bytes: int
    words: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """Content of index.json.

    kind: one of RECORD_KINDS. shape: height, width, channels of every image. suffix: of the tar
    members with raw text. report_sha256: of REPORT_FILE; folders of older versions have none.
    """

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer: str
    tokenizer_sha256: str
    splits: dict[str, Split]
    kind: str = "text"
    shape: tuple[int, int, int] | None = None
    suffix: str | None = None
    report_sha256: str = ""

    @property
    def records(self) -> RecordKind:
        """The kind of the records."""
        return RECORD_KINDS[self.kind]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index, and so of the hashes of all shards and the tokenizer; without that
        of the report, which names files on the machine that built the data.
        """
        return _sha256(_fields(dataclasses.replace(self, report_sha256="")))


def dump_index(index: Index) -> str:
    """Return the text of index.json, with the SHA-256 of its fields: counts of bytes and words can
    be checked by nothing else, and bits per byte rest on them.
    """
    fields = _fields(index)
    return _text({**fields, "sha256": _sha256(fields)})


def _fields(index: Index) -> dict[str, Any]:
    fields = dataclasses.asdict(index)
    # So a field that is added later changes neither text nor fingerprint of older folders.
    for item in dataclasses.fields(Index):
        if fields[item.name] == item.default:
            del fields[item.name]
    return {"format": FORMAT_VERSION, **fields}


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=1) + "\n"


def _sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_text(fields).encode()).hexdigest()


def load_index(path: str | os.PathLike[str]) -> Index:
    """Read and check the index of the data folder `path`, a folder or a URL: every file it names
    must be there with the right size. A URL's files are checked when they are read.

    Raises FileNotFoundError or ValueError that name the file and the fix.
    """
    folder, remote = Path(path), is_url(path)
    file = local_copy(path, INDEX_FILE)
    if not file.is_file():
        # A recipe's relative path means another folder wherever else its run is used.
        seen_from = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(
            f"{folder}{seen_from} is not a data folder (no {INDEX_FILE}): name another one "
            "(data.path, or --data of eval), or make one with `memshard data build SRC --out "
            f"{folder}`"
        )
    index = read_index(file.parent)
    for name in () if remote else _files(index):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: copy it back, or build the data set again"
            )
    for split in () if remote else index.splits.values():
        for shard in split.shards:
            # Sizes cost nothing at each start and catch what was cut; hashes are for
            # `memshard data verify`.
            size = (folder / shard.file).stat().st_size
            if size != shard.bytes:
                raise ValueError(
                    f"{folder / shard.file} has {size:,} bytes but {INDEX_FILE} says "
                    f"{shard.bytes:,}: "
                    "it was cut or changed; copy it again, or build the data set again"
                )
    return index


def read_index(folder: Path) -> Index:
    """Return the index of a local folder, without a look at its files. ValueError if damaged."""
    file = folder / INDEX_FILE
    try:
        fields: dict[str, Any] = parse_json(read_small(file))
        version = fields.pop("format")
        if version == FORMAT_VERSION:
            sha256 = fields.pop("sha256", None)  # folders of older versions have none
            splits = {
                name: Split(
                    **{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])}
                )
                for name, split in fields.pop("splits").items()
            }
            index = Index(
                **{**fields, "shape": tuple(fields["shape"]) if "shape" in fields else None},
                splits=splits,
            )
            _check(index)
            if sha256 not in (None, _sha256(_fields(index))):
                raise ValueError("its content differs from its hash")
            return index
    # Whatever JSON can hold: a list instead of an object, a missing field, one too many.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): copy it again, or build the data set again"
        ) from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {version} and this memshard reads up to {FORMAT_VERSION}: update "
            "memshard"
        )
    raise ValueError(f"{file} has the unknown format {version!r}: build the data set again")


def _check(index: Index) -> None:
    if set(index.splits) - {TEST} != {TRAIN, HELD_OUT}:
        raise ValueError(
            f"splits are {sorted(index.splits)}, expected {HELD_OUT} and {TRAIN}, perhaps {TEST}"
        )
    if index.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {index.dtype!r}, expected uint16 or uint32")
    # 4 bytes a token, and positions of torch and numpy are int64.
    vocabulary_fits = _is_number(index.vocab_size, 1 << 32) and index.vocab_size > 0
    if not vocabulary_fits or not _is_number(index.eos_id, index.vocab_size):
        raise ValueError(f"vocab_size is {index.vocab_size!r} and eos_id {index.eos_id!r}")
    if index.shape is not None and not all(_is_number(size, 1 << 20) for size in index.shape):
        raise ValueError(f"shape is {index.shape!r}")
    if index.kind not in RECORD_KINDS:
        raise ValueError(f"kind is {index.kind!r}, expected one of {', '.join(RECORD_KINDS)}")
    for name in _files(index):
        # An index may come from a stranger: "../../x" must not be opened or removed.
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)):
            raise ValueError(f"it names {name!r}: only plain names inside the folder are allowed")
    for sha256 in _hashes(index):
        # Parts of them are in names of the cache's files.
        if not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
            raise ValueError(f"{sha256!r} is no SHA-256")
    for name, split in index.splits.items():
        counts = (split.documents, split.tokens, split.text_bytes, split.words)
        sizes = ((shard.documents, shard.tokens, shard.bytes) for shard in split.shards)
        for number in chain(counts, *sizes):
            if not _is_number(number, 1 << 62):
                raise ValueError(f"{number!r} in split {name} is no count")
        for total in ("documents", "tokens"):
            if getattr(split, total) != sum(getattr(shard, total) for shard in split.shards):
                raise ValueError(f"the {total} of split {name} do not add up")


def _files(index: Index) -> list[str]:
    """Return the names of all files of a data folder besides the index."""
    # Times a bool: images have no tokenizer to look for.
    return [index.tokenizer] * index.records.tokenizer + [
        name
        for split in index.splits.values()
        for shard in split.shards
        for name in (shard.file, shard.sidecar)
    ]


def _hashes(index: Index) -> list[str]:
    """Return the hashes of the files that `_files` returns, in the same order."""
    return [index.tokenizer_sha256] * index.records.tokenizer + [
        sha256
        for split in index.splits.values()
        for shard in split.shards
        for sha256 in (shard.sha256, shard.sidecar_sha256)
    ]


def _is_number(value: Any, limit: int) -> bool:
    # `type(...) is int` refuses true and false, which Python also counts as integers.
    return type(value) is int and 0 <= value < limit


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex, reading 1 MB at a time."""
    digest = hashlib.sha256()
    with named(path), path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
