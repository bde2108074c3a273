"""A batch of the joint step that has everything: fused queries, documents, regions, answers from memory."""

import torch
from tiny_models import IMAGE_SIZE, build_model

from mmgem.text_rows import IGNORED_LABEL

IMAGE_TOKEN, EOS, N, K = 299, 0, 4, 3
# 0: bare image 0, a memory and a document. 1: its caption, which finds it. 2: image 0 with an edit finds image 1.
# 3: image 1 with an instruction finds its second box. 4 and 5: a question and a caption from the memory of image 0.
# 6: a caption of image 1, from the image. 7: a text document, found by 8.
TEXTS = [[], [11, 12, 13], [21, 22], [31], [41, 42, 43], [51, 52], [61, 62], [71, 72, 73, 74], [81]]
ROWS = {
    "image_index": [0, 0, 1, 1, 0, 0, 1, 1, 1],
    "box_index": [-1, -1, -1, 1, -1, -1, -1, -1, -1],
    "fused_index": [0, -1, 0, 1, -1, -1, -1, -1, -1],
    "target_row": [-1, 0, -1, -1, -1, -1, -1, -1, 7],
    "memory_row": [-1, -1, -1, -1, 0, 0, -1, -1, -1],
    "contrastive_mask": [False, True, True, True, False, False, True, False, True],
}
ANSWER_STARTS = 2  # in row 4
BOXES = torch.tensor([[[0, 0, 0.5, 0.5], [0, 0, 0, 0]], [[0, 0, 1, 1], [0.2, 0.3, 0.9, 1]]])


def joint_model(**config):
    config = {"num_visual_tokens": N, "num_embedding_tokens": K, "image_token_id": IMAGE_TOKEN, **config}
    return build_model(**config).eval()


def joint_batch(side="right", **changes):
    length = max(map(len, TEXTS))
    pads = [[1] * (length - len(text)) for text in TEXTS]
    rows = [pad + text if side == "left" else text + pad for text, pad in zip(TEXTS, pads, strict=True)]
    ones = [[0] * len(pad) + [1] * len(text) for text, pad in zip(TEXTS, pads, strict=True)]
    mask = torch.tensor(ones if side == "left" else [one[::-1] for one in ones])
    input_ids = torch.tensor(rows)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, start in ((4, ANSWER_STARTS), (5, 0), (6, 0)):
        at = mask[row].nonzero()[start:, 0]
        labels[row, at] = input_ids[row, at]
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)),
        "boxes": BOXES,
        "return_loss": True,
        **{name: torch.tensor(values) for name, values in ROWS.items()},
        **changes,
    }
