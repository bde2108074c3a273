"""What sentence-transformers is given to encode, one input at a time: its kind, its images, its text, its boxes."""

import os
import re

import numpy as np

try:  # the processor, with which this file travels, loads without sentence-transformers
    from sentence_transformers.base.modality import infer_modality, is_message_dict
except ImportError:
    raise


def read_input(item, prompt: str, processor, modalities: list) -> tuple[object, list[np.ndarray] | None]:
    """Brings one input into a form from which sentence-transformers can tell its modality.

    Args:
        item: Of any kind that `MMGEMTransformer` takes.
        prompt: Put before the text, after the images that it begins with.
        processor: `MMGEMProcessor`.
        modalities: Those to tell apart.

    Returns:
        The input: a text as `{"text": ...}`, with images as `{"image": [...], "text": ...}` with as many placeholders
        as images or boxes, an image as it came. Its boxes, for each image (R, 4) with R at least 1, or None.

    Raises:
        ValueError: For another kind, a text that is no string, a number of placeholders, boxes or images that does not
            fit, and boxes that are none.
    """
    boxes = None
    if isinstance(item, dict) and "boxes" in item:
        boxes, item = item["boxes"], {key: value for key, value in item.items() if key != "boxes"}
    if isinstance(item, (bytes, os.PathLike)):
        return {"image": item}, None
    if is_message_dict(item) or isinstance(item, list) and item and is_message_dict(item[0]):
        item = _from_conversation(item, processor)
    modality = infer_modality(item, supported_modalities=modalities)
    parts = item if isinstance(item, dict) else {modality: item}
    text, images = parts.get("text", ""), parts.get("image")
    if not isinstance(text, str):
        raise ValueError(f"`inputs` has a text of type {type(text).__name__}; expected a string.")
    if boxes is not None:
        boxes = _read_boxes(images, boxes)
    image_token = processor.image_token
    if modality == "text":
        # Without an image there is nothing a placeholder could stand for: it is a word that happens to be there.
        return {"text": prompt + processor.plain_text(text)}, None
    if modality == ("image", "text"):
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if image_token not in text and not processor.is_plain:
            count = len(images) if boxes is None else sum(map(len, boxes))
            return {"image": images, "text": processor.prompt(prompt + text, count)}, boxes
        text = _with_placeholders(
            text, image_token, [1] * len(images) if boxes is None else [len(row) for row in boxes]
        )
        lead = re.match(f"(?:{re.escape(image_token)})*", text).end()
        return {"image": images, "text": text[:lead] + prompt + text[lead:]}, boxes
    if isinstance(images, (list, tuple)):
        raise ValueError(f"`inputs` has a list of {len(images)} images without a text; expected one image.")
    if boxes is not None and len(boxes[0]) != 1:
        raise ValueError(f"`inputs` has {len(boxes[0])} boxes without a text; expected one box, or a text as well.")
    return item, boxes


def _from_conversation(conversation, processor) -> dict:
    """A conversation as its text, with its images where it has any."""
    messages = [conversation] if is_message_dict(conversation) else conversation
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    sources = ("image", "url", "path", "base64")
    for part in parts:
        if part["type"] != "text" and (part["type"] != "image" or not any(key in part for key in sources)):
            raise ValueError(
                f"`inputs` has a conversation with {part!r:.100}; expected parts of type 'text', or of type 'image' "
                f"with one of {sources}."
            )
    images = [part[key] for part in parts if part["type"] == "image" for key in sources if key in part]
    text = processor.apply_chat_template(messages)
    return {"image": images, "text": text} if images else {"text": text}


def _with_placeholders(text: str, image_token: str, counts: list[int]) -> str:
    """The text with as many placeholders for image i as `counts[i]` says; in front where it has none."""
    first, *others = text.split(image_token)
    if not others:
        return image_token * sum(counts) + text
    if len(others) == len(counts):
        return first + "".join(image_token * count + piece for count, piece in zip(counts, others))
    if len(others) != sum(counts):
        boxes = "" if sum(counts) == len(counts) else f" with {sum(counts)} boxes"
        raise ValueError(
            f"`inputs` has a text with {len(others)} {image_token} placeholders for {len(counts)} images{boxes}; "
            f"expected one for each image{' or for each box' if boxes else ''}, or none."
        )
    return text


def _read_boxes(images, boxes) -> list[np.ndarray]:
    """The boxes of one input, as an array for each of its images."""
    if images is None:
        raise ValueError("`inputs` has boxes without an image; expected the image that they lie in.")
    several = isinstance(images, (list, tuple))
    count = len(images) if several else 1
    try:
        rows = [np.asarray(row, dtype=np.float64) for row in (boxes if several else [boxes])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`inputs` has the boxes {boxes!r}; expected a list of [x0, y0, x1, y1].") from error
    if len(rows) != count or any(row.ndim != 2 or row.shape[1] != 4 or len(row) == 0 for row in rows):
        each = f" for each of {count} images" if several else ""
        raise ValueError(f"`inputs` has the boxes {boxes!r}; expected a list of [x0, y0, x1, y1]{each}, at least one.")
    return rows
