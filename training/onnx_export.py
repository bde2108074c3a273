"""Image and text vectors as ONNX graphs: a search needs no torch then."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from mmgem.late_interaction import similarity
from mmgem.training.inference import inference
from mmgem.training.output_folder import whole_folder
from mmgem.training.output_lock import one_writer

GRAPHS = {"image": "image.onnx", "text": "text.onnx"}
TOLERANCE = 1e-4  # between a vector of length 1 from the graph and from the model
LARGEST_FILE = 2**30  # bytes of weights in a graph's own file; protobuf ends at 2 GB, and more lie beside it


class ExportReport(NamedTuple):
    """What was written, and how far it is from the model."""

    files: list[Path]
    difference: float
    recall: float | None
    int8_recall: float | None


class _Vectors(nn.Module):
    """Unit vectors, (B, D) or (B, k, D), of one kind of input."""

    def __init__(self, model):
        super().__init__()
        self.model = model


class ImageVectors(_Vectors):
    """Of images."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D) or (B, k, D)"""
        return normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)


class TextVectors(_Vectors):
    """Of texts."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, L), (B, L) -> (B, D) or (B, k, D)"""
        return normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)


@one_writer
def export_onnx(
    model, processor, out: str | Path, images: Sequence[Any], texts: Sequence[str], int8: bool = False
) -> ExportReport:
    """Export a model, with its processor beside it, and compare what the graphs give with what the model gives.

    `image.onnx` takes `pixel_values` (B, 3, H, W), `text.onnx` takes `input_ids` and `attention_mask` (B, L), padded
    on either side; both give `vectors` of length 1, (B, D) or (B, k, D), for any B, and any L that the language model
    takes. With `int8` there are `image-int8.onnx` and `text-int8.onnx` too, whose matrices are quantized; activations
    are while they run.

    Args:
        model: An `MMGEMModel`, on the CPU.
        processor: Its `MMGEMProcessor`.
        out: Folder for the files, new or empty; it has all of them or, if the export fails, none.
        images: Two or more images to compare with.
        texts: A text for each image, which finds it.
        int8: Whether to quantize as well.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileExistsError: If there is something in `out`.
        ValueError: If the model cannot be exported, if graph and model differ, or if there are too few images.
    """
    if len(images) < 2 or len(images) != len(texts):
        raise ValueError(
            f"`images` holds {len(images)} images for {len(texts)} texts; expected two or more, and a text for each."
        )
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"`out` is {str(out)!r}, a file; expected a folder.")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"`out` is {str(out)!r}, which holds something; expected a new or an empty folder.")
    with whole_folder(out) as folder:
        report = _export_into(folder, model.float(), processor, images, texts, int8)
    return report._replace(files=[out / file.name for file in report.files])


def _export_into(out: Path, model, processor, images: Sequence[Any], texts: Sequence[str], int8: bool) -> ExportReport:
    inputs = {
        "image": dict(processor(images=list(images), return_tensors="pt")),
        "text": dict(processor(text=list(texts), return_tensors="pt")),
    }
    if "spatial_shapes" in inputs["image"]:
        raise ValueError(
            "`model` takes images in their own aspect ratio, one by one; expected a vision tower that takes images of "
            "one size."
        )
    modules = {"image": ImageVectors(model), "text": TextVectors(model)}
    expected, difference = {}, 0.0
    with inference(model), _quiet():
        for kind, module in modules.items():
            expected[kind] = module(**inputs[kind])
            _export(module, inputs[kind], out / GRAPHS[kind])
            for size in (1, len(images)):  # one text alone has another length, too
                part = _first(inputs[kind], size, processor.tokenizer.padding_side)
                actual = _run(out / GRAPHS[kind], part)
                difference = max(difference, float((actual - expected[kind][:size]).abs().max()))
    if not difference <= TOLERANCE:
        raise ValueError(f"`model` and its graphs differ by {difference:.2g}; expected at most {TOLERANCE}.")
    processor.save_pretrained(out)
    files, recall, int8_recall = [out / name for name in GRAPHS.values()], None, None
    if int8:
        with _quiet():
            quantized = {kind: _quantize(out / name) for kind, name in GRAPHS.items()}
        files += quantized.values()
        recall = _recall(expected)
        int8_recall = _recall({kind: _run(file, inputs[kind]) for kind, file in quantized.items()})
    return ExportReport(files, difference, recall, int8_recall)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of operators of other libraries, and of preparations that change nothing here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _export(module: nn.Module, inputs: dict[str, torch.Tensor], file: Path):
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic} | ({} if name == "pixel_values" else {1: dynamic}) for name in inputs}
    size = sum(parameter.nbytes for parameter in module.parameters())
    try:
        torch.onnx.export(
            module,
            (),
            file,
            kwargs=inputs,
            dynamic_shapes=shapes,
            output_names=["vectors"],
            external_data=size > LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # whatever the exporter raises
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"`model` cannot be exported as {file.name}: {reason}") from error


def _first(inputs: dict[str, torch.Tensor], size: int, padding_side: str) -> dict[str, torch.Tensor]:
    """The first rows of a batch, without the padding that they do not need."""
    part = {name: value[:size] for name, value in inputs.items()}
    if "attention_mask" in part:
        length = max(1, int(part["attention_mask"].sum(-1).max()))
        cut = slice(-length, None) if padding_side == "left" else slice(length)
        part = {name: value[:, cut] for name, value in part.items()}
    return part


def _run(file: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def _quantize(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = file.with_name(f"{file.stem}-int8.onnx")
    quantize_dynamic(
        file, quantized, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True
    )
    return quantized


def _recall(vectors: dict[str, torch.Tensor]) -> float:
    """How often the text of an image finds it before all others."""
    found = similarity(vectors["text"], vectors["image"]).argmax(-1)  # (T,)
    return float((found == torch.arange(len(found))).float().mean())
