"""Build a data folder from images: an image is one record, a token a colour value in raster order,
followed by <eos>.
"""

import argparse
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memshard.data_pipeline.format.index import HELD_OUT, TEST, TRAIN, Index
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
from memshard.data_pipeline.prepare.workers import Watch, cores, run_tasks
from memshard.data_pipeline.prepare.write_shards import finish_shard, finished_split
from memshard.io import named

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
EOS = 256
IMAGES_PER_SHARD = 8192


def build(args: argparse.Namespace) -> dict:
    """Run `memshard data build --images` and return its report."""
    passed_over: Counter[str] = Counter()
    files = find_files(args.sources, IMAGE_SUFFIXES, args.exclude, passed_over=passed_over)
    report = build_images(
        [Path(file) for file in files],
        args.out,
        size=args.image_size,
        gray=args.gray,
        held_out=0.01 if args.held_out is None else args.held_out,
        test=args.test or 0.0,
        workers=args.workers,
    )
    return report | {"files_passed_over": dict(passed_over)}


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
) -> dict:
    """Write the data folder `out` and return its report.

    Every image is cut to its central square and scaled to size x size pixels; files with equal
    bytes are taken once. ValueError with the fix; an image that cannot be read is named.
    """
    target = Path(out).resolve()
    check_target(target)
    check_amounts(held_out, test)
    if size < 1:
        raise ValueError(f"--image-size is {size}; it must be at least 1")
    hashes = np.array(
        [
            int.from_bytes(hashlib.blake2b(file.read_bytes(), digest_size=8).digest(), "big")
            for file in files
        ],
        np.uint64,
    )
    keep = np.zeros(len(files), dtype=bool)
    # Before reading any image: files with equal bytes cost a hash each.
    keep[np.unique(hashes, return_index=True)[1]] = True
    sides = choose_sides(hashes, keep, held_out, test)
    channels = 1 if gray else 3
    work = target.parent / f".{target.name}.work"
    work.parent.mkdir(parents=True, exist_ok=True)
    with alone(work):
        final = work / f"data-{digest(hashes.tobytes(), size, gray, held_out, test)}"
        final.mkdir(exist_ok=True)
        names, tasks = {}, []
        for split, side in ((TRAIN, TRAIN_SIDE), (HELD_OUT, HELD_OUT_SIDE), (TEST, TEST_SIDE)):
            selected = [files[number] for number in np.flatnonzero(keep & (sides == side)).tolist()]
            parts = [
                selected[begin : begin + IMAGES_PER_SHARD]
                for begin in range(0, len(selected), IMAGES_PER_SHARD)
            ]
            names[split] = [f"{split}-{number:05d}" for number in range(len(parts))], len(selected)
            tasks += [
                (name, part, final, size, gray)
                for name, part in zip(names[split][0], parts, strict=True)
            ]
        # A shard's JSON is written last, so those that have one are whole, from a build
        # that was interrupted.
        todo = [task for task in tasks if not (final / f"{task[0]}.json").exists()]
        run_tasks(write_image_shard, todo, min(workers or cores(), len(todo)), "reading images")
        values = size * size * channels
        splits = {
            split: finished_split(final, shards, images * values, images)
            for split, (shards, images) in names.items()
            if shards or split != TEST
        }
        # No tokenizer: a token is a byte, and 256 the <eos> after each image, which needs 16 bits.
        index = Index("uint16", EOS + 1, EOS, "", "", splits, "images", (size, size, channels))
        report = {
            "files": len(files),
            "images": int(keep.sum()),
            "equal": int((~keep).sum()),
            "vocabulary": EOS + 1,
            "splits": {
                name: {"documents": split.documents, "tokens": split.tokens}
                for name, split in splits.items()
            },
        }
        publish(final, target, index, report)
        shutil.rmtree(work)
    return report


def write_image_shard(
    watch: Watch, name: str, files: Sequence[Path], folder: Path, size: int, gray: bool
) -> None:
    """Write one shard of images."""
    from PIL import Image, ImageOps

    with named(folder / name), ShardWriter(folder, name, "uint16") as writer:
        for number, file in enumerate(files):
            with watch.item(number):
                try:
                    # Converted before it is scaled: means of a palette's numbers are no colours.
                    with Image.open(file) as image:
                        square = ImageOps.fit(
                            _upright(image).convert("L" if gray else "RGB"),
                            (size, size),
                            Image.Resampling.BICUBIC,
                        )
                # Pillow raises SyntaxError for a damaged PNG.
                except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                    raise ValueError(
                        f"{file} is no image that can be read ({error}): leave it out"
                    ) from error
                writer.add(np.append(np.asarray(square, dtype=np.uint16), np.uint16(EOS)))
        finish_shard(writer, folder, name)


def _upright(image: "Image.Image") -> "Image.Image":
    """Return an image as viewers show it: turned as its EXIF data say, in 8 bits a colour."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return image
    # 16 bits of gray, of which `convert` would make all above 255 white.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
