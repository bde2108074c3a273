"""Any vision tower as a grid of patch features."""

import inspect
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .configuration_mmgem import GridLayout, VisionGrid
from .tower_batches import in_small_batches, measured

DEFAULT_IMAGE_SIZE = 224  # of towers that say nothing about it
MAP_AXES: dict[GridLayout, slice] = {"channels_first": slice(2, 4), "channels_last": slice(1, 3)}
IMAGE_INPUTS = {"pixel_values", "pixel_attention_mask", "spatial_shapes"}


def pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """A side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blank_image(grid: VisionGrid, device: torch.device | None = None) -> torch.Tensor:
    """(1, channels, H, W) zeros of the tower's own size."""
    return torch.zeros(1, grid.num_channels, *grid.image_size, device=device)


def patch_grid(
    vision_tower: PreTrainedModel,
    grid: VisionGrid,
    pixel_values: torch.Tensor,
    spatial_shapes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Features of the vision tower in the place they belong to.

    Args:
        vision_tower: Any vision encoder that `find_grid` knows.
        grid: What `find_grid` found out about it.
        pixel_values: (B, channels, H, W), of the tower's own size or of multiples of its stride; with `spatial_shapes`
            (B, P, patch * patch * channels).
        spatial_shapes: (B, 2) rows and columns of the patches of each image, for towers that take patches.

    Returns:
        (B, C, rows, columns), without class and register tokens; zeros beyond `spatial_shapes`.

    Raises:
        ValueError: If the images do not fit, or the tower does not answer as `grid` says.
    """
    if spatial_shapes is not None:
        return _padded_grids(vision_tower, pixel_values, spatial_shapes)
    if pixel_values.ndim != 4 or 0 in pixel_values.shape or pixel_values.shape[1] != grid.num_channels:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (B, {grid.num_channels}, H, W), each at "
            "least 1."
        )
    name, (height, width), own_size = vision_tower.config.model_type, pixel_values.shape[2:], grid.image_size
    if (height, width) != own_size:
        if not grid.any_size:
            raise ValueError(
                f"`pixel_values` shows images of {height} x {width}; expected {own_size[0]} x {own_size[1]}, the only "
                f"size that the vision tower `{name}` takes."
            )
        if height % grid.stride[0] or width % grid.stride[1]:
            raise ValueError(
                f"`pixel_values` shows images of {height} x {width}; expected multiples of the patch size "
                f"{grid.stride[0]} x {grid.stride[1]}."
            )
    if grid.layout == "channels_first":  # such towers convolve, which takes the less time with channels last in memory
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # (B, channels, H, W)

    def run(images: torch.Tensor) -> torch.Tensor:
        features = _features(vision_tower, images, is_own_size=(height, width) == own_size)
        return _placed(features, grid, vision_tower, images)  # (B, C, rows, columns)

    return in_small_batches(vision_tower, pixel_values, run)


@torch.no_grad()
def check_grid(vision_tower: PreTrainedModel, grid: VisionGrid):
    """Refuse a grid that is not that of the tower, by running it once: on an image, and where there are tokens beside
    the patches also on the one with other pixels at its left edge; not without its weights, or where they are
    quantized or sharded.

    Raises:
        ValueError: If the tower is made for other images, or does not answer as `grid` says.
    """
    if any(p.is_meta or not p.numel() or type(p.data) is not torch.Tensor for p in vision_tower.parameters()):
        return
    own = {"num_channels": _num_channels(vision_tower), "image_size": _own_size(vision_tower)}
    for field, expected in own.items():
        if getattr(grid, field) != expected:
            raise ValueError(
                f"`{field}` of `vision_grid` is {getattr(grid, field)}; expected {expected}, the tower's."
            )
    image, other = _noise(vision_tower, grid.num_channels, grid.image_size)
    num_beside = grid.prefix_tokens + grid.suffix_tokens
    # Where the tokens beside the patches fill a row of them, patches may be taken for those of the next row.
    num_edges = min(num_beside, 1 if num_beside < grid.image_size[1] // grid.stride[1] else 2)
    images = torch.cat([image, *_edges_of(image, other, grid.stride)[:num_edges]])  # (1, 2 or 3, channels, H, W)
    features = measured(vision_tower, images, lambda images: _features(vision_tower, images, is_own_size=True))
    placed = _placed(features, grid, vision_tower, images)
    found: VisionGrid | None = None
    plain = _explain(vision_tower.config, grid.image_size, features, len(images), None)
    if plain is None or plain[1] != grid.stride:  # as many patches, perhaps, in other rows, or other boxes in them
        found = find_grid(vision_tower)  # by more images, as where the model began
        if found.stride != grid.stride:
            raise ValueError(
                f"`stride` of `vision_grid` is {grid.stride}; expected {found.stride}, by the features of the tower."
            )
    if grid.layout != "tokens" or not num_beside:
        return
    tokens = _cells(features, grid.layout, len(images))  # (2 or 3, N, C)
    changes = [_change(changed, tokens[0]) for changed in tokens[1:]]
    if _best_start(changes, num_beside, (placed.shape[2], placed.shape[3])) == grid.prefix_tokens:
        return
    found = found or find_grid(vision_tower)
    if found.prefix_tokens != grid.prefix_tokens:
        raise ValueError(
            f"`prefix_tokens` of `vision_grid` is {grid.prefix_tokens}, and `suffix_tokens` {grid.suffix_tokens}; "
            f"expected {found.prefix_tokens} and {found.suffix_tokens}, by the features that change where the image "
            "does."
        )


def _noise(tower: PreTrainedModel, num_channels: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of noise, always the same, (1, channels, H, W) each."""
    (height, width), generator = size, torch.Generator().manual_seed(0)
    noise = torch.randn(1, num_channels, height, 2 * width, generator=generator, device="cpu")
    noise = noise.to(tower.device, tower.dtype)
    return noise[..., :width], noise[..., width:]


def _edges_of(image: torch.Tensor, other: torch.Tensor, stride: tuple[int, int]) -> list[torch.Tensor]:
    """An image with the leftmost, and with the topmost, patches of another one; (1, channels, H, W) each."""
    left, top = image.clone(), image.clone()
    left[..., : stride[1]], top[:, :, : stride[0]] = other[..., : stride[1]], other[:, :, : stride[0]]
    return [left, top]


def _change(changed: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(N, C) each -> (N,) how much each feature changed, for its length."""
    return (changed - cells).norm(dim=-1) / cells.norm(dim=-1).clamp(min=1e-12)


def _placed(
    features: torch.Tensor, grid: VisionGrid, tower: PreTrainedModel, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Features of images in the layout of their tower -> (B, C, rows, columns), or an error if they are none."""
    batch, _, height, width = pixel_values.shape
    placed = None
    if grid.layout == "tokens" and features.ndim == 3 and features.shape[0] * features.shape[1] % batch == 0:
        tokens = _by_image(features, batch)  # (B, N, C)
        tokens = tokens[:, grid.prefix_tokens : tokens.shape[1] - grid.suffix_tokens]  # (B, P, C)
        if shape := _shape_of(tokens.shape[1], (height, width), grid.stride):
            placed = tokens.transpose(1, 2).unflatten(2, shape)
    elif grid.layout != "tokens" and features.ndim == 4:
        placed = features if grid.layout == "channels_first" else features.movedim(3, 1)
    if placed is None or placed.shape[:2] != (batch, grid.hidden_size):
        raise ValueError(
            f"`vision_grid` is {grid}, but the vision tower `{tower.config.model_type}` answers {batch} images of "
            f"{height} x {width} with features of shape {tuple(features.shape)}; expected what "
            "`MMGEMModel.from_towers` finds out."
        )
    return placed


def _padded_grids(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor
) -> torch.Tensor:
    """(B, P, patch * patch * channels) patches -> (B, C, most rows, most columns)"""
    if "spatial_shapes" not in inspect.signature(vision_tower.forward).parameters:
        raise ValueError(
            f"`spatial_shapes` came with a vision tower `{vision_tower.config.model_type}`, which takes whole images; "
            "expected none."
        )
    shapes, num_patches = spatial_shapes.tolist(), pixel_values.shape[1] if pixel_values.ndim == 3 else 0
    if len(shapes) != len(pixel_values) or any(not 0 < rows * columns <= num_patches for rows, columns in shapes):
        raise ValueError(
            f"`spatial_shapes` is {shapes} for `pixel_values` of shape {tuple(pixel_values.shape)}; expected rows and "
            "columns of each image, no more than there are patches."
        )
    mask = torch.arange(num_patches, device=pixel_values.device) < spatial_shapes.prod(-1, keepdim=True)  # (B, P)
    outputs = vision_tower(
        pixel_values.to(vision_tower.dtype), pixel_attention_mask=mask.long(), spatial_shapes=spatial_shapes
    )
    grids = [
        tokens[: rows * columns].T.unflatten(1, (rows, columns))
        for tokens, (rows, columns) in zip(outputs.last_hidden_state, shapes, strict=True)
    ]
    most_rows, most_columns = (max(sides) for sides in zip(*shapes, strict=True))
    return torch.stack([F.pad(g, (0, most_columns - g.shape[2], 0, most_rows - g.shape[1])) for g in grids])


def image_size_of(grid: VisionGrid, features: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the images that have such features, (B, C, rows, columns): the tower's own size, where it has
    as many rows and columns, or else multiples of the stride."""
    cells = tuple(features.shape[2:])
    for rounded_up in (False, True):
        own = tuple(_count(*side, rounded_up) for side in zip(grid.image_size, grid.stride, strict=True))
        if cells == own:
            return grid.image_size
    return cells[0] * grid.stride[0], cells[1] * grid.stride[1]


def boxes_on_grid(boxes: torch.Tensor, grid: VisionGrid, image_size: tuple[int, int], features: torch.Tensor):
    """Boxes of the view as boxes of the grid, which leaves out pixels at the right and bottom that fill no patch.

    Args:
        boxes: (B, R, 4) xyxy in [0, 1] of the view.
        grid: See `find_grid`.
        image_size: (height, width) of the images.
        features: (B, C, rows, columns), of `patch_grid`.

    Returns:
        (B, R, 4) xyxy in [0, 1] of the grid.
    """
    sizes = zip(image_size, features.shape[2:], grid.stride, strict=True)
    height, width = (max(1.0, size / (cells * stride)) for size, cells, stride in sizes)
    return (boxes * boxes.new_tensor([width, height, width, height])).clamp(max=1)


# Without weights, the configuration says it all; each operator takes long there.
_grids_on_meta: dict[tuple[type, str], VisionGrid] = {}


@torch.no_grad()
def find_grid(vision_tower: PreTrainedModel) -> VisionGrid:
    """Find out where a vision tower has its patch features, by running it and not by its name.

    It sees an image of its own size twice, one that is twice as wide, and two with other pixels in the leftmost and in
    the topmost patches, whose features must change more than the others. A tower on the meta device has shapes alone;
    tokens beside the patches are then taken to stand in front.

    Args:
        vision_tower: A vision encoder of transformers, with its weights.

    Raises:
        ValueError: If the tower takes no images, or its features are no grid of them.
    """
    name = vision_tower.config.model_type
    parameters = inspect.signature(vision_tower.forward).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if "pixel_values" not in {p.name for p in parameters} or required - IMAGE_INPUTS:
        takes = sorted(required) or list(inspect.signature(vision_tower.forward).parameters)[:1]
        raise ValueError(f"`vision` is a `{name}`, which takes {takes}; expected an encoder of images.")
    kind = None
    if vision_tower.device.type == "meta":
        kind = type(vision_tower), vision_tower.config.to_json_string(use_diff=False)
        if kind in _grids_on_meta:
            return _grids_on_meta[kind]
    was_training = vision_tower.training
    vision_tower.eval()  # nothing is drawn at random
    try:
        grid = _find_grid(vision_tower, name)
        if kind is not None:
            _grids_on_meta[kind] = grid
        return grid
    finally:
        vision_tower.train(was_training)


def _find_grid(tower: PreTrainedModel, name: str) -> VisionGrid:
    num_channels, own_size = _num_channels(tower), _own_size(tower)
    height, width = own_size
    image, other = _noise(tower, num_channels, own_size)
    try:
        features = _features(tower, torch.cat([image, image]), is_own_size=True)
    except Exception as error:  # whatever towers raise
        if tower.device.type == "meta" and hasattr(tower.config, "patch_size"):
            return _declared_grid(tower.config, num_channels, own_size)
        raise ValueError(
            f"`vision` is a `{name}`, which fails on images of {num_channels} x {height} x {width} ({error}); "
            "expected an encoder of images."
        ) from error
    try:
        wide = _features(tower, torch.cat([image, other], dim=-1), is_own_size=False)
    except Exception:
        wide = None
    found = _explain(tower.config, own_size, features, 2, wide)
    if found is None:
        wide_shape = "" if wide is None else f", and one of {height} x {2 * width} with {tuple(wide.shape)}"
        raise ValueError(
            f"`vision` is a `{name}`, which answers two images of {height} x {width} with features of shape "
            f"{tuple(features.shape)}{wide_shape}; expected a grid of patches."
        )
    layout, stride, extra_tokens = found
    grid = VisionGrid(
        layout=layout,
        num_channels=num_channels,
        image_size=own_size,
        stride=stride,
        hidden_size=features.shape[1 if layout == "channels_first" else -1],
        prefix_tokens=extra_tokens,
        any_size=wide is not None,
    )
    if tower.device.type == "meta":
        return grid
    cells, again = _cells(features, layout, 2)  # (N, C) each
    if not torch.allclose(cells, again, rtol=0, atol=1e-2 * float(cells.abs().max())):
        raise ValueError(
            f"`vision` is a `{name}`, which answers the same image in two ways, as encoders do that mask patches at "
            "random; expected one that sees the whole image."
        )
    if layout != "tokens":
        return grid
    changes = [
        _change(_cells(_features(tower, changed, is_own_size=True), layout, 1)[0], cells)
        for changed in _edges_of(image, other, stride)
    ]
    shape = _shape_of(len(cells) - extra_tokens, own_size, stride)
    assert shape is not None  # by `_explain`
    start = _best_start(changes, extra_tokens, shape)
    if _contrast(changes, start, shape) <= 1:
        raise ValueError(
            f"`vision` is a `{name}`, whose features do not change where the image does; expected a grid of patches."
        )
    return replace(grid, prefix_tokens=start, suffix_tokens=extra_tokens - start)


def _declared_grid(config, num_channels: int, own_size: tuple[int, int]) -> VisionGrid:
    """By the configuration: of towers that have to see numbers, such as the position of a patch, to run."""
    return VisionGrid(
        layout="tokens",
        num_channels=num_channels,
        image_size=own_size,
        stride=pair(config.patch_size),
        hidden_size=config.hidden_size,
    )


def _num_channels(tower: PreTrainedModel) -> int:
    return getattr(tower.config, "num_channels", None) or 3


def _own_size(tower: PreTrainedModel) -> tuple[int, int]:
    """(height, width) of the images a tower was made for."""
    config = tower.config
    size = getattr(config, "image_size", None) or getattr(getattr(config, "backbone_config", None), "image_size", None)
    if size is None and hasattr(config, "num_patches"):  # SigLIP 2
        size = math.isqrt(config.num_patches) * config.patch_size
    if size is None and hasattr(tower, "timm_model"):  # whose patches say it, where there is only one size
        size = getattr(getattr(tower.timm_model, "patch_embed", None), "img_size", None)
        facts = getattr(config, "pretrained_cfg", None) or tower.timm_model.pretrained_cfg
        size = size or facts["input_size"][1:]
    return pair(DEFAULT_IMAGE_SIZE if size is None else size)


def _features(tower: PreTrainedModel, pixel_values: torch.Tensor, is_own_size: bool) -> torch.Tensor:
    """The last features of a tower, in whatever layout it has."""
    accepted = inspect.signature(tower.forward).parameters
    pixel_values = pixel_values.to(tower.dtype)
    if "spatial_shapes" in accepted:  # SigLIP 2 (NaFlex) takes flattened patches
        patches, spatial_shapes = flat_patches(pixel_values, tower.config.patch_size)
        mask = patches.new_ones(patches.shape[:2], dtype=torch.long)
        outputs = tower(patches, pixel_attention_mask=mask, spatial_shapes=spatial_shapes)
    else:
        resizes = not is_own_size and "interpolate_pos_encoding" in accepted
        outputs = tower(pixel_values, **({"interpolate_pos_encoding": True} if resizes else {}))
    features = getattr(outputs, "last_hidden_state", None)
    if features is None:
        features = outputs.feature_maps  # of backbones
    return features[-1] if isinstance(features, list | tuple) else features


def flat_patches(pixel_values: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, channels, H, W) -> (B, P, patch * patch * channels) and (B, 2), the rows and columns of each image."""
    patches = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    rows, columns = patches.shape[2:4]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(patches), rows * columns, -1)
    return patches, torch.tensor([[rows, columns]] * len(patches), device="cpu")


def _by_image(tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """(B, N, C), also of (1, B * N, C): Pixtral has the tokens of all images in one row."""
    return tokens.reshape(batch, -1, tokens.shape[-1])


def _cells(features: torch.Tensor, layout: str, batch: int) -> torch.Tensor:
    """Features in any layout -> (B, N, C)"""
    return _by_image(features.movedim(1, 3) if layout == "channels_first" else features, batch).float()


def _shape_of(num_patches: int, image_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of so many patches: those that fit into the image, or those that cover it; None for neither."""
    for rounded_up in (False, True):
        rows, columns = (_count(*side, rounded_up) for side in zip(image_size, stride, strict=True))
        if rows * columns == num_patches:
            return rows, columns
    return None


def _count(size: int, stride: int, rounded_up: bool) -> int:
    return -(-size // stride) if rounded_up else size // stride


def _explain(
    config, own_size: tuple[int, int], features: torch.Tensor, batch: int, wide: torch.Tensor | None
) -> tuple[GridLayout, tuple[int, int], int] | None:
    """Layout, stride and number of further tokens by which a batch has such features, and a wide image these."""
    if wide is not None and wide.ndim != features.ndim:
        return None
    height, width = own_size
    explanations: list[tuple[GridLayout, tuple[int, int], int]] = []
    patch_size = getattr(config, "patch_size", None)
    patch_size = pair(patch_size) if isinstance(patch_size, int | list | tuple) else None
    # What divides the image comes first, and of that round numbers: 32, not 33.
    sides = sorted(
        range(1, min(own_size) + 1), key=lambda side: (height % side > 0 or width % side > 0, -(side & -side))
    )
    strides = [(side, side) for side in sides]
    for stride in strides if patch_size is None else [patch_size, *strides]:
        for rounded_up in (False, True):
            rows, columns = _count(height, stride[0], rounded_up), _count(width, stride[1], rounded_up)
            wide_columns = _count(2 * width, stride[1], rounded_up)
            if features.ndim == 3:
                extra_tokens = features.shape[0] * features.shape[1] / batch - rows * columns
                if extra_tokens >= 0 and (wide is None or wide.shape[1] == rows * wide_columns + extra_tokens):
                    explanations.append(("tokens", stride, int(extra_tokens)))
            elif features.ndim == 4:
                for layout, axes in MAP_AXES.items():
                    fits = wide is None or wide.shape[axes] == (rows, wide_columns)
                    if fits and features.shape[axes] == (rows, columns):
                        explanations.append((layout, stride, 0))
        if explanations and stride == patch_size:
            break
    return min(explanations, key=lambda explanation: explanation[2], default=None)


def _best_start(changes: list[torch.Tensor], num_beside: int, shape: tuple[int, int]) -> int:
    """At which token the patches begin. Tokens beside them may stand on either side; where it makes no difference they
    stand in front."""
    return max(range(num_beside, -1, -1), key=lambda start: _contrast(changes, start, shape))


def _contrast(changes: list[torch.Tensor], start: int, shape: tuple[int, int]) -> float:
    """How much more the leftmost, and the topmost, patches changed than the others, if they begin at `start`."""
    left, *top = (change[start : start + math.prod(shape)].view(shape) for change in changes)
    contrasts = [
        float(cells[:, 0].mean() / cells[:, 1:].mean())
        for cells in (left, *(cells.T for cells in top))
        if cells.shape[1] > 1 and cells.any()
    ]
    return min(contrasts, default=math.inf)
