import torch

from benchmarks.setting import IMAGE_TOKEN_ID, build_batch, micro_setting
from benchmarks.two_model_stack import CLIP_BOS, CLIP_EOS, build_clip, build_llava, clip_inputs, llava_inputs
from mmgem.text_rows import IGNORED_LABEL


def test_clip_reads_each_caption_at_its_own_end_token():
    setting = micro_setting()
    clip, batch = build_clip(setting).eval(), build_batch(setting)
    inputs = clip_inputs(batch)
    lengths = batch["attention_mask"].sum(1)
    assert (inputs["attention_mask"].sum(1) == lengths + 2).all()
    together = clip.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    for row, length in enumerate(lengths):
        caption = batch["input_ids"][row, :length]
        alone = torch.tensor([[CLIP_BOS, *caption.tolist(), CLIP_EOS]])
        torch.testing.assert_close(clip.get_text_features(alone).pooler_output[0], together[row])


def test_llava_learns_every_caption_token_and_its_end_behind_all_patches():
    setting = micro_setting()
    llava, batch = build_llava(setting), build_batch(setting)
    inputs = llava_inputs(batch, llava)
    assert ((inputs["input_ids"] == IMAGE_TOKEN_ID).sum(1) == setting.num_patches).all()
    lengths = batch["attention_mask"].sum(1)
    labels = [row[row != IGNORED_LABEL] for row in inputs["labels"]]
    for row, length in enumerate(lengths):
        assert labels[row].tolist() == [*batch["input_ids"][row, :length].tolist(), 2]
    outputs = llava(**inputs)
    states = outputs.logits[:, :-1][inputs["labels"][:, 1:] != IGNORED_LABEL]
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(states, torch.cat(labels)))
