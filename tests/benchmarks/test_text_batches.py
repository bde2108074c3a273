from benchmarks.text_batches import BATCH_TOKENS, HEADER, compare, embed_by_size, make_texts


def test_the_modes_embed_the_same_texts(tiny_model, tiny_processor):
    texts = make_texts(70)
    assert len(embed_by_size(tiny_model, tiny_processor, texts)) == len(texts) == len(set(texts))
    assert {5, 60} <= {len(text.split()) for text in make_texts(1000)}
    table = compare(tiny_model, tiny_processor, 70, 2).splitlines()
    assert len(table) == 2 + 2 + len(BATCH_TOKENS) and table[0].count("|") == len(HEADER) + 1
    assert table[2].split("|")[3].strip() == "1.00"
