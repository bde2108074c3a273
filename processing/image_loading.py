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

Formats are those that Pillow reads, and HEIC where pillow-heif is installed. Nothing but regular files is opened, and
a picture has limits in bytes and in pixels. One that a model sees at a small size need not be decoded in full: see
`shorter_side`.
"""

import base64
import os
import stat
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .url_fetching import AllowedURLs, fetch, is_url

if TYPE_CHECKING:
    import torch  # which takes seconds, and who has a tensor has imported it

DEPTHS = (8, 10, 12, 14, 16)  # bits of grey that cameras and scanners give
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
MAX_PIXELS = 1 << 28  # 268 megapixels; phones take pictures of 200
MAX_BYTES = 1 << 29  # of a file, before it is decoded
# Formats that Pillow opens and that are none of pixels: it lets Ghostscript run what is in EPS, and Windows what is in
# WMF, and opens in IPTC whatever it holds.
PROGRAMS = ("EPS", "IPTC", "WMF")
_ORIENTATION = 0x0112  # in EXIF
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # after "ftyp" in a file
SHORTEST_BASE64 = 64  # characters; no image file is smaller, and few paths are longer


def load_image(
    source,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
    shorter_side: int | None = None,
    allow_urls: AllowedURLs = False,
) -> Image.Image:
    """Loads one picture.

    Args:
        source: A `PIL.Image.Image`; a path (`str` or `os.PathLike`); an `http(s)://` URL, if `allow_urls` says so; a
            `data:image/...` URI or the base64 text of an image file; the `bytes` of an image file; an array or tensor
            of shape `(H, W)`, `(H, W, C)` or `(C, H, W)` with C in 1..4, of floats in [0, 1], integers in
            [0, 255], 16-bit unsigned integers (of 8, 10, 12, 14 or 16 bits, see above) or booleans. Where both layouts
            fit, an array is read as `(H, W, C)` and a tensor as `(C, H, W)`.
        name: What error messages call the picture.
        max_pixels: The most pixels that a file may have. PIL's own limit is not asked.
        shorter_side: Lets the picture be scaled down by a whole number, by as much as leaves its shorter side this
            many pixels or more; by default it is not. JPEG is decoded at 1/2, 1/4 or 1/8, which takes a fraction of
            the time and memory; of all else, and of what is still too large, blocks of pixels are averaged.
        allow_urls: Whether URLs are fetched: False, True for hosts with a public address, or a list of hosts; see
            `url_fetching.fetch`.

    Returns:
        An RGB image, decoded, EXIF rotation applied, transparency laid on white; of an animation the current frame,
        which for a file is the first.

    Raises:
        FileNotFoundError: The path is not there.
        TypeError: `source` is none of the kinds above.
        ValueError: The file is empty, truncated, not an image, no regular file, larger than `MAX_BYTES` or than
            `max_pixels`, the URL is not allowed or does not answer, or the array has NaN, masked pixels, a wrong shape
            or range.
    """
    label = f"`{name}`"
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise ValueError(f"{label} is {source.width} x {source.height} pixels; expected at least one.")
        return _reduce(_to_rgb(_upright(source, label), label, _tags(source)), shorter_side)
    if isinstance(source, (np.ndarray, getattr(sys.modules.get("torch"), "Tensor", np.ndarray))):
        return _reduce(_from_array(source, label), shorter_side)
    if isinstance(source, (str, os.PathLike)):
        shown = repr(os.fspath(source))
        label = f"{label} ({shown if len(shown) <= 200 else shown[:100] + '…'})"
        source = _read(source, label, allow_urls)
    if isinstance(source, (bytes, bytearray)):
        return open_picture(bytes(source), label, max_pixels, shorter_side).decode()
    raise TypeError(
        f"{label} is a {type(source).__name__}; expected a PIL image, a path, a URL, bytes, an array or a tensor."
    )


def _read(source: str | os.PathLike, label: str, allow_urls: AllowedURLs) -> bytes:
    """The bytes that a URL, a path or base64 text stands for."""
    if isinstance(source, str) and is_url(source):
        return fetch(source, label, allow_urls)
    try:
        return read_file(source)
    except (OSError, ValueError) as error:  # base64 text is no possible file name
        data = _from_base64(source) if isinstance(source, str) else None
        if data is not None:
            return data
        if os.path.exists(source):
            raise ValueError(f"{label} cannot be read: {error}; expected an image file.") from error
        raise FileNotFoundError(f"{label} is not there; expected the path of an image file.") from error


def read_file(path: str | os.PathLike) -> bytes:
    """Reads a file, if it is one: a pipe or a device might not end, or not begin.

    Raises:
        OSError: If it cannot be read, is no regular file, or is larger than `MAX_BYTES`.
    """
    _check_regular(os.stat(path))
    # It may have become something else, whose opening would wait.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(number, "rb") as file:
        _check_regular(os.fstat(number))
        data = file.read(MAX_BYTES + 1)  # in some systems there are files that do not say how long they are
    if len(data) > MAX_BYTES:
        raise OSError(f"it has more than {MAX_BYTES:,} bytes")
    return data


def _check_regular(status: os.stat_result):
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file, but a directory, a pipe or a device")
    if status.st_size > MAX_BYTES:
        raise OSError(f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}")


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


class Picture(NamedTuple):
    """A picture that is open, but not decoded yet. Made by `open_picture`.

    Args:
        image: The file, as PIL opens it.
        size: Width and height in the file, in pixels, as it is decoded in full.
        label: What error messages call it.
        shorter_side: As for `load_image`.
    """

    image: Image.Image
    size: tuple[int, int]
    label: str
    shorter_side: int | None

    @property
    def pixels(self) -> int:
        """How many pixels are in memory while it is decoded."""
        return self.image.width * self.image.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the picture as a person sees it, not scaled down; once it is decoded."""
        return self.size[::-1] if self.image.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else self.size

    def decode(self) -> Image.Image:
        """Returns what `load_image` does."""
        image = _upright(self.image, self.label)
        if image.mode in ("L", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
            image = _reduce(image, self.shorter_side)  # before there are copies of it
        return _reduce(_to_rgb(image, self.label, _tags(self.image)), self.shorter_side)


def open_picture(data: bytes, label: str, max_pixels: int = MAX_PIXELS, shorter_side: int | None = None) -> Picture:
    """Opens an image file held in memory.

    Args:
        data: The file.
        label: What error messages call it.
        max_pixels, shorter_side: As for `load_image`.

    Raises:
        ValueError: As for `load_image`.
    """
    if not data:
        raise ValueError(f"{label} is empty, 0 bytes; expected an image file.")
    try:
        image = _open(data)
    except Image.UnidentifiedImageError as error:
        what = str(error) or f"holds {len(data)} bytes that are no image"
        raise ValueError(f"{label} {what}; expected an image file.") from error
    except Exception as error:
        raise _damaged(label, error) from error
    size = image.size
    if size[0] * size[1] > max_pixels:
        raise ValueError(
            f"{label} is too large: {size[0]} x {size[1]} pixels; expected at most {max_pixels:,} in all "
            "(`max_pixels`)."
        )
    scale = _scale(size, shorter_side)
    if scale > 1:
        image.draft(image.mode, (-(-size[0] // scale), -(-size[1] // scale)))  # nothing, for all but JPEG
    return Picture(image, size, label, shorter_side)


def _open(data: bytes) -> Image.Image:
    """`Image.open` without its limit of pixels, which is one setting for all of a process."""
    missing = ""
    for register in (Image.preinit, Image.init, _register_heif):
        register()
        for kind, (factory, accept) in [*Image.OPEN.items()]:
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # they say that it is of another format
                accepted = accept is None or accept(data[:16])
                if kind in PROGRAMS:
                    if accept is not None and accepted:
                        missing = f"is in the format {kind}, which is none of pixels"
                elif isinstance(accepted, str):
                    missing = f"cannot be read here ({accepted})"
                elif accepted:
                    return factory(BytesIO(data), "")
    if not missing and data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        missing = "is in the format HEIC, which is read where pillow-heif is installed"
    raise Image.UnidentifiedImageError(missing)


def _register_heif() -> None:
    """Lets Pillow read HEIC, which phones write, if the package is there."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass


def _scale(size: tuple[int, int], shorter_side: int | None) -> int:
    """The whole number by which a picture is scaled down."""
    return 1 if shorter_side is None else max(1, min(size) // shorter_side)


def _reduce(image: Image.Image, shorter_side: int | None) -> Image.Image:
    scale = _scale(image.size, shorter_side)
    return image.reduce(scale) if scale > 1 else image


def _damaged(label: str, error: Exception) -> ValueError:
    """For what decoders raise on broken data: OSError, SyntaxError, struct.error and more."""
    return ValueError(f"{label} cannot be decoded: {error}; expected a whole and undamaged image.")


def _upright(image: Image.Image, label: str) -> Image.Image:
    """A PIL image, decoded, EXIF rotation applied."""
    try:
        image.load()
        # Another image even where there is nothing to turn: only then is it needed.
        return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except Exception as error:
        raise _damaged(label, error) from error


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF file, which only the image has that was opened."""
    return getattr(image, "tag_v2", {})


def _to_rgb(image: Image.Image, label: str, tags: Mapping[int, Any]) -> Image.Image:
    """An upright PIL image of any mode as RGB, with the tags that it has as a TIFF file."""
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


def _from_array(source: "np.ndarray | torch.Tensor", label: str) -> Image.Image:
    """An array or tensor of pixels as an RGB image."""
    channel_axes = (2, 0)
    if not isinstance(source, np.ndarray):
        import torch

        channel_axes = (0, 2)
        if source.layout is not torch.strided or source.is_nested or source.is_quantized or source.is_meta:
            raise TypeError(f"{label} is a tensor that is sparse, nested, quantized or on meta; expected a dense one.")
        source = source.detach().cpu().resolve_conj()
        source = (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
    elif np.ma.is_masked(source):
        raise ValueError(f"{label} is an array with masked pixels; expected none, as `filled()` leaves them.")
    pixels = _to_uint8(_channels_last(source, channel_axes, label), label)
    return _to_rgb(
        Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)), label, {}
    )


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
