"""Take the model of a finished run into this folder: weights in half precision, without the code that travels.

python model_cards/mmgem-photo/take_weights.py runs/mmgem-photo
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmgem.processing.hub_code import code_files
from mmgem.training.loading import load_checkpoint


def take_weights(run: Path, out: Path) -> None:
    """Write a model and its processor into a folder.

    The configuration still says float32: the weights are loaded as such, which CPUs without half precision need.
    """
    model, processor = load_checkpoint(run, device="cpu")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    weights = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in code_files():
        (out / file.name).unlink()


if __name__ == "__main__":
    take_weights(Path(sys.argv[1]), Path(__file__).parent)
