import torch
from sentence_transformers import SentenceTransformer

from benchmarks.text_batches import (
    BATCH_TOKENS,
    ENCODE_BATCH_SIZES,
    HEADER,
    compare,
    embed_by_size,
    embed_ready,
    make_texts,
)
from mmgem.processing import save_sentence_transformer


def test_the_modes_embed_the_same_texts(tiny_model, tiny_processor, tmp_path):
    texts = make_texts(70)
    embeds = embed_by_size(tiny_model, tiny_processor, texts)
    assert len(embeds) == len(texts) == len(set(texts))
    assert {5, 60} <= {len(text.split()) for text in make_texts(1000)}
    ready = embed_ready(
        tiny_model, [tiny_processor(text=texts[start : start + 7], return_tensors="pt") for start in (0, 7)]
    )
    torch.testing.assert_close(ready, embeds[:14])
    save_sentence_transformer(tiny_model, tiny_processor, tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    table = compare(encoder, 70, 2).splitlines()
    assert len(table) == 2 + 2 + len(BATCH_TOKENS) + len(ENCODE_BATCH_SIZES) + 1
    assert table[0].count("|") == len(HEADER) + 1
    assert table[2].split("|")[3].strip() == "1.00"
