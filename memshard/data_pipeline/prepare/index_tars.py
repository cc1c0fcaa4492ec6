"""Existing WebDataset tars of text as a data folder: they stay as they are and are tokenised when
they are read.

Every epoch then pays for the tokenizer again, which token shards pay for once; the order of reading
is the same.
"""

import argparse
import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from memshard.data_pipeline.format.index import (
    HELD_OUT,
    TEST,
    TRAIN,
    Index,
    Shard,
    Split,
    sha256_file,
)
from memshard.data_pipeline.prepare.duplicates import exact_hash
from memshard.data_pipeline.prepare.inputs.files import count_endings, find_files
from memshard.data_pipeline.prepare.pipeline import (
    TRIED_DOCUMENTS,
    alone,
    check_target,
    digest,
    publish,
)
from memshard.data_pipeline.prepare.report import warn_of_little
from memshard.data_pipeline.prepare.sample import sample_lines
from memshard.data_pipeline.prepare.split import (
    HELD_OUT_SIDE,
    TEST_SIDE,
    TRAIN_SIDE,
    check_amounts,
    choose_sides,
)
from memshard.data_pipeline.prepare.workers import Watch, cores, run_tasks
from memshard.data_pipeline.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    TokenizerModel,
    train_tokenizer,
)
from memshard.io import atomic_write, named

_END = 2 * tarfile.BLOCKSIZE  # empty blocks that end a tar
BATCH_DOCUMENTS = 512


def build(args: argparse.Namespace) -> dict:
    """Run `memshard data index` and return its report."""
    passed_over: Counter[str] = Counter()
    files = find_files(args.sources, (".tar",), passed_over=passed_over)
    return index_tars(
        [Path(file) for file in files],
        args.out,
        suffix=args.member,
        vocab_size=args.vocab,
        model=args.model,
        tokenizer=args.tokenizer,
        held_out=0.01 if args.held_out is None else args.held_out,
        test=args.test or 0.0,
        workers=args.workers,
        passed_over=passed_over,
    )


def describe(report: dict) -> str:
    """Return the report for people."""
    splits = ", ".join(
        f"{name} {split['documents']:,} ({split['tokens']:,} tokens)"
        for name, split in report["splits"].items()
    )
    passed_over = report["files_passed_over"]
    return (
        f"{report['data']}: {splits}\n"
        + (f"  passed over: {count_endings(passed_over)}\n" if passed_over else "")
        + "  the text is tokenised again in every epoch, at some 1 million tokens/s a core: set "
        "data.workers, or build token shards"
    )


def index_tars(
    tars: Sequence[Path],
    out: str | os.PathLike[str],
    *,
    suffix: str = "txt",
    vocab_size: int = 8192,
    model: TokenizerModel = "bpe",
    tokenizer: str | os.PathLike[str] | None = None,
    held_out: float = 0.01,
    test: float = 0.0,
    seed: int = 0,
    workers: int | None = None,
    passed_over: Mapping[str, int] | None = None,
) -> dict:
    """Write a data folder with links to `tars`, whose members ending in .`suffix` are the
    documents; returns its report. passed_over: of `find_files`, for it.

    Counts every document's tokens once. Resumes by tar after a kill. ValueError names a tar or
    member that cannot be read.
    """
    target = Path(out).resolve()
    check_target(target)
    check_amounts(held_out, test)
    names = [tar.name for tar in tars]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two of the tars have the same name ({max(names, key=names.count)}): rename one, an "
            "index knows them by name"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.work"
    with alone(work) as lock:
        no_text = ValueError(
            f"no member of {names[0]} and the other tars ends in .{suffix}: name the text's ending "
            "with --member"
        )
        if tokenizer:
            given = Tokenizer(tokenizer)
            given.warn_if_lossy(list(islice(_texts(tars, suffix), TRIED_DOCUMENTS)))
            proto = given.proto
        elif lines := sample_lines(_texts(tars, suffix), seed):
            proto = train_tokenizer(lines, vocab_size, model)
        else:
            raise no_text
        # Sizes and times, not hashes, to know a tar again: hashing terabytes just to
        # resume takes hours.
        facts = [(str(tar.resolve()), tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]
        final = work / f"data-{digest(proto, facts, suffix, held_out, test)}"
        final.mkdir(exist_ok=True)
        with named(final):
            (final / TOKENIZER_FILE).write_bytes(proto)
        todo = [
            (tar.resolve(), suffix, final)
            for tar in tars
            if not (final / f"{tar.name}.json").exists()
        ]
        run_tasks(_scan, todo, min(workers or cores(), len(todo)), "indexing")
        totals = [
            json.loads((final / f"{name}.json").read_text(encoding="utf-8")) for name in names
        ]
        tables = [np.load(final / f"{name}.all.npy") for name in names]
        hashes = np.concatenate([table[:, 4] for table in tables]).view(np.uint64)
        if not len(hashes):
            raise no_text
        sides = choose_sides(hashes, np.ones(len(hashes), dtype=bool), held_out, test)
        splits = {}
        for split, side in ((TRAIN, TRAIN_SIDE), (HELD_OUT, HELD_OUT_SIDE), (TEST, TEST_SIDE)):
            if split != TEST or (sides == side).any():
                splits[split] = _split(
                    final, split, list(zip(names, totals, tables, strict=True)), sides == side
                )
        warn_of_little(splits)
        for tar in tars:
            # Links: the tars may be terabytes, and nothing here changes them.
            (final / tar.name).symlink_to(tar.resolve())
            (final / f"{tar.name}.all.npy").unlink()
        used = Tokenizer(final)
        index = Index(
            "uint32",
            used.vocab_size,
            used.eos_id,
            TOKENIZER_FILE,
            used.sha256,
            splits,
            "raw",
            suffix=suffix,
        )
        keys = ("documents", "tokens", "text_bytes", "words")
        counts = {
            name: {key: getattr(split, key) for key in keys} for name, split in splits.items()
        }
        report = {
            "tars": len(tars),
            "files_passed_over": dict(passed_over or {}),
            "vocabulary": used.vocab_size,
            "splits": counts,
        }
        publish(final, target, index, report)
        lock.remove_folder()
    return report


def raw_text(content: bytes) -> str:
    """Return the text of a member."""
    # "-sig" drops a byte order mark, which Windows programs write.
    return content.decode("utf-8-sig")


def _scan(watch: Watch, tar: Path, suffix: str, folder: Path) -> None:
    """Write a tar's documents, int64 [documents, 5] of (offset, tokens with <eos>, CRC-32, bytes,
    hash), and its totals.
    """
    tokenizer = Tokenizer(folder)
    rows: list[tuple[int, ...]] = []
    words = []
    for batch in _batches(_members(tar, suffix)):
        with watch.item(0):
            texts = [raw_text(content) for _, content in batch]
            for (offset, content), text, ids in zip(
                batch, texts, tokenizer.encode_batch(texts, threads=1), strict=True
            ):
                # The table is int64, so the hash's 64 bits are stored as a signed number
                # and viewed back.
                signed = int(np.uint64(exact_hash(text)).view(np.int64))
                # + 1 for the <eos> after each document.
                rows.append((offset, len(ids) + 1, zlib.crc32(content), len(content), signed))
                words.append(len(text.split()))
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    path = folder / f"{tar.name}.all.npy"
    with atomic_write(path, durable=True) as file, file.open("wb") as stream:
        np.save(stream, table)
    totals = {"bytes": tar.stat().st_size, "sha256": sha256_file(tar), "words": words}
    with atomic_write(folder / f"{tar.name}.json", durable=True) as file:
        file.write_text(json.dumps(totals), encoding="utf-8")


def _members(tar: Path, suffix: str) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of every member that is a document and not blank."""
    try:
        size = tar.stat().st_size
        with _open(tar) as archive:
            for member in _headers(tar, archive):
                if member.isfile() and member.name.endswith(f".{suffix}"):
                    # Before it is read: a header can claim any size, and holes of any size.
                    if member.issparse():
                        raise ValueError(f"{tar}: {member.name} has holes: leave the tar out")
                    if member.size < 0 or member.offset_data + member.size > size:
                        raise ValueError(
                            f"{tar} ends inside {member.name}: fetch it again or leave it out"
                        )
                    stream = archive.extractfile(member)
                    assert stream is not None
                    content = stream.read()
                    try:
                        if raw_text(content).strip():
                            yield member.offset_data, content
                    except UnicodeDecodeError as error:
                        raise ValueError(
                            f"{tar}: {member.name} is not UTF-8 text ({error}): leave the tar out"
                        ) from error
    except tarfile.TarError as error:
        raise _no_tar(tar, error) from error


def _open(tar: Path) -> tarfile.TarFile:
    try:
        # "r:" refuses compressed tars: a document in one cannot be read by its offset.
        return tarfile.open(tar, "r:")
    except ValueError as error:  # of numbers in the first header
        raise _no_tar(tar, error) from error


def _headers(tar: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield all members. ValueError if the tar does not end behind the last one: tarfile takes a
    damaged header for the end, and so the first of two tars that were joined.
    """
    try:
        yield from archive
    except ValueError as error:  # of numbers in a header
        raise _no_tar(tar, error) from error
    with tar.open("rb") as file:
        file.seek(archive.offset)
        rest = file.read(_END)
        whole = len(rest) == _END
        while rest:
            whole &= not rest.strip(b"\0")
            rest = file.read(1 << 20)
    if not whole:
        raise ValueError(
            f"{tar} was cut, is damaged or goes on with another tar behind byte {archive.offset}, "
            "where no member begins: fetch it again or leave it out"
        )


def _no_tar(tar: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{tar} is no tar that can be read by ranges ({error}): fetch it again, uncompressed, or "
        "leave it out"
    )


def _batches(members: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    batch: list[tuple[int, bytes]] = []
    for member in members:
        batch.append(member)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(tars: Sequence[Path], suffix: str) -> Iterator[str]:
    for tar in tars:
        for _, content in _members(tar, suffix):
            yield raw_text(content)


def _split(
    folder: Path, split: str, tars: list[tuple[str, dict, np.ndarray]], in_split: np.ndarray
) -> Split:
    """Write a split's sidecars and return its entry of the index. in_split: bool [documents]."""
    shards, begin, text_bytes, words = [], 0, 0, 0
    for name, totals, table in tars:
        wanted = in_split[begin : begin + len(table)]
        begin += len(table)
        entries = np.ascontiguousarray(table[wanted][:, :4])
        sidecar = folder / f"{name}.{split}.index.npy"
        with atomic_write(sidecar, durable=True) as file, file.open("wb") as stream:
            np.save(stream, entries)
        text_bytes += int(entries[:, 3].sum())
        words += sum(np.array(totals["words"], dtype=np.int64)[wanted].tolist())
        sha256 = hashlib.sha256(sidecar.read_bytes()).hexdigest()
        shards.append(
            Shard(
                name,
                len(entries),
                int(entries[:, 1].sum()),
                totals["bytes"],
                totals["sha256"],
                sidecar.name,
                sha256,
            )
        )
    documents, tokens = (
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
    )
    return Split(documents, tokens, text_bytes, words, tuple(shards))
