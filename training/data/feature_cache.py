"""Features of a frozen vision tower, computed once and kept on the disk."""

import hashlib
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmgem.configuration_mmgem import VisionGrid
from mmgem.patch_grid import image_size_of, patch_grid
from mmgem.training.data.augmentation import Augmentation, View, may_be_augmented
from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.rows import edit_of, images_of
from mmgem.training.data.shared_memory import in_shared_memory
from mmgem.training.data.skipped import UNREADABLE
from mmgem.training.data.sources import Source
from mmgem.training.progress import progress

_FILE_SIZE = 128 * 2**20  # bytes of a file; what a killed run loses
_NOT_SETTINGS = ("auto_map", "processor_class", "_processor_class", "data_format", "device")


class FeatureCache:
    """Features by key, in a folder of safetensors files that are read memory-mapped.

    A file appears under its name only once it is whole, so that a run that was killed goes on with what there is. Each
    says what its features are of.

    Args:
        folder: Where the files are; it need not be there yet.
        made_by: What the features are of, from [`feature_maker`] or [`mmgem.training.data.text_cache.text_maker`].

    Raises:
        ValueError: If a file there is damaged, or is of another tower, or another image processor.
    """

    def __init__(self, folder: str | Path, made_by: Mapping[str, str]):
        self.folder = Path(folder)
        self.made_by = dict(made_by)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._take(path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __getitem__(self, key: str) -> torch.Tensor:
        """The features of a key, such as (C, rows, columns) of an image.

        Raises:
            KeyError: If it has none.
        """
        path = self._file_of[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(key)

    def add(self, features: Mapping[str, torch.Tensor]) -> None:
        """Keep features by key in a file of their own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # By all keys: a run that was killed writes the same file again, as does another run that shares the folder.
        name = hashlib.blake2b(" ".join(features).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # of this process alone
        save_file({key: value.contiguous() for key, value in features.items()}, partial, metadata=self.made_by)
        partial.replace(path)
        self._file_of |= dict.fromkeys(features, path)

    def refresh(self) -> None:
        """Take what other processes have added."""
        known = set(self._file_of.values())
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in known:
                self._take(path)

    def _take(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                made_by, keys = file.metadata() or {}, list(file.keys())
        except SafetensorError as error:
            raise ValueError(
                f"feature cache has the file {str(path)!r}, which is damaged ({error}); expected it whole, or deleted,"
                " so that its features are computed again."
            ) from error
        if (difference := _difference(made_by, self.made_by)) is not None:
            raise ValueError(
                f"feature cache has the file {str(path)!r}, {difference}; expected another folder for other features."
            )
        self._file_of |= dict.fromkeys(keys, path)


def feature_maker(vision_tower: nn.Module, image_processor) -> dict[str, str]:
    """Say what features are of: a hash of the weights, and the settings of the image processor as JSON.

    Args:
        vision_tower: The frozen tower.
        image_processor: What makes its `pixel_values`.
    """
    settings = image_processor.to_dict() | {"image_processor_type": type(image_processor).__name__}
    settings = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS and value is not None}
    weights = weights_digest(vision_tower.state_dict())
    return {"weights": weights, "image_processor": json.dumps(settings, sort_keys=True, default=str)}


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Return what only equal weights have, names and types included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_key(image: Image.Image) -> int:
    """A number that only images of the same pixels have."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "big")


def view_key(image_number: int, view: View) -> str:
    """The key of the features of a view of an image, of `image_key`."""
    text = f"{image_number:032x} {view.crop} {view.flipped} {[round(factor, 6) for factor in view.colors]}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class CachedViews:
    """Which views of an image have features, and which of them a row is trained with.

    Args:
        cache: The features.
        count: Views of each image: the whole image, and others that are drawn by its pixels and their number.
        augmentation: How the others are drawn; None if there are none.
        grid: The grid of the tower.
    """

    def __init__(self, cache: FeatureCache, count: int, augmentation: Augmentation | None, grid: VisionGrid):
        self.cache = cache
        self.count = count
        self.augmentation = augmentation
        self.grid = grid

    def look_up(self, keys: Sequence[str]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the features of I views, (I, C, rows, columns), and (height, width) of their pixels.

        Raises:
            ValueError: If the cache lacks one.
        """
        if missing := [key for key in keys if key not in self.cache]:
            raise ValueError(
                f"feature cache {str(self.cache.folder)!r} has no features of {len(missing)} of {len(keys)} images; "
                "expected those of all, as `fill` computes them."
            )
        features = torch.stack([self.cache[key] for key in keys])
        return features, image_size_of(self.grid, features)

    def view(self, row: Mapping[str, Any], image: Image.Image, number: int) -> tuple[View, str]:
        """Return a view of the image of a row, and the key of its features.

        Args:
            row: Its columns.
            image: The image, or another one that the row brings along.
            number: Number of the view; it counts up to `count` and then from 0 again.
        """
        own, view, number = image_key(image), View.whole(image.size), number % self.count
        if number and self.augmentation is not None and may_be_augmented(row):
            view = self.augmentation.draw(row, image.size, hash_numbers(own, number))
        return view, view_key(own, view)


class MissingViews(Dataset):
    """The pixels of the views of all rows of sources that a cache has no features of.

    Args:
        views: The views, and the cache.
        sources: With a length.
        image_processor: Makes pixels of a view.
        part, parts: Which of the processes that share the work this is.

    Raises:
        ValueError: If a source is a stream, whose rows nobody can count.
    """

    def __init__(self, views: CachedViews, sources: Sequence[Source], image_processor, part: int = 0, parts: int = 1):
        for source in sources:
            if not isinstance(source, Sized):
                raise ValueError(f"`cache_features` is given, but {source.name} is a stream; expected none.")
        if "spatial_shapes" in image_processor.model_input_names:
            raise ValueError(
                f"`cache_features` is given, but a {type(image_processor).__name__} keeps the aspect ratio of images; "
                "expected one that makes all of one size."
            )
        self.views = views
        self.image_processor = image_processor
        rows = ((source, index) for source in sources for index in range(len(source)))  # type: ignore[arg-type]
        self._rows = list(itertools.islice(rows, part, None, parts))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        source, index = self._rows[number]
        try:
            row = source[index]
        except UNREADABLE:
            return {}  # the mixture notes it, and takes another one
        pixels = {}
        for image in [*images_of(row), *([] if (edit := edit_of(row)) is None else [edit[1]])]:
            for count in range(self.views.count):
                view, key = self.views.view(row, image, count)
                if key not in self.views.cache and key not in pixels:
                    shown = self.image_processor([view.apply(image)], return_tensors="pt")
                    pixels[key] = shown["pixel_values"][0]  # (channels, H, W)
        return in_shared_memory(pixels)


def check_frozen(model) -> None:
    """Refuse a model whose vision tower does not give the same features at every step.

    Args:
        model: An `MMGEMModel`, set for its training.

    Raises:
        ValueError: If the tower trains, or the model began as a VLM, whose own code sees pixels.
    """
    if model.config.vlm_config is not None:
        raise ValueError(
            "`cache_features` is given for a model that began as a VLM, whose own code sees the pixels; expected none."
        )
    trained = next((name for name, p in model.vision_tower.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise ValueError(
            f"`cache_features` is given, but `vision_tower.{trained}` trains; expected `freeze: [vision_tower]`."
        )


def fill(
    cache: FeatureCache,
    vision_tower: nn.Module,
    grid: VisionGrid,
    views: Dataset,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    num_workers: int = 0,
) -> None:
    """Compute the features that a cache lacks.

    Args:
        cache: The cache, filled in place.
        vision_tower: The frozen tower.
        grid: The grid of the tower.
        views: By number, `{key: pixel_values (channels, H, W)}` of views that the cache lacks, see [`MissingViews`].
        device: Where the tower runs.
        batch_size: Views at once.
        num_workers: Processes that load images.

    Raises:
        ValueError: If the features of an image say nothing about its size, without which its boxes cannot be found.
    """
    # Its own generator, so that training draws what it would have drawn without a cache.
    loader = DataLoader(views, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    kept: dict[str, torch.Tensor] = {}
    size = 0
    was_training = vision_tower.training
    vision_tower.to(device).eval()
    images = progress(loader, desc="images whose features are kept", unit="image")
    for batch in _batches(images, batch_size):
        pixel_values = torch.stack(list(batch.values())).to(device)
        with torch.no_grad():
            features = patch_grid(vision_tower, grid, pixel_values)  # (B, C, rows, columns)
        if image_size_of(grid, features) != tuple(pixel_values.shape[-2:]):
            raise ValueError(
                f"`cache_features` is given for images of {tuple(pixel_values.shape[-2:])}, whose features have the "
                f"shape of those of {image_size_of(grid, features)}; expected images of this size."
            )
        kept |= dict(zip(batch, features.cpu(), strict=True))
        size += features.nbytes
        if size >= _FILE_SIZE:
            cache.add(kept)
            kept, size = {}, 0
    if kept:
        cache.add(kept)
    vision_tower.train(was_training)


def _batches(loader, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The views of images, `batch_size` at a time; each key once, since images may be the same."""
    batch: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for views in loader:
        for key, pixel_values in views.items():
            if key in seen:
                continue
            seen.add(key)
            batch[key] = pixel_values
            if len(batch) == batch_size:
                yield batch
                batch = {}
    if batch:
        yield batch


def _difference(made_by: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """In which way features are others than expected, as a clause; None if they are not."""
    if made_by.get("image_processor") != expected.get("image_processor"):
        was, now = (json.loads(by.get("image_processor", "{}")) for by in (made_by, expected))
        name = next(name for name in [*now, *was] if was.get(name) != now.get(name))
        return f"whose images were processed with `{name}` {was.get(name)} instead of {now.get(name)}"
    if made_by.get("weights") != expected["weights"]:
        tower = "vision tower" if "image_processor" in expected else "language model"
        return f"of a {tower} with other weights ({made_by.get('weights')} instead of {expected['weights']})"
    name = next((name for name in expected if made_by.get(name) != expected[name]), None)
    return None if name is None else f"made with `{name}` {made_by.get(name)} instead of {expected[name]}"
