"""Any vision tower as a grid of patch features."""

import inspect

import torch


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A side or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patch_grid(vision_tower, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, channels, H, W) pixels -> (B, C, H / patch, W / patch) features of the vision tower."""
    vision_config = vision_tower.config
    patch_height, patch_width = pair(vision_config.patch_size)
    if pixel_values.ndim != 4 or len(pixel_values) == 0 or pixel_values.shape[1] != vision_config.num_channels:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (B, {vision_config.num_channels}, H, "
            "W) with B at least 1."
        )
    (batch, _, height, width), pixel_values = pixel_values.shape, pixel_values.to(vision_tower.dtype)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"`pixel_values` shows images of {height} x {width}; expected multiples of the patch size "
            f"{patch_height} x {patch_width}."
        )
    rows, columns = height // patch_height, width // patch_width
    accepted = inspect.signature(vision_tower.forward).parameters
    if "spatial_shapes" in accepted:  # SigLIP2 (NaFlex) takes flattened patches
        patches = pixel_values.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
        patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(batch, rows * columns, -1)  # (B, P, ph * pw * channels)
        hidden_states = vision_tower(
            patches,
            pixel_attention_mask=patches.new_ones(batch, rows * columns, dtype=torch.long),
            spatial_shapes=torch.tensor([[rows, columns]] * batch, device=patches.device),
        ).last_hidden_state
    else:
        is_native_size = (height, width) == pair(vision_config.image_size)
        resizable = not is_native_size and "interpolate_pos_encoding" in accepted
        hidden_states = vision_tower(
            pixel_values, **({"interpolate_pos_encoding": True} if resizable else {})
        ).last_hidden_state
    if hidden_states.ndim != 3 or hidden_states.shape[1] < rows * columns:
        raise ValueError(
            f"The vision tower `{vision_config.model_type}` answers images of {height} x {width} with features of "
            f"shape {tuple(hidden_states.shape)}; expected a patch grid of {rows} x {columns} tokens."
        )
    # Class and register tokens, where there are any, stand in front of the patches.
    patches = hidden_states[:, -rows * columns :]  # (B, P, C)
    return patches.transpose(1, 2).unflatten(2, (rows, columns))  # (B, C, rows, columns)
