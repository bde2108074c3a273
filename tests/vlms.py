"""Tiny random vision-language models of each family, their processors, and inputs of their form."""

import torch
from language_models import LLAMA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AriaConfig,
    AutoModelForImageTextToText,
    AyaVisionConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Cohere2Config,
    DeepseekVLConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2Config,
    GotOcr2ImageProcessorPil,
    Idefics2Config,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    JanusConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    LlavaProcessor,
    Mistral3Config,
    MistralConfig,
    Ovis2Config,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VipLlavaConfig,
)

IMAGE, START, END = 290, 291, 292  # image token, and what stands around it where a family has that
SIDE, PATCH = 32, 8

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT = LLAMA | {"max_position_embeddings": 512, "bos_token_id": 2}
_TIED = {"tie_word_embeddings": True}
_TILES = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}

VLM_CONFIGS = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config=LlamaConfig(**_TEXT), image_token_index=IMAGE
    ),
    "idefics3": lambda: Idefics3Config(
        vision_config=_VISION, text_config=LlamaConfig(**_TEXT).to_dict(), image_token_id=IMAGE, scale_factor=2
    ),
    "smolvlm": lambda: SmolVLMConfig(
        vision_config=_VISION, text_config=LlamaConfig(**_TEXT).to_dict(), image_token_id=IMAGE, scale_factor=2
    ),
    "paligemma": lambda: PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_VISION).to_dict(),
        text_config=Gemma2Config(**_TEXT | {"vocab_size": 1600}, head_dim=8, final_logit_softcapping=0.5).to_dict(),
        image_token_index=IMAGE,
        projection_dim=32,
        **_TIED,
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION).to_dict(),
        text_config=Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=16).to_dict(),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        **_TIED,
    ),
    "internvl": lambda: InternVLConfig(
        vision_config={**_VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=Qwen2Config(**_TEXT).to_dict(),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "llava_next": lambda: LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config=LlamaConfig(**_TEXT), image_token_index=IMAGE, **_TILES
    ),
    "llava_onevision": lambda: LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=IMAGE - 1,
        **_TILES,
    ),
    "vipllava": lambda: VipLlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    ),
    "mistral3": lambda: Mistral3Config(
        vision_config=PixtralVisionConfig(**_VISION, head_dim=8),
        text_config=MistralConfig(**_TEXT, head_dim=8),
        image_token_index=IMAGE,
    ),
    "aya_vision": lambda: AyaVisionConfig(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=Cohere2Config(**_TEXT, head_dim=8, sliding_window=16),
        image_token_index=IMAGE,
    ),
    "idefics2": lambda: Idefics2Config(
        vision_config=_VISION,
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
        | {"num_key_value_heads": 2, "resampler_head_dim": 8},
        text_config=MistralConfig(**_TEXT).to_dict(),
        image_token_id=IMAGE,
    ),
    "got_ocr2": lambda: GotOcr2Config(
        vision_config={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": SIDE, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64},
        text_config=Qwen2Config(**_TEXT).to_dict(),
        image_token_id=IMAGE,
    ),
    "janus": lambda: JanusConfig(
        vision_config={**_VISION, "projection_dim": 32},
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32}
        | {"channel_multiplier": [1, 1], "num_res_blocks": 1, "image_token_embed_dim": 32, "projection_dim": 32},
        text_config=LlamaConfig(**_TEXT).to_dict(),
        image_token_id=IMAGE,
    ),
    "deepseek_vl": lambda: DeepseekVLConfig(
        vision_config=_VISION, text_config=LlamaConfig(**_TEXT).to_dict(), image_token_id=IMAGE
    ),
    "ovis2": lambda: Ovis2Config(
        vision_config={**_VISION, "vocab_size": 40, "hidden_stride": 2},
        text_config=Qwen2Config(**_TEXT).to_dict(),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[280, 281, 282, 283, 284],
        hidden_size=32,
        vocab_size=300,
    ),
    "aria": lambda: AriaConfig(
        vision_config={**_VISION, "model_type": "idefics3_vision"},
        text_config={**_TEXT, "model_type": "aria_text", "moe_num_experts": 2, "moe_topk": 1}
        | {"moe_num_shared_experts": 1},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 4},
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": PATCH, "window_size": 32, "fullatt_block_indexes": [1],
        },
        text_config={**_TEXT, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
        image_token_id=IMAGE,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": PATCH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
        image_token_id=IMAGE,
    ),
}  # fmt: skip
REFUSED_VLMS = "qwen2_5_vl", "qwen3_vl"
# Of two tiles in rows that end with a token of their own, and of the whole.
_TILED = dict.fromkeys(["llava_next", "llava_onevision"], 16 + 4 * (8 + 1))
# Of the others 4.
TOKENS_OF_IMAGE = dict.fromkeys(["llava", "paligemma", "vipllava", "janus", "deepseek_vl"], 16) | _TILED


def build_vlm(family: str) -> PreTrainedModel:
    """A random VLM by the names of `VLM_CONFIGS`."""
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(VLM_CONFIGS[family]()).eval()
    for parameter in vlm.parameters():  # wide apart, so that an image or a mask makes a difference
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return vlm


def vlm_inputs(family: str, seed: int = 0, texts: tuple[int, ...] = (5, 3)) -> dict[str, torch.Tensor]:
    """Prompts of one image and a text of so many tokens each, padded on the left, as the family's processor does."""
    generator = torch.Generator().manual_seed(seed)
    n = TOKENS_OF_IMAGE.get(family, 4)
    rows = [
        torch.cat(
            [
                torch.tensor([2, START] + [IMAGE] * n + [END]),
                torch.randint(3, IMAGE, (count,), generator=generator),
            ]
        )
        for count in texts
    ]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]),
        "pixel_values": torch.randn(len(rows), 3, SIDE, SIDE, generator=generator),
    }
    is_image = (inputs["input_ids"] == IMAGE).long()
    if family in _TILED:
        inputs["pixel_values"] = torch.randn(len(rows), 3, 3, SIDE, SIDE, generator=generator)  # (I, tiles, 3, H, W)
        inputs["image_sizes"] = torch.tensor([[SIDE, 2 * SIDE]] * len(rows))
    elif family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[SIDE, SIDE]] * len(rows))
    elif family in ("idefics2", "idefics3", "smolvlm"):
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    elif family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(is_image)
    elif family == "gemma3":
        inputs["token_type_ids"] = is_image
    elif family.startswith("qwen"):
        side = SIDE // PATCH
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(rows))
        inputs["pixel_values"] = torch.randn(len(rows) * side**2, 3 * 2 * PATCH**2, generator=generator)
        inputs["mm_token_type_ids"] = is_image
    return inputs


_CONTENT = (
    "{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}%s"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}"
)
_TEMPLATES = {
    "llava": "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + _CONTENT % "<image>\n"
    + "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "idefics3": "<bos>{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    + _CONTENT % "<image>"
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "gemma3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    + _CONTENT % "<boi>"
    + "<eos>\n{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "internvl": "{% for message in messages %}{{ '<turn>' + message['role'] + '\n' }}"
    + _CONTENT % "<IMG_CONTEXT>\n"
    + "<eos>\n{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}",
}
_TOKENS = {  # image token, start and end of an image
    "gemma3": ("<soft>", "<boi>", "<eoi>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>"),
}


def build_tokenizer(image: str = "<image>", start: str = "<start>", end: str = "<end>", **options):
    """Bytes as tokens; the ids of `_TEXT` and of the image tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<eos>", "<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokens = [*(f"<unused{i}>" for i in range(IMAGE - 260)), "<turn>", image, start, end]
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", **options
    )


def build_vlm_processor(family: str) -> ProcessorMixin:
    """The processor that fits `build_vlm(family)`."""
    tokens, template = _TOKENS.get(family, ("<image>", "<start>", "<end>")), _TEMPLATES.get(family)
    size = {"height": SIDE, "width": SIDE}
    if family == "llava":
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(image_processor, build_tokenizer(*tokens), chat_template=template, **options)
    if family == "idefics3":
        image_processor = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        return Idefics3Processor(image_processor, build_tokenizer(*tokens), image_seq_len=4, chat_template=template)
    if family == "paligemma":
        image_processor = SiglipImageProcessorPil(size=size)
        image_processor.image_seq_length = 16
        return PaliGemmaProcessor(image_processor, build_tokenizer(*tokens))
    if family == "gemma3":
        names = dict(zip(("image_token", "boi_token", "eoi_token"), tokens, strict=True))
        tokenizer = build_tokenizer(*tokens, extra_special_tokens=names)
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=size), tokenizer, chat_template=template, image_seq_length=4
        )
    if family == "smolvlm":
        names = {"fake_image_token": tokens[1], "global_image_token": tokens[2], "end_of_utterance_token": "<turn>"}
        tokenizer = build_tokenizer(*tokens, extra_special_tokens={**names, "image_token": tokens[0]})
        sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
        template = _TEMPLATES["idefics3"].replace("<end_of_utterance>", "<turn>")
        parts = SmolVLMImageProcessorPil(**sizes), tokenizer, SmolVLMVideoProcessor(**sizes)
        return SmolVLMProcessor(*parts, image_seq_len=4, chat_template=template)
    assert family == "internvl"
    names = dict(zip(("context_image_token", "start_image_token", "end_image_token"), tokens, strict=True))
    tokenizer = build_tokenizer(*tokens, extra_special_tokens={**names, "video_token": "<unused0>"})
    image_processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    parts = image_processor, tokenizer, InternVLVideoProcessor(size=size)
    return InternVLProcessor(*parts, image_seq_length=4, chat_template=template)
