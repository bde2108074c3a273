"""Captions for a folder of images, as JSON lines: of each image, and of the boxes in it if they are given."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from mmgem.processing.image_loading import MAX_PIXELS
from mmgem.training.data.descriptions import read_descriptions
from mmgem.training.data.image_files import (
    FoundImages,
    ImageFile,
    ImageReader,
    Skipped,
    apply_to_batch,
    find_images,
    shorter_side_for,
)
from mmgem.training.inference import (
    generate_captions,
    generate_region_captions,
    pictures_prepared_once,
    tower_runs_once,
)
from mmgem.training.output_folder import whole_file
from mmgem.training.output_lock import one_writer
from mmgem.training.progress import progress


class CaptionReport(NamedTuple):
    """Report of `caption_folder`.

    Args:
        images: Images in the file.
        captioned: How many of them it had to caption.
        skipped: The files it left out, folders it could not look into, and lines of metadata it could not use.
        passed_over: How many files and links there are that are not read, by kind, see `FoundImages`.
    """

    images: int
    captioned: int
    skipped: list[Skipped]
    passed_over: dict[str, int]


@one_writer
def caption_folder(
    folder: str | Path,
    model,
    processor,
    out: str | Path,
    with_boxes: bool = False,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    names: Sequence[str] | None = None,
) -> CaptionReport:
    """Captions every image below a folder into a file of JSON lines `{"file_name": …, "caption": …, "version": …}`.

    Images that the file has already are not captioned again, whichever model did it, so that a killed run goes on
    where it stopped; but those are that have another size or time than their `version` says. Lines of images that are
    no longer there are taken out. Files that cannot be read are left out and reported.

    Args:
        folder: Where the images are, at any depth.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        out: The file; it is appended to.
        with_boxes: Whether to caption regions too: those that the metadata of `folder` (see `read_image_folder`) gives
            as `"boxes": [[x0, y0, x1, y1], …]`, in pixels. Lines then have `boxes` and `region_captions`, one each.
        batch_size: Images at a time.
        max_pixels: The most pixels of an image that is read.
        names: The only images, relative to `folder`, with forward slashes; by default all below it.

    Returns:
        How many images there are, and were captioned, and what was left out.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileNotFoundError: If `folder` is not there, or, with boxes, its metadata.
        ValueError: If there are no images that can be read, or the metadata or `out` does not hold what is expected.
    """
    found = find_images(folder, names=names)
    folder, out = Path(folder), Path(out)
    file_names = list(found.versions)
    skipped = [Skipped(name, reason) for name, reason in found.unseen.items()]
    boxes, lines_left_out = None, list[Skipped]()
    if with_boxes:
        descriptions = read_descriptions(folder, found, lines_left_out, {"boxes": "captions of boxes are asked for"})
        boxes = {file_name: description.boxes for file_name, description in descriptions.items()}
    done = _read_done(out, with_boxes)
    if stale := {name for name, version in done.items() if _is_stale(folder, found, name, version)}:
        _take_out(out, stale)
        done = {name: version for name, version in done.items() if name not in stale}
    todo = [file_name for file_name in file_names if file_name not in done]
    captioned = 0
    # Boxes are pixels of the image as it is, and what is in them may be small.
    reader = ImageReader(folder, None if with_boxes else shorter_side_for(processor), max_pixels)

    def write_lines(files: list[ImageFile]) -> list[dict[str, Any]]:
        with ExitStack() as stack:
            if boxes is not None:  # an image comes again with its boxes
                stack.enter_context(tower_runs_once(model))
                stack.enter_context(pictures_prepared_once(processor))
            lines = _caption(model, processor, files, boxes)
        return [line | {"version": found.versions[line["file_name"]]} for line in lines]

    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(out, "a", encoding="utf-8") as lines,
        progress(total=len(file_names), initial=len(file_names) - len(todo), desc="captions", unit="image") as bar,
    ):
        for batch in reader.read_batches(todo, batch_size, skipped):
            captions = apply_to_batch(write_lines, batch, skipped)
            lines.writelines(json.dumps(line, ensure_ascii=False) + "\n" for _, line in captions)
            lines.flush()
            os.fsync(lines.fileno())
            captioned += len(captions)
            bar.update(len(batch))
    if skipped and not done and not captioned:
        out.unlink()  # it has no line
        raise ValueError(
            f"`folder` is {str(folder)!r}, where no image can be read, such as {skipped[0].file_name!r}: "
            f"{skipped[0].reason}"
        )
    return CaptionReport(len(done) + captioned, captioned, skipped + lines_left_out, found.passed_over)


def _caption(model, processor, files: list[ImageFile], boxes: dict[str, list] | None) -> list[dict[str, Any]]:
    """The line of each image."""
    captions = generate_captions(model, processor, [file.image for file in files])
    lines: list[dict[str, Any]] = [
        {"file_name": file.file_name, "caption": caption} for file, caption in zip(files, captions, strict=True)
    ]
    if boxes is not None:
        for line in lines:
            line["boxes"] = boxes.get(line["file_name"], [])
        with_any = [(file.image, line["boxes"]) for file, line in zip(files, lines, strict=True) if line["boxes"]]
        region_captions: Iterator[str] = iter(())
        if with_any:
            images, boxes_of_images = zip(*with_any, strict=True)
            region_captions = iter(generate_region_captions(model, processor, images, boxes_of_images))
        for line in lines:
            line["region_captions"] = [next(region_captions) for _ in line["boxes"]]
    return lines


def _is_stale(folder: Path, found: FoundImages, name: str, version: str | None) -> bool:
    """Whether an image was edited or deleted since it was captioned; lines of 0.1.0 have no version."""
    if name in found.versions:
        return version is not None and version != found.versions[name]
    return found.hiding_place(name) is None and not os.path.lexists(folder / name)


def _take_out(out: Path, names: set[str]) -> None:
    """Writes the file of captions again, at once, without the lines of some images."""
    lines = out.read_bytes().splitlines(keepends=True)
    with whole_file(out.resolve()) as partial, open(partial, "wb") as file:
        file.writelines(line for line in lines if json.loads(line)["file_name"] not in names)
        file.flush()
        os.fsync(file.fileno())


def _read_done(out: Path, with_boxes: bool) -> dict[str, str | None]:
    """The images an earlier run has captioned, and their versions; what a kill left of a last line is cut off."""
    if not out.exists():
        return {}
    if not out.is_file():
        what = "a folder" if out.is_dir() else "no regular file"
        raise ValueError(f"`out` is {str(out)!r}, {what}; expected a file of JSON lines.")
    content = out.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    done: dict[str, str | None] = {}
    for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode())
            if not isinstance(row["file_name"], str) or not isinstance(row["caption"], str):
                raise TypeError("these are no texts")
            done[row["file_name"]] = row.get("version")
            has_boxes = "region_captions" in row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"`out` is {str(out)!r}, whose line {number} is {line[:80].decode(errors='replace')!r}; expected "
                "captions of an earlier run, to go on from, or no file."
            ) from error
        if has_boxes != with_boxes:
            raise ValueError(
                f"`out` is {str(out)!r}, written {'with' if has_boxes else 'without'} captions of boxes; expected one "
                "written the same way, to go on from, or no file."
            )
    if complete != content:
        os.truncate(out, len(complete))
    return done
