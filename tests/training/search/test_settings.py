import pytest
import torch
from image_folders import build_multi_vector_model
from tiny_models import build_model

from mmgem.training.search.settings import IndexSettings

ASKED = {"vectors": None, "dimensions": None, "precision": "float32", "memory": False}


def settle(model, **asked):
    return IndexSettings.settle(model, **{**ASKED, **asked})


def test_by_default_all_is_kept_that_the_model_gives():
    single, several = build_model(num_embedding_tokens=3, embedding_pooling="mean"), build_multi_vector_model(4)
    assert settle(single) == IndexSettings(None, 16, "float32", None)
    assert settle(several) == IndexSettings(4, 16, "float32", None)
    assert settle(single, memory=True).memory == 3
    assert settle(single, memory=1).memory == 1
    assert settle(build_model(embedding_prompt_ids=[5, 6])).dimensions == 32  # the width of the language model


def test_what_the_model_does_not_give_is_refused():
    single, several = build_model(), build_multi_vector_model(4)
    for model, asked, message in [
        (single, {"vectors": 1}, "`vectors` is 1, but the model gives a single vector"),
        (several, {"vectors": 0}, "`vectors` is 0; expected 1 to 4"),
        (several, {"vectors": 5}, "`vectors` is 5; expected 1 to 4"),
        (single, {"dimensions": 0}, "`dimensions` is 0; expected 1 to 16"),
        (single, {"dimensions": 17}, "`dimensions` is 17; expected 1 to 16"),
        (single, {"precision": "int4"}, "`precision` is 'int4'; expected one of float32, int8, binary"),
        (single, {"memory": 2}, "`memory` is 2; expected 1 to 1"),
        (single, {"memory": 0}, "`memory` is 0; expected 1 to 1"),
        (
            build_model(embedding_prompt_ids=[5, 6]),
            {"memory": True},
            "`memory` is True, but",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            settle(model, **asked)


def test_shortened_embeddings_are_the_first_values_of_the_first_vectors_at_unit_length():
    embeddings = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    short = IndexSettings(2, 5, "float32", None).shorten(embeddings)
    torch.testing.assert_close(short * embeddings[:, :2, :5].norm(dim=-1, keepdim=True), embeddings[:, :2, :5])
    torch.testing.assert_close(short.norm(dim=-1), torch.ones(3, 2))
    assert IndexSettings(2, 5, "float32", None).shorten(embeddings, 3).shape == (3, 3, 5)
    single = IndexSettings(None, 5, "float32", None).shorten(embeddings[:, 0])
    torch.testing.assert_close(single, short[:, 0])
