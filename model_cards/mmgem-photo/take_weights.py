"""Take the model of a finished run into this folder, in half precision and without the code that travels; or its LoRA
into `answers`.

python model_cards/mmgem-photo/take_weights.py runs/mmgem-photo
python model_cards/mmgem-photo/take_weights.py runs/mmgem-photo-answers/stages/answers/adapter
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mmgem.processing.hub_code import code_files
from mmgem.training.loading import load_checkpoint

LORA = "adapter_model.safetensors"


def take_weights(run: Path, out: Path) -> None:
    """Write a model and its processor into a folder.

    The configuration still says float32: the weights are loaded as such, which CPUs without half precision need.
    """
    model, processor = load_checkpoint(run, device="cpu")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    _save_half(load_file(out / "model.safetensors"), out / "model.safetensors")
    for file in code_files():
        (out / file.name).unlink()


def take_lora(adapter: Path, out: Path) -> None:
    """Write LoRA for the model in the folder above, all of whose own parameters were frozen."""
    config = LoraConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = out.parent.name
    config.save_pretrained(str(out))
    weights = {name: weight for name, weight in load_file(adapter / LORA).items() if ".lora_" in name}
    _save_half(weights, out / LORA)


def _save_half(weights: dict[str, torch.Tensor], file: Path) -> None:
    weights = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    run, here = Path(sys.argv[1]), Path(__file__).parent
    if (run / "adapter_config.json").is_file():
        take_lora(run, here / "answers")
    else:
        take_weights(run, here)
