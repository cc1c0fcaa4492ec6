"""Build a data folder from images: an image is one record, a token a colour value in raster order,
followed by <eos>.
"""

import argparse
import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memshard.data_pipeline.format.index import HELD_OUT, TEST, TRAIN, Index, Split
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.prepare.inputs.files import count_endings, find_files
from memshard.data_pipeline.prepare.pipeline import alone, check_target, digest, publish
from memshard.data_pipeline.prepare.split import (
    HELD_OUT_SIDE,
    TEST_SIDE,
    TRAIN_SIDE,
    check_amounts,
    choose_sides,
)
from memshard.data_pipeline.prepare.tolerance import too_many
from memshard.data_pipeline.prepare.workers import Watch, cores, run_tasks
from memshard.data_pipeline.prepare.write_shards import finish_shard, finished_split
from memshard.io import named

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
"""By content. Pillow opens others, whatever the name: PostScript, which it has gs run."""
_MOST_PIXELS = 1 << 26  # 8192 x 8192, in a process up to 0.5 GB
EOS = 256
IMAGES_PER_SHARD = 8192
log = logging.getLogger(__name__)


def build(args: argparse.Namespace) -> dict:
    """Run `memshard data build --images` and return its report."""
    passed_over: Counter[str] = Counter()
    files = find_files(args.sources, IMAGE_SUFFIXES, args.exclude, passed_over=passed_over)
    return build_images(
        [Path(file) for file in files],
        args.out,
        size=args.image_size,
        gray=args.gray,
        held_out=0.01 if args.held_out is None else args.held_out,
        test=args.test or 0.0,
        workers=args.workers,
        passed_over=passed_over,
    )


def describe(report: dict) -> str:
    """Return the report for people."""
    passed_over = report["files_passed_over"]
    splits = ", ".join(
        f"{name} {split['documents']:,} ({split['tokens']:,} tokens)"
        for name, split in report["splits"].items()
    )
    return (
        f"{report['data']}: {report['images']:,} images ({report['equal']:,} files equal to "
        f"another) in {report['seconds']} s: {splits}"
        + (f"; cannot be read: {report['unreadable']:,}" if report["unreadable"] else "")
        + (f"; passed over: {count_endings(passed_over)}" if passed_over else "")
    )


def build_images(
    files: Sequence[Path],
    out: str | os.PathLike[str],
    *,
    size: int = 32,
    gray: bool = False,
    held_out: float = 0.01,
    test: float = 0.0,
    workers: int | None = None,
    passed_over: Mapping[str, int] | None = None,
) -> dict:
    """Write the data folder `out` and return its report. passed_over: of `find_files`, for it.

    Every image is cut to its central square and scaled to size x size pixels; files with equal
    bytes are taken once. Images that cannot be read are left out, counted, and the first of a
    shard is named; ValueError names it if there are too many of them.
    """
    target = Path(out).resolve()
    check_target(target)
    check_amounts(held_out, test)
    if size < 1:
        raise ValueError(f"--image-size is {size}; it must be at least 1")
    hashes = np.array(
        [_hash(file) for file in files],
        np.uint64,
    )
    keep = np.zeros(len(files), dtype=bool)
    # Before reading any image: files with equal bytes cost a hash each.
    keep[np.unique(hashes, return_index=True)[1]] = True
    sides = choose_sides(hashes, keep, held_out, test)
    channels = 1 if gray else 3
    work = target.parent / f".{target.name}.work"
    work.parent.mkdir(parents=True, exist_ok=True)
    with alone(work) as lock:
        final = work / f"data-{digest(hashes.tobytes(), size, gray, held_out, test)}"
        final.mkdir(exist_ok=True)
        names, tasks = {}, []
        for split, side in ((TRAIN, TRAIN_SIDE), (HELD_OUT, HELD_OUT_SIDE), (TEST, TEST_SIDE)):
            selected = [files[number] for number in np.flatnonzero(keep & (sides == side)).tolist()]
            parts = [
                selected[begin : begin + IMAGES_PER_SHARD]
                for begin in range(0, len(selected), IMAGES_PER_SHARD)
            ]
            names[split] = [f"{split}-{number:05d}" for number in range(len(parts))]
            tasks += [
                (name, part, final, size, gray)
                for name, part in zip(names[split], parts, strict=True)
            ]
        # A shard's JSON is written last, so those that have one are whole, from a build
        # that was interrupted.
        todo = [task for task in tasks if not (final / f"{task[0]}.json").exists()]
        run_tasks(write_image_shard, todo, min(workers or cores(), len(todo)), "reading images")
        values = size * size * channels
        splits = {
            split: _finished_split(final, shards, values)
            for split, shards in names.items()
            if shards or split != TEST
        }
        images = sum(split.documents for split in splits.values())
        # No tokenizer: a token is a byte, and 256 the <eos> after each image, which needs 16 bits.
        index = Index("uint16", EOS + 1, EOS, "", "", splits, "images", (size, size, channels))
        report = {
            "files": len(files),
            "files_passed_over": dict(passed_over or {}),
            "images": images,
            "equal": int((~keep).sum()),
            "unreadable": int(keep.sum()) - images,
            "vocabulary": EOS + 1,
            "splits": {
                name: {"documents": split.documents, "tokens": split.tokens}
                for name, split in splits.items()
            },
        }
        publish(final, target, index, report)
        lock.remove_folder()
    return report


def write_image_shard(
    watch: Watch, name: str, files: Sequence[Path], folder: Path, size: int, gray: bool
) -> None:
    """Write one shard of images, without those that cannot be read, of which the first is logged.
    ValueError names it if they are half of the shard, or `too_many`.
    """
    bad, first = 0, ""
    with named(folder / name), ShardWriter(folder, name, "uint16") as writer:
        for number, file in enumerate(files):
            with watch.item(number):
                try:
                    square = _square(file, size, gray)
                except ValueError as error:
                    bad += 1
                    first = first or str(error)
                    if too_many(bad, number + 1):
                        raise ValueError(
                            f"{first}; {bad} of {number + 1:,} are like this"
                        ) from error
                    continue
                writer.add(np.append(np.asarray(square, dtype=np.uint16), np.uint16(EOS)))
        if bad and bad >= len(files) - bad:
            raise ValueError(first)
        if bad:
            log.warning("%s; it is left out, as are %d more images of %s", first, bad - 1, name)
        finish_shard(writer, folder, name)


def _square(file: Path, size: int, gray: bool) -> "Image.Image":
    """Return an image's central square, scaled. ValueError if it is damaged, OSError if its disk
    does not answer.
    """
    from PIL import Image, ImageOps

    try:
        # Converted before it is scaled: means of a palette's numbers are no colours.
        with named(file), Image.open(file, formats=_FORMATS) as image:
            # Before it is decoded: 169 million took 1.2 GB, of a file that may have 20 KB.
            if (pixels := math.prod(image.size)) > _MOST_PIXELS:
                raise ValueError(f"it has {pixels:,} pixels, more than {_MOST_PIXELS:,}")
            return ImageOps.fit(
                _upright(image).convert("L" if gray else "RGB"),
                (size, size),
                Image.Resampling.BICUBIC,
            )
    # Pillow raises SyntaxError for a damaged PNG, and OSError without a number for others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file} is no image that can be read ({error}): leave it out") from error


def _hash(file: Path) -> int:
    with named(file), file.open("rb") as stream:  # of any size, whatever it is called
        hashed = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8))
    return int.from_bytes(hashed.digest(), "big")


def _finished_split(folder: Path, names: Sequence[str], values: int) -> Split:
    """Return the index entry of a split of images with that many values each."""
    split = finished_split(folder, names, 0, 0)
    return replace(split, text_bytes=split.documents * values, words=split.documents)


def _upright(image: "Image.Image") -> "Image.Image":
    """Return an image as viewers show it: turned as its EXIF data say, in 8 bits a colour."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    # 16 bits of gray, of which `convert` would make all above 255 white.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
