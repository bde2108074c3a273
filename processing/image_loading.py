"""Any picture a user may hand over, as one upright RGB image in memory.

A picture may be a PIL image, a path, a URL, a `data:` URI or base64 text, the bytes of a file, an array or a tensor;
its file may be grey, transparent, paletted, 16-bit, rotated by its EXIF tag or animated. Everything downstream,
pixel boxes included, refers to the image returned here: the one a person sees.

| pixels | become |
|---|---|
| bits | 0 and 255 |
| 8 bits, a palette | what they are |
| more bits, or floats above 1, in a file or as `uint16` | divided by their white: what the file says (TIFF's |
| | `MaxSampleValue`, or bits below 16), else the least of 8, 10, 12, 14 and 16 bits that holds all of the picture |
| floats up to 1 | times 255 |
| transparent, also by a palette or by a grey that stands for it | laid on white |
| CMYK, YCbCr, HSV | by Pillow's conversion, without colour profiles |
"""

import base64
import os
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

URL_TIMEOUT = 30.0  # seconds
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey that cameras and scanners give
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
SHORTEST_BASE64 = 64  # characters; no image file is smaller, and few paths are longer


def load_image(source, name: str = "image") -> Image.Image:
    """Loads one picture.

    Args:
        source: A `PIL.Image.Image`; a path (`str` or `os.PathLike`); an `http(s)://` URL; a `data:image/...` URI or
            the base64 text of an image file; the `bytes` of an image file; a numpy array or torch tensor of shape
            `(H, W)`, `(H, W, C)` or `(C, H, W)` with C in 1..4, of floats in [0, 1], integers in [0, 255], 16-bit
            unsigned integers (of 8, 10, 12, 14 or 16 bits, see above) or booleans. Where both layouts fit, an array is
            read as `(H, W, C)` and a tensor as `(C, H, W)`.
        name: What error messages call the picture.

    Returns:
        An RGB image, decoded, EXIF rotation applied, transparency laid on white; of an animation the current frame,
        which for a file is the first.

    Raises:
        FileNotFoundError: The path is not there.
        TypeError: `source` is none of the kinds above.
        ValueError: The file is empty, truncated, not an image or larger than `PIL.Image.MAX_IMAGE_PIXELS` (PIL itself
            only warns up to twice that), the URL does not answer, or the array has NaN, a wrong shape or range.
    """
    label = f"`{name}`"
    if isinstance(source, Image.Image):
        return _to_rgb(source, label)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, label)
    if isinstance(source, (bytes, bytearray)):
        return _from_file(bytes(source), label)
    if isinstance(source, (str, os.PathLike)):
        shown = repr(os.fspath(source))
        label = f"{label} ({shown if len(shown) <= 200 else shown[:100] + '…'})"
        return _from_file(_read(source, label), label)
    raise TypeError(
        f"{label} is a {type(source).__name__}; expected a PIL image, a path, a URL, bytes, an array or a tensor."
    )


def _read(source: str | os.PathLike, label: str) -> bytes:
    """The bytes that a URL, a path or base64 text stands for."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            # Some hosts refuse the default agent of urllib.
            with urlopen(Request(source, headers={"User-Agent": "mmgem"}), timeout=URL_TIMEOUT) as response:
                return response.read()
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(f"{label} cannot be fetched: {error}; expected the URL of an image.") from error
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:  # base64 text is no possible file name
        data = _from_base64(source) if isinstance(source, str) else None
        if data is not None:
            return data
        if os.path.exists(source):
            raise ValueError(f"{label} cannot be read: {error}; expected an image file.") from error
        raise FileNotFoundError(f"{label} is not there; expected the path of an image file.") from error


def _from_base64(text: str) -> bytes | None:
    """What a `data:` URI or base64 text holds, or None where `text` is neither."""
    is_uri = text.startswith("data:image/")
    text = "".join((text.partition(",")[2] if is_uri else text).split())
    if not is_uri and len(text) < SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _from_file(data: bytes, label: str) -> Image.Image:
    """Decodes an image file held in memory."""
    if not data:
        raise ValueError(f"{label} is empty, 0 bytes; expected an image file.")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(BytesIO(data))
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{label} is too large: {error}; expected at most {limit} pixels. For a picture that is trusted, raise "
            "`PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{label} holds {len(data)} bytes that are no image; expected an image file.") from error
    except Exception as error:
        raise _damaged(label, error) from error
    return _to_rgb(image, label)


def _damaged(label: str, error: Exception) -> ValueError:
    """For what decoders raise on broken data: OSError, SyntaxError, struct.error and more."""
    return ValueError(f"{label} cannot be decoded: {error}; expected a whole and undamaged image.")


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """A PIL image of any mode as upright RGB."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    try:
        image = ImageOps.exif_transpose(image)  # which decodes it
    except Exception as error:
        raise _damaged(label, error) from error
    if image.mode == "F" or image.mode.startswith("I"):  # which Pillow's own conversion clips at 255
        return _from_deep_grey(image, tags, label)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # which Pillow converts no further
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image, tags, label: str) -> Image.Image:
    """A picture of 16-bit or 32-bit integers or of floats, divided by its white."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{label} has pixels that are NaN or infinite; expected finite values.")
    bits = max(tags.get(BITS_PER_SAMPLE) or [0])
    white = (tags.get(MAX_SAMPLE_VALUE) or [None])[0]
    if white is None:
        white = 2**bits - 1 if 8 < bits < 16 else 1 if image.mode == "F" and pixels.max() <= 1 else _white(pixels)
    if pixels.min() < 0 or pixels.max() > white:
        raise ValueError(f"{label} has pixels in [{pixels.min():g}, {pixels.max():g}]; expected [0, {white}].")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[pixels == transparent] = white
    return Image.fromarray(np.round(pixels * (255 / white)).astype(np.uint8)).convert("RGB")


def _white(pixels: np.ndarray) -> int:
    """The largest value of the least depth that holds all pixels."""
    top = pixels.max()
    return next((2**bits - 1 for bits in DEPTHS if top < 2**bits), 2 ** DEPTHS[-1] - 1)


def _from_array(source: np.ndarray | torch.Tensor, label: str) -> Image.Image:
    """An array or tensor of pixels as an RGB image."""
    channel_axes = (2, 0)
    if isinstance(source, torch.Tensor):
        channel_axes = (0, 2)
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    pixels = _to_uint8(_channels_last(source, channel_axes, label), label)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)), label)


def _channels_last(pixels: np.ndarray, channel_axes: tuple[int, int], label: str) -> np.ndarray:
    """`(H, W)`, `(H, W, C)` or `(C, H, W)` as `(H, W, C)`; channels are on the first of `channel_axes` that fits."""
    if pixels.size and pixels.ndim == 2:
        return pixels[..., None]
    if pixels.size and pixels.ndim == 3:
        for axis in channel_axes:
            if pixels.shape[axis] <= 4:
                return np.moveaxis(pixels, axis, 2)
    raise ValueError(f"{label} has shape {pixels.shape}; expected (H, W), (H, W, C) or (C, H, W), C from 1 to 4.")


def _to_uint8(pixels: np.ndarray, label: str) -> np.ndarray:
    """Pixel values of any accepted type and range as 0..255."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels * np.uint8(255)
    if pixels.dtype == np.uint16:
        return np.round(pixels * (255 / _white(pixels))).astype(np.uint8)
    if pixels.dtype.kind not in "fiu":
        raise TypeError(f"{label} has pixels of type {pixels.dtype}; expected integers, floats or booleans.")
    if not np.isfinite(pixels).all():
        raise ValueError(f"{label} has pixels that are NaN or infinite; expected finite values.")
    top = 1 if pixels.dtype.kind == "f" else 255
    if pixels.min() < 0 or pixels.max() > top:
        raise ValueError(
            f"{label} has {pixels.dtype} pixels in [{pixels.min():g}, {pixels.max():g}]; expected floats in [0, 1] or "
            "integers in [0, 255], before any normalization."
        )
    return np.round(pixels * (255 / top)).astype(np.uint8)
