"""Small image files in memory."""

from io import BytesIO

from PIL import Image


def png(color, size=(8, 8)) -> bytes:
    """A picture of one color."""
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()
