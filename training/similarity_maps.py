"""Maps of why a picture is found, in the pixels of the picture: where they lie, and how they look."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from mmgem.processing.boxes import model_views
from mmgem.processing.image_loading import load_image
from mmgem.training.inference import inference, to_model

LEAST, MIDDLE, LARGEST = "#35065e", "#f0532d", "#fdf3a0"  # colours of shares
HEAT_OPACITY = 0.65  # of the largest share
DIM = 0.45  # how bright the rest of the picture stays


class SimilarityMap(NamedTuple):
    """The shares of the patches of one picture in its similarity with queries, see `MMGEMModel.similarity_map`.

    Args:
        shares: (T, rows, columns), which sum to the similarity of each query.
        box: `(x0, y0, x1, y1)` that the patches cover, in pixels of the picture; beyond it where it was padded.
    """

    shares: torch.Tensor
    box: tuple[float, float, float, float]

    def window_sums(self) -> torch.Tensor:
        """(T, rows, columns), the shares in a window around each patch, a third of each side of the grid. One patch
        speaks for its surroundings, which the vision tower mixes in."""
        window = tuple(side // 3 | 1 for side in self.shares.shape[1:])  # odd
        padding = tuple(side // 2 for side in window)
        return F.avg_pool2d(self.shares[:, None].float(), window, 1, padding)[:, 0] * window[0] * window[1]

    def peaks(self) -> torch.Tensor:
        """(T, 2), the pixel x, y that each query is seen around, the middle of the window with the largest share."""
        rows, columns = self.shares.shape[1:]
        best = self.window_sums().flatten(1).argmax(dim=1)  # (T,)
        x0, y0, x1, y1 = self.box
        x = x0 + (best % columns + 0.5) / columns * (x1 - x0)
        y = y0 + (best // columns + 0.5) / rows * (y1 - y0)
        return torch.stack([x, y], dim=1)

    def draw(self, picture: Image.Image, query: int = 0) -> Image.Image:
        """Lay the shares of one query's windows over the picture: the largest glows, below the mean it is dark."""
        picture = picture.convert("RGB")
        sums = self.window_sums()[query]  # (rows, columns)
        levels = ((sums - sums.mean()) / (sums.max() - sums.mean()).clamp(min=1e-6)).clamp(min=0, max=1)
        x0, y0, x1, y1 = self.box
        x = (torch.arange(picture.width) + 0.5 - x0) / (x1 - x0) * 2 - 1  # (w,), -1 to 1 within the box
        y = (torch.arange(picture.height) + 0.5 - y0) / (y1 - y0) * 2 - 1  # (h,)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
        # Pixels that the model did not see have the share of the nearest patch.
        levels = F.grid_sample(levels[None, None], places[None], padding_mode="border", align_corners=False)[0, 0]
        heat = Image.fromarray((levels * 255).round().to(torch.uint8).numpy())
        glow = ImageOps.colorize(heat, LEAST, LARGEST, MIDDLE)
        lit = Image.composite(picture, Image.blend(Image.new("RGB", picture.size), picture, DIM), heat)
        return Image.composite(glow, lit, heat.point(lambda level: round(level * HEAT_OPACITY)))


def similarity_map(
    model, processor, image: Any, query_embeds: torch.Tensor, num_vectors: int | None = None
) -> SimilarityMap:
    """Map the similarity of one picture with queries.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        image: A picture of any kind `load_image` takes.
        query_embeds, num_vectors: As for `MMGEMModel.similarity_map`.

    Raises:
        ValueError: As there; or if the image processor crops in a way that cannot be followed.
    """
    picture = load_image(image, allow_urls=processor.allow_urls)
    inputs = to_model(model, processor(images=[picture], return_tensors="pt"))
    with inference(model):
        shares = model.similarity_map(**inputs, query_embeds=query_embeds.to(model.device), num_vectors=num_vectors)
    pixels = tuple(inputs["pixel_values"].shape[2:])  # (H, W), unless it is of patches
    size = (1, 1) if "spatial_shapes" in inputs else (pixels[1], pixels[0])
    [view] = model_views(processor.image_processor, [picture.size], [size])
    x0, y0, x1, y1 = view.tolist()
    if "spatial_shapes" not in inputs:  # patches may end before the view does, or beyond it
        stride_y, stride_x = model.config.grid.stride
        rows, columns = shares.shape[2:]
        x1, y1 = x0 + (x1 - x0) * columns * stride_x / size[0], y0 + (y1 - y0) * rows * stride_y / size[1]
    return SimilarityMap(shares[0].float().cpu(), (x0, y0, x1, y1))
