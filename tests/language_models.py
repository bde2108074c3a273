"""Tiny random language models of many families, from configs in milliseconds, and what the probe finds about each."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = LLAMA | {"head_dim": 8}
WINDOW = HEADS | {"sliding_window": 4}
WINDOWS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROTARY_GPT = GPT | {"rotary_dim": 4}
SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# Family -> fields of its config, by how it keeps packed sequences apart.
BY_POSITION_IDS = {
    "llama": LLAMA,
    "mistral": WINDOW,
    "ministral": WINDOWS,
    "mixtral": WINDOW | LOCAL_EXPERTS,
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2_moe": LLAMA | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS,
    "gemma": HEADS,
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": ROTARY_GPT,
    "codegen": ROTARY_GPT,
    "gpt_neo": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
    "gpt_neox": LLAMA,
    "ctrl": GPT | {"dff": 64},
    "phi": LLAMA,
    "phi3": WINDOW,
    "olmo2": LLAMA,
    "olmo3": WINDOWS,
    "smollm3": LLAMA,
    "cohere": LLAMA,
    "cohere2": WINDOWS,
    "granite": LLAMA,
    "starcoder2": WINDOW,
    "stablelm": LLAMA,
    "nemotron": LLAMA,
    "glm4": HEADS,
    "exaone4": WINDOWS,
    "helium": HEADS,
    "seed_oss": HEADS,
    "ernie4_5": HEADS,
    "deepseek_v3": LLAMA
    | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 8, "first_k_dense_replace": 2},
    "apertus": LLAMA,
    "arcee": LLAMA,
    "llama4_text": HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
}
BY_BLOCK_MASK = {
    "gpt_oss": WINDOWS | LOCAL_EXPERTS,
    "afmoe": WINDOWS | EXPERTS | {"num_shared_experts": 1, "num_dense_layers": 1, "n_group": 1, "topk_group": 1},
    "falcon": LLAMA,
    "opt": {k: v for k, v in LLAMA.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": LLAMA,
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "eos_token_id": 0},
    "xglm": {
        "vocab_size": 300,
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}
UNPACKED = {
    "bloom": {
        "vocab_size": 300,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
    "mamba": LLAMA | {"state_size": 4},
    "falcon_mamba": LLAMA | {"state_size": 4},
    "mamba2": LLAMA | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "jamba": LLAMA
    | {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "bamba": LLAMA | SSD | {"attn_layer_indices": [1]},
    "granitemoehybrid": LLAMA
    | SSD
    | LOCAL_EXPERTS
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "qwen3_next": HEADS | EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": HEADS | DELTA,
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
PACKING = {
    **dict.fromkeys(BY_POSITION_IDS, "position_ids"),
    **dict.fromkeys(BY_BLOCK_MASK, "block_mask"),
    **dict.fromkeys(UNPACKED, "none"),
}
_BART = {"vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4}
# Family -> fields of its config, and why it is refused.
REFUSED = {
    "rwkv": (LLAMA | {"attention_hidden_size": 32, "context_length": 256}, "writes from its cache"),
    "openai-gpt": (GPT, "writes from its cache"),
    "recurrent_gemma": (
        LLAMA | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
        "writes from its cache",
    ),
    "modernbert-decoder": (
        LLAMA | {"sliding_window": 4, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
        "output embeddings alone",
    ),
    "bert": (LLAMA, "is causal"),
    "bart": (_BART, "cross-attention"),
    "moshi": (LLAMA, "can be resized"),
    "mbart": (_BART, "cross-attention"),
    "trocr": (_BART | {"cross_attention_hidden_size": 48}, "cross-attention"),
}
# One for each mechanism, which `make test` runs.
MECHANISMS = {
    "llama": "rotary positions",
    "gpt2": "learned positions",
    "mistral": "a sliding window",
    "gemma3_text": "windows in some layers, scaled words",
    "llama4_text": "chunks, experts",
    "qwen3_moe": "experts",
    "gpt_oss": "windows, sinks, experts",
    "opt": "positions counted from the mask",
    "bloom": "biases in the place of positions",
    "mamba": "states",
    "jamba": "states and attention",
    "lfm2": "convolutions and attention",
    "qwen3_next": "linear attention",
    "bert": "not causal",
    "bart": "cross-attention",
    "rwkv": "a cache of its own",
    "modernbert-decoder": "a head of several layers",
    "moshi": "no room in its vocabulary",
}
CONFIGS = BY_POSITION_IDS | BY_BLOCK_MASK | UNPACKED | {name: fields for name, (fields, _) in REFUSED.items()}


def build_language_model(name: str, **fields) -> PreTrainedModel:
    """With other fields of its config, and weights so large that what leaks is seen."""
    torch.manual_seed(0)
    config_class = type(AutoConfig.for_model(name))
    model = AutoModelForCausalLM.from_config(config_class(**CONFIGS[name] | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model
