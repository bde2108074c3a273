"""The fingerprint of a model, by which an index knows the model that made it: settings, weights, embedded probes.

torch is imported where a fingerprint is taken: to read one needs none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# For each kind of probe the clause that says that it is another one. "text" and "weights" need no vision tower: they
# tell whether an index may be asked with texts, and from memory. The first are those of `EMBEDDING_MODES`.
KINDS = {
    "text": "embeds texts otherwise",
    "image": "embeds images otherwise",
    "fused": "embeds images with texts otherwise",
    "memory": "remembers images otherwise",
    "weights": "has other weights",
}

# Distance of two probes, relative to their length, that are taken for one. Rounding to bfloat16 leaves 0.01 of
# embeddings (0.045 is a cosine of 0.999) and 0.0025 of weights, which a short training changes more than that.
_TOLERANCE, _TOLERANCE_OF_WEIGHTS = 0.045, 0.005

_CONFIG_FIELDS = (
    "num_embedding_tokens",
    "embedding_pooling",
    "text_attention",
    "projection_dim",
    "num_visual_tokens",
    "prompts",
    "embedding_prompt_ids",
    "calibrated_modalities",
)
_VALUES_PER_WEIGHT = 64


@dataclass(frozen=True)
class Fingerprint:
    """The settings and probes that a model is known by.

    Args:
        settings: The settings that change an embedding, by name, as JSON has them.
        probes: (rows, width) float32 by kind, see `KINDS`: evenly spaced values of every weight; embeddings of a fixed
            text, picture, and both; the memory of the picture.
    """

    settings: dict[str, Any]
    probes: dict[str, np.ndarray]

    @classmethod
    def take(cls, model, processor, kinds: Iterable[str]) -> "Fingerprint":
        """Takes the fingerprint of a model.

        Args:
            model: An `MMGEMModel`.
            processor: Its `MMGEMProcessor`.
            kinds: The kinds of probes, of `KINDS`.

        Raises:
            ValueError: If a probe comes out as NaN or infinite, as everything else then would.
        """
        settings = {name: getattr(model.config, name) for name in _CONFIG_FIELDS}
        settings |= {"prompts": settings["prompts"] or None, "model_max_length": processor.tokenizer.model_max_length}
        probes = {kind: _probe(model, processor, kind) for kind in kinds}
        if broken := [kind for kind, probe in probes.items() if not np.isfinite(probe).all()]:
            raise ValueError(
                f"`model` is {model.name_or_path!r}, whose {' and '.join(broken)} of a fixed input are NaN or "
                "infinite; expected finite values."
            )
        return cls(settings, probes)

    def difference(self, other: "Fingerprint") -> str | None:
        """In which way a model with the fingerprint `other` is another one, as a clause; None if it is the same.

        Probes are compared where both have them.
        """
        for name, value in self.settings.items():
            if other.settings.get(name) != value:
                return f"whose {name} is {other.settings.get(name)!r} instead of {value!r}"
        for kind, clause in KINDS.items():
            if kind in self.probes and kind in other.probes:
                tolerance = _TOLERANCE_OF_WEIGHTS if kind == "weights" else _TOLERANCE
                if not _is_same(self.probes[kind], other.probes[kind], tolerance):
                    return f"which {clause}"
        return None


def _is_same(probe: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    if probe.shape != other.shape:
        return False
    lengths = np.linalg.norm(probe, axis=-1).clip(min=1e-12)  # (rows,)
    return bool((np.linalg.norm(probe - other, axis=-1) <= tolerance * lengths).all())


def _probe(model, processor, kind: str) -> np.ndarray:
    from PIL import Image

    from mmgem.training.inference import EMBEDDING_MODES, remember

    if kind == "weights":
        return _sample_weights(model)
    text = "Find the image that shows 3 small blue stars, and a RED circle (on the left)!"
    upward, outward = Image.linear_gradient("L"), Image.radial_gradient("L")
    # Not square, so that views of an image by other rules differ.
    picture = Image.merge("RGB", (upward, upward.rotate(90), outward)).crop((0, 0, 256, 160))
    if kind == "memory":
        probe = remember(model, processor, [picture])
    else:
        inputs, mode = {"images": [picture], "texts": [text]}, EMBEDDING_MODES[kind]
        probe = mode.embed(model, processor, *(inputs[name] for name in mode.takes))
    return np.ascontiguousarray(probe.reshape(-1, probe.shape[-1]).numpy())  # one row, or k


def _sample_weights(model) -> np.ndarray:
    """(weights, 64) Evenly spaced values of each, with zeros after those of a smaller one."""
    weights = [weight for weight in model.state_dict().values() if weight.is_floating_point()]
    rows = np.zeros((len(weights), _VALUES_PER_WEIGHT), np.float32)
    for row, weight in zip(rows, weights, strict=True):
        values = weight.flatten()[:: max(1, weight.numel() // _VALUES_PER_WEIGHT)][:_VALUES_PER_WEIGHT]
        row[: len(values)] = values.float().cpu().numpy()
    return rows
