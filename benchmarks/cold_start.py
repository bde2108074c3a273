"""The first image vector of a fresh process; run by `benchmarks.inference`, once for each model and round.

python -m benchmarks.cold_start mmgem FOLDER
python -m benchmarks.cold_start clip FOLDER
"""

import json
import sys
import time

PARTS = ("import", "load", "first vector")


def main(library: str, folder: str):
    """Prints the seconds of the processor that each of `PARTS` takes, as JSON."""
    moments = [time.process_time()]
    if library == "mmgem":
        from mmgem import MMGEMModel as Model
    else:
        from transformers import CLIPModel as Model
    import torch

    moments.append(time.process_time())
    model = Model.from_pretrained(folder).eval()
    moments.append(time.process_time())
    size = model.config.vision_config.image_size
    with torch.inference_mode():
        model.get_image_features(torch.zeros(1, 3, size, size))
    moments.append(time.process_time())
    print(json.dumps(dict(zip(PARTS, (b - a for a, b in zip(moments, moments[1:], strict=False)), strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
