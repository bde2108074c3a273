"""Every kind of picture comes out as the upright RGB image a person would see, and bad ones are refused by name."""

import base64
import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from mmgem.processing import image_loading
from mmgem.processing.image_loading import load_image, open_picture


@pytest.fixture
def picture() -> Image.Image:
    """7 x 5 pixels, all different."""
    values = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
    return Image.fromarray(values)


def encode(image: Image.Image, file_format="PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(other))


def test_every_source_gives_the_same_image(picture, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture))
    text = base64.b64encode(encode(picture)).decode()
    pixels = np.asarray(picture)
    tensor = torch.tensor(pixels).movedim(-1, 0)
    sources = [picture, str(path), path, path.read_bytes(), bytearray(path.read_bytes()), text]
    sources += [
        f"data:image/png;base64,{text}",
        pixels,
        pixels / 255,
        pixels.astype(np.int64),
        np.moveaxis(pixels, 2, 0),
    ]
    sources += [tensor, tensor / 255, (tensor / 255).double(), tensor.movedim(0, -1), pixels.astype(np.uint16) * 257]
    for source in sources:
        assert same(load_image(source), picture), type(source)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(picture, mode):
    grey = np.asarray(picture.convert("L"))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray((grey / 255).astype(np.float32))
    elif mode == "PA":
        image = picture.convert("P").convert("PA")
    else:
        image = picture.convert(mode)
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (7, 5))
    if mode not in ("1", "P", "PA"):  # which lose more than rounding
        expected = picture.convert("L").convert("RGB") if mode in ("L", "LA", "I;16", "I", "F") else picture
        assert np.abs(np.asarray(loaded).astype(int) - np.asarray(expected)).max() <= 8


def tiff(pixels, **tags) -> bytes:
    numbers = {"bits": 258, "white": 281}
    return encode(Image.fromarray(pixels), "TIFF", tiffinfo={numbers[name]: value for name, value in tags.items()})


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_grey_has_its_white_at_the_depth_that_holds_it(dtype, bits):
    white = 2**bits - 1
    pixels = np.round(RAMP * (white / 255)).astype(dtype)
    expected = np.round(pixels.astype(float) * 255 / white)
    sources = [Image.fromarray(pixels), tiff(pixels)]
    if dtype == np.uint16:
        sources += [pixels, encode(sources[0])]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), np.stack([expected] * 3, axis=-1))


def test_a_file_may_say_its_white():
    dark = np.full((2, 2), 1000, dtype=np.uint16)
    levels = [
        load_image(source).getpixel((0, 0))[0] for source in (dark, tiff(dark, white=4095), tiff(dark, white=2000))
    ]
    assert levels == [round(1000 * 255 / white) for white in (1023, 4095, 2000)]
    with pytest.raises(ValueError, match=r"has pixels in \[1000, 1000\]; expected \[0, 999\]"):
        load_image(tiff(dark, white=999))


def test_floats_up_to_one_are_shares_of_white():
    pixels = (RAMP / 255).astype(np.float32)
    assert np.array_equal(np.asarray(load_image(tiff(pixels)))[..., 0], RAMP)
    assert np.array_equal(np.asarray(load_image(tiff(pixels / 5)))[..., 0], np.round(RAMP / 5))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((2, 2), -1, dtype=np.int32), r"\[-1, -1\]; expected \[0, 255\]"),
        (np.full((2, 2), 70_000, dtype=np.int32), r"\[70000, 70000\]; expected \[0, 65535\]"),
        (np.full((2, 2), np.nan, dtype=np.float32), "NaN or infinite"),
        (np.full((2, 2), -0.5, dtype=np.float32), r"\[-0.5, -0.5\]; expected \[0, 1\]"),
    ],
)
def test_deep_grey_that_is_no_picture(pixels, message):
    with pytest.raises(ValueError, match=message):
        load_image(tiff(pixels))


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (100, 51), (224, 224, 224)),  # 100 * 0.2 + 255 * 0.8
        ("RGBA", (100, 0, 255, 51), (224, 204, 255)),
        ("RGBa", (20, 0, 51, 51), (224, 204, 255)),  # colours times alpha
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 65535, (255, 255, 255)),
        ("I", 255, (255, 255, 255)),
        ("F", 1.0, (255, 255, 255)),
    ],
)
def test_one_pixel_of_every_mode(mode, pixel, expected):
    assert load_image(Image.new(mode, (3, 2), pixel)).getpixel((1, 1)) == expected


def test_premultiplied_grey():
    grey = Image.new("LA", (3, 2), (100, 51)).convert("La")
    assert abs(load_image(grey).getpixel((0, 0))[0] - 224) <= 2  # which rounds 100 * 0.2


def test_a_grey_that_stands_for_transparency_is_white():
    image = Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16))
    image.info["transparency"] = 300
    assert [load_image(image).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image = image.convert(mode)
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    loaded = load_image(encode(image, **({"transparency": 1} if mode == "P" else {})))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("red", (0, 0, 8, 8))
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(load_image(encode(stored, exif=exif)), upright)
    deep = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
    assert same(load_image(encode(deep, "TIFF", exif=exif)), upright.convert("L").convert("RGB"))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_given_image_is_left_alone(picture):
    load_image(picture).putpixel((0, 0), (255, 255, 255))
    assert picture.getpixel((0, 0)) == (0, 2, 4)


def test_layout_of_small_arrays():
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert load_image(pixels).size == (4, 3)  # (H, W, C)
    assert load_image(torch.tensor(pixels)).size == (3, 4)  # (C, H, W)
    assert load_image(np.zeros((5, 7, 1))).size == load_image(np.zeros((1, 5, 7))).size == (7, 5)
    assert load_image(torch.ones(3, 5, 7, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.ones((5, 7), dtype=bool)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf), "infinite"),
        (torch.full((3, 4, 4), -1.0), r"\[-1, -1\]; expected floats in \[0, 1\]"),
        (np.full((4, 4, 3), 2.5), r"\[2.5, 2.5\]"),
        (np.full((4, 4, 3), 300), r"int64 pixels in \[300, 300\]"),
        (np.zeros((6, 6, 5)), r"shape \(6, 6, 5\)"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.zeros((2, 4, 4, 3)), r"shape \(2, 4, 4, 3\)"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), r"\[70000, 70000\]; expected \[0, 65535\]"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN"),
        (b"", "empty, 0 bytes"),
        (b"no image at all", "holds 15 bytes that are no image"),
        ("data:image/png;base64,aGVsbG8=", "holds 5 bytes that are no image"),
        ("http://127.0.0.1:9/x.png", "is a URL, and fetching is off; expected a file, or `allow_urls`"),
    ],
)
def test_bad_values_are_named(source, message):
    with pytest.raises(ValueError, match=rf"`images\[3\]`.*{message}"):
        load_image(source, "images[3]")


@pytest.mark.parametrize("source", [None, 3, [1, 2], {"image": "x"}, np.array([["a"]]), np.zeros((2, 2), complex)])
def test_bad_types_are_named(source):
    with pytest.raises(TypeError, match="`image`.*expected"):
        load_image(source)


def test_bad_files_are_named(picture, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`image` \('nowhere/x.png'\) is not there"):
        load_image("nowhere/x.png")
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_image("x." * 5000)
    with pytest.raises(ValueError, match="cannot be read.*directory"):
        load_image(tmp_path)
    for name, data in {"empty.png": b"", "text.jpg": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"`image` .*{name}"):
            load_image(tmp_path / name)


def test_no_picture_is_run_as_a_program(tmp_path, monkeypatch):
    """Pillow opens EPS, also within IPTC, and has Ghostscript decode it."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # nothing was looked for yet
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    fields = {(3, 20): b"\0\0\0\n", (3, 30): b"\0\0\0\n", (3, 60): b"\3\1", (3, 120): b"\5", (8, 10): eps}
    iptc = b"".join(b"\x1c" + bytes(key) + struct.pack(">H", len(value)) + value for key, value in fields.items())
    with pytest.raises(ValueError, match="is in the format EPS, which is none of pixels; expected an image file"):
        load_image(eps)
    with pytest.raises(ValueError, match="bytes that are no image"):
        load_image(iptc)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    for length in (len(data) // 2, len(data) - 200, 20):
        with pytest.raises(ValueError, match="`image` .*expected an? "):
            load_image(data[:length])


def test_truncated_image_opened_before_is_refused():
    data = encode(Image.effect_noise((64, 64), 50))
    with pytest.raises(ValueError, match="`image` cannot be decoded"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_decompression_bomb_is_refused_by_a_limit_of_our_own(picture, monkeypatch):
    data = encode(picture)
    with pytest.raises(ValueError, match=r"`image` is too large: .*expected at most 34 in all \(`max_pixels`\)"):
        load_image(data, max_pixels=34)
    assert same(load_image(data, max_pixels=35), picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)  # which is of the process, and not asked
    assert same(load_image(data), picture)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_format_is_opened_as_by_pil(file_format):
    image = Image.effect_noise((20, 10), 50).convert("RGB")
    data = encode(image, file_format)
    assert same(load_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_picture_is_scaled_down_as_far_as_it_may_be(file_format, mode):
    if (file_format, mode) in {("JPEG", "RGBA"), ("JPEG", "P"), ("PNG", "CMYK")}:
        return  # there are none
    wave = np.sin(np.linspace(0, 6, 320)) * np.cos(np.linspace(0, 4, 160))[:, None] * 120 + 128
    image = Image.fromarray(np.stack([wave, wave[::-1], wave[:, ::-1]], axis=-1).astype(np.uint8)).convert(mode)
    data = encode(image, file_format)
    smallest = (80, 40) if file_format == "JPEG" else (64, 32)  # by 4, of 1, 2, 4 and 8; and by 5
    for shorter_side, size in [(None, (320, 160)), (161, (320, 160)), (80, (160, 80)), (30, smallest)]:
        reduced = load_image(data, shorter_side=shorter_side)
        assert reduced.mode == "RGB" and reduced.size == size
        expected = np.asarray(load_image(data).resize(size, Image.Resampling.BOX), np.float32)
        assert np.abs(np.asarray(reduced, np.float32) - expected).mean() < 2


def test_a_turned_picture_is_scaled_down_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format in ("JPEG", "PNG", "TIFF"):
        data = encode(Image.linear_gradient("L").resize((320, 160)), file_format, exif=exif)
        reduced = load_image(data, shorter_side=80)
        assert reduced.size == (80, 160) and reduced.getpixel((75, 80))[0] < 60 < 200 < reduced.getpixel((4, 80))[0]
        opened = open_picture(data, "it", shorter_side=80)
        opened.decode()
        assert opened.upright_size == (160, 320)
    image = Image.new("RGB", (320, 160))
    assert load_image(image, shorter_side=30).size == (64, 32) and image.size == (320, 160)


def test_a_large_jpeg_is_not_decoded_in_full():
    """109 megapixels, more than PIL opens without a warning."""
    data = encode(Image.new("L", (12100, 9000)), "JPEG")
    picture = open_picture(data, "it", shorter_side=448)
    assert picture.pixels < 12100 * 9000 / 60
    assert picture.decode().size == (757, 563)


def test_nothing_but_regular_files_of_a_limited_size_is_opened(tmp_path, monkeypatch, picture):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    for name, reason in [
        ("pipe.png", "no regular file"),
        ("endless.png", "no regular file"),
        ("sparse.png", "1,099,511,627,776 bytes, more than 536,870,912"),
    ]:
        with pytest.raises(ValueError, match=f"{name}'\\) cannot be read: .*{reason}"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):  # as of any link to nothing
        load_image(tmp_path / "loop.png")
    (tmp_path / "a.png").write_bytes(encode(picture))
    monkeypatch.setattr("mmgem.processing.image_loading.MAX_BYTES", (tmp_path / "a.png").stat().st_size)
    assert same(load_image(tmp_path / "a.png"), picture)
    monkeypatch.setattr("mmgem.processing.image_loading.MAX_BYTES", 10)
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        load_image("/proc/self/maps")  # of 0 bytes, as the system says


def test_a_photograph_of_a_phone_is_read_upright_where_pillow_heif_is(picture):
    pytest.importorskip("pillow_heif")
    large = picture.resize((70, 50))
    image_loading._register_heif()  # for `encode`
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees, which is written into the file as it is for HEIC
    loaded = load_image(encode(large, "HEIF", quality=100, exif=exif.tobytes()))
    assert loaded.mode == "RGB" and loaded.size == (50, 70)
    upright = np.asarray(large.transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(loaded, dtype=int) - upright).mean() < 4
    transparent = large.convert("RGBA")
    transparent.putalpha(0)
    assert np.asarray(load_image(encode(transparent, "HEIF", quality=100))).min() > 250
    with pytest.raises(ValueError, match="too large: 70 x 50"):
        load_image(encode(large, "HEIF"), max_pixels=1000)


def test_what_is_missing_to_read_a_file_is_said(monkeypatch):
    monkeypatch.setattr(image_loading, "_register_heif", lambda: None)
    monkeypatch.setattr(Image, "OPEN", {})
    monkeypatch.setattr(Image, "init", lambda: None)
    monkeypatch.setattr(Image, "preinit", lambda: None)
    with pytest.raises(ValueError, match="in the format HEIC, which is read where pillow-heif is installed"):
        load_image(b"\0\0\0\x18ftypheic" + bytes(60))
    monkeypatch.setattr(Image, "OPEN", {"AVIF": (None, lambda start: "AVIF support not installed")})
    with pytest.raises(ValueError, match=r"cannot be read here \(AVIF support not installed\)"):
        load_image(b"\0\0\0\x18ftypavif" + bytes(60))
