"""A search index of a folder of images: built once, brought up to date at will, asked with text, images, or both.

An index is a `datasets` folder (`datasets.load_from_disk` reads it) with a row for each image: `file_name` relative to
the images' folder, `width`, `height`, `version` (size and time of the file) and its unit `embedding`. Two files lie
beside the rows: `embedding.faiss`, an exact inner-product index of them for `Dataset.load_faiss_index`, and
`search_index.json`, which says of what folder and by which model. Until it is complete, an index is called
`<out>.partial`.
"""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from PIL import Image
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from mmgem.processing.image_loading import load_image
from mmgem.training.encoding import embed_images, embed_texts, inference
from mmgem.training.loading import load_checkpoint
from mmgem.training.tools.image_files import Skipped, apply_to_batch, find_images, read_batches

FACTS_FILE = "search_index.json"
FAISS_FILE = "embedding.faiss"
ROWS_PER_PART = 256  # what a killed run loses at most

# Cosine of the probes of two models that an index takes for one: rounding to bfloat16 leaves 0.9999.
_SAME_MODEL = 0.999


class IndexReport(NamedTuple):
    """What `build_index` did: images in the index, how many of them it had to embed, and the files it left out."""

    images: int
    embedded: int
    skipped: list[Skipped]


class Hit(NamedTuple):
    """One answer: cosine similarity to the query, -1 to 1, and the image file."""

    score: float
    path: Path


def build_index(folder: str | Path, model, processor, out: str | Path, batch_size: int = 32) -> IndexReport:
    """Embeds every image below a folder into an index, or brings an index up to date.

    An image whose file has the size and time it had is not embedded again, whether the earlier run finished or was
    killed; rows of files that are gone are dropped. Files that cannot be read are left out and reported.

    Args:
        folder: Where the images are, at any depth.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        out: The folder of the index: a new or empty one, or an index of the same folder by the same model.
        batch_size: Images at a time.

    Raises:
        FileNotFoundError: If `folder` is not there.
        ValueError: If there is no image below it that can be read, or `out` is something else already.
    """
    folder, out = Path(folder).resolve(), Path(out).resolve()
    partial = out.with_name(f"{out.name}.partial")
    file_names = find_images(folder)
    name = model.name_or_path
    facts = {
        "folder": str(folder),
        "model": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "probe": _embed_probe(model, processor).tolist(),
    }
    for place in (out, partial):
        _check_place(place, facts)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / FACTS_FILE).write_text(json.dumps(facts))

    versions = {file_name: _version(folder / file_name) for file_name in file_names}
    old = [load_from_disk(str(out))] if (out / FACTS_FILE).is_file() else []
    known = _current_rows([*old, *_read_parts(partial)], versions)
    done = set(known["file_name"]) if known else set()
    todo = [file_name for file_name in file_names if file_name not in done]
    skipped = _embed_files(folder, todo, versions, model, processor, partial, batch_size, initial=len(done))

    rows = _current_rows([*old, *_read_parts(partial)], versions)
    if rows is None:
        raise ValueError(f"folder is {str(folder)!r}, where no image can be read; the first: {skipped[0]}")
    finished = partial / "finished"
    rows.save_to_disk(str(finished))
    rows.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
    rows.save_faiss_index("embedding", finished / FAISS_FILE)
    shutil.copy(partial / FACTS_FILE, finished)
    if out.exists():
        shutil.rmtree(out)
    finished.rename(out)
    shutil.rmtree(partial)
    return IndexReport(len(rows), len(rows) - len(done), skipped)


def _check_place(place: Path, facts: dict[str, Any]) -> None:
    """Raises a ValueError unless `place` is free, or an index of the same folder by the same model."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / FACTS_FILE).is_file():
        raise ValueError(f"out is {str(place)!r}, which is not an index; expected a new folder or an index")
    there = json.loads((place / FACTS_FILE).read_text())
    if there["folder"] != facts["folder"]:
        raise ValueError(
            f"out is {str(place)!r}, an index of the folder {there['folder']!r}; expected one of {facts['folder']!r}. "
            "Choose another place, or delete it."
        )
    if not _same_model(there["probe"], facts["probe"]):
        raise ValueError(
            f"out is {str(place)!r}, an index by the model {there['model']!r} as it was then, which embeds images "
            f"otherwise than {facts['model']!r} does now. Choose another place, or delete it."
        )


def _embed_probe(model, processor) -> torch.Tensor:
    """(D,) The embedding of a fixed picture: what tells an index whether a model is the one that made it."""
    upward, outward = Image.linear_gradient("L"), Image.radial_gradient("L")
    probe = Image.merge("RGB", (upward, upward.rotate(90), outward))
    return embed_images(model, processor, [probe])[0]


def _same_model(probe: list[float], other: list[float]) -> bool:
    return len(probe) == len(other) and float(np.dot(probe, other)) > _SAME_MODEL


def _version(path: Path) -> str:
    """Changes when the file does."""
    try:
        status = path.stat()
    except OSError:  # a dangling link, which reading will report
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_parts(partial: Path) -> list[Dataset]:
    return [Dataset(pq.read_table(path)) for path in sorted(partial.glob("part-*.parquet"))]


def _current_rows(datasets: list[Dataset], versions: dict[str, str]) -> Dataset | None:
    """The rows whose files are as they were, one for each, by file name; None if there are none."""
    if not datasets:
        return None
    rows = concatenate_datasets(datasets)
    pairs = zip(rows["file_name"], rows["version"], strict=True)
    where = {name: row for row, (name, version) in enumerate(pairs) if versions.get(name) == version}
    return rows.select([where[name] for name in sorted(where)]) if where else None


def _embed_files(folder, file_names, versions, model, processor, partial, batch_size, initial) -> list[Skipped]:
    """Embeds files into parts: parquet files that appear whole, so that a killed run leaves only complete ones."""
    skipped: list[Skipped] = []
    rows: list[dict[str, Any]] = []
    part_numbers = count(len(list(partial.glob("part-*.parquet"))))

    def write_part() -> None:
        embedding = List(Value("float32"), length=len(rows[0]["embedding"]))
        text, number = Value("string"), Value("int32")
        features = {"file_name": text, "width": number, "height": number, "version": text, "embedding": embedding}
        unfinished = partial / "part.tmp"
        pq.write_table(Dataset.from_list(rows, Features(features)).data.table, unfinished)
        unfinished.rename(partial / f"part-{next(part_numbers):06d}.parquet")
        rows.clear()

    def embed(files) -> torch.Tensor:
        return embed_images(model, processor, [file.image for file in files])

    with tqdm(total=initial + len(file_names), initial=initial, desc="images", unit="image") as progress:
        for batch in read_batches(folder, file_names, batch_size, skipped):
            for (file_name, image), embedding in apply_to_batch(embed, batch, skipped):
                rows.append(
                    {
                        "file_name": file_name,
                        "width": image.width,
                        "height": image.height,
                        "version": versions[file_name],
                        "embedding": embedding.numpy(),
                    }
                )
            progress.update(min(batch_size, progress.total - progress.n))
            if len(rows) >= ROWS_PER_PART:
                write_part()
    if rows:
        write_part()
    return skipped


class SearchIndex:
    """An index in memory, with the model that answers queries from it.

    Args:
        rows: The rows of the index, with a FAISS index attached to `embedding`.
        folder: The images' folder.
        model: The `MMGEMModel` that embedded them.
        processor: Its `MMGEMProcessor`.
    """

    def __init__(self, rows: Dataset, folder: str | Path, model, processor):
        self.rows, self.folder, self.model, self.processor = rows, Path(folder), model, processor

    @classmethod
    def load(cls, path: str | Path, model=None, processor=None) -> "SearchIndex":
        """Reads an index from disk.

        Args:
            path: What `build_index` wrote.
            model, processor: The model that built it; by default loaded from where it was loaded then.

        Raises:
            FileNotFoundError: If there is no such folder, or the model is not where it was.
            ValueError: If the folder is not an index, or another model is given than the one that built it.
        """
        path = Path(path)
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.partial").exists()
            hint = "; its making was interrupted, and goes on when it is started again" if unfinished else ""
            raise FileNotFoundError(f"index is {str(path)!r}, which is not there{hint}")
        if not (path / FACTS_FILE).is_file():
            raise ValueError(f"index is {str(path)!r}, which is not an index; expected a folder with {FACTS_FILE}")
        facts = json.loads((path / FACTS_FILE).read_text())
        if model is None or processor is None:
            model, processor = load_checkpoint(facts["model"])
        if not _same_model(facts["probe"], _embed_probe(model, processor).tolist()):
            raise ValueError(
                f"model is {model.name_or_path!r}, which does not embed images as {facts['model']!r} did when it made "
                f"the index {str(path)!r}; expected the same model, or an index made anew"
            )
        rows = load_from_disk(str(path))
        rows.load_faiss_index("embedding", path / FAISS_FILE)
        return cls(rows, facts["folder"], model, processor)

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, text: str | None = None, image: Any = None, top: int = 10) -> list[Hit]:
        """The images nearest to a query, best first.

        Args:
            text: What to look for; with an image, what is said about the image (read after it, by the language model).
            image: A picture of any kind `load_image` takes.
            top: The number of answers; fewer if the index has fewer images.

        Raises:
            FileNotFoundError, TypeError, ValueError: If `image` cannot be read, see `load_image`; if neither text nor
                image is given, or `top` is not positive.
        """
        if text is None and image is None:
            raise ValueError("text and image are both None; expected at least one of them")
        if top < 1:
            raise ValueError(f"top must be 1 or more, got {top}")
        query = self._embed_query(text, None if image is None else load_image(image))
        scores, numbers = self.rows.search("embedding", query, k=min(top, len(self)))
        names = self.rows[numbers]["file_name"]
        return [Hit(float(score), self.folder / name) for score, name in zip(scores, names, strict=True)]

    def _embed_query(self, text: str | None, image: Image.Image | None) -> np.ndarray:
        """(D,) float32, unit length."""
        if text is None:
            return embed_images(self.model, self.processor, [image])[0].numpy()
        if image is None:
            return embed_texts(self.model, self.processor, [text])[0].numpy()
        prompt = self.processor.image_token + text
        inputs = self.processor(images=[image], text=[prompt], return_tensors="pt").to(self.model.device)
        with inference(self.model):
            embeddings = self.model.get_multimodal_features(**inputs).pooler_output  # (1, D)
        return normalize(embeddings.float(), dim=-1)[0].cpu().numpy()
