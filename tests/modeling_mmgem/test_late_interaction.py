"""MaxSim and the vectors it compares."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_model

from mmgem.image_vectors import ImageVectors
from mmgem.late_interaction import maxsim, similarity


def vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_maxsim_is_brute_force():
    queries, documents = vectors(3, 4, 8), vectors(5, 6, 8, seed=1)
    expected = [
        [sum(max(float(q @ d) for d in document) for q in query) / len(query) for document in documents]
        for query in queries
    ]
    torch.testing.assert_close(maxsim(queries, documents), torch.tensor(expected))


def test_an_input_is_most_similar_to_itself_and_scores_1():
    scores = maxsim(vectors(4, 3, 8), vectors(4, 3, 8))
    torch.testing.assert_close(scores.diagonal(), torch.ones(4))
    assert (scores.argmax(dim=1) == torch.arange(4)).all()


def test_of_one_vector_maxsim_is_the_cosine():
    queries, documents = vectors(3, 1, 8), vectors(5, 1, 8, seed=1)
    torch.testing.assert_close(similarity(queries, documents), similarity(queries[:, 0], documents[:, 0]))


def test_order_and_copies_of_document_vectors_do_not_matter():
    queries, documents = vectors(3, 4, 8), vectors(5, 6, 8, seed=1)
    changed = torch.cat([documents.flip(1), documents[:, :2]], dim=1)
    torch.testing.assert_close(maxsim(queries, changed), maxsim(queries, documents))


@pytest.mark.parametrize("shapes", [((2, 8), (3, 4, 8)), ((2, 4, 8), (3, 4, 6)), ((8,), (3, 8))])
def test_embeddings_of_different_kinds_are_refused(shapes):
    with pytest.raises(ValueError, match="`query_embeds`.*expected"):
        similarity(vectors(*shapes[0]), vectors(*shapes[1]))


def test_untrained_image_vectors_are_the_mean_of_the_tokens():
    model = build_model(num_embedding_tokens=4, embedding_pooling="multi_vector")
    fresh = ImageVectors(32, 4, 4)
    torch.nn.init.zeros_(fresh.output.weight)
    torch.nn.init.zeros_(fresh.output.bias)
    torch.nn.init.normal_(fresh.queries)
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(fresh(tokens), tokens.mean(1, keepdim=True).expand(-1, 4, -1))
    # as those of a new model are
    assert not model.image_vectors.output.weight.any() and model.image_vectors.queries.any()


def attending(num_vectors: int) -> ImageVectors:
    torch.manual_seed(0)
    module = ImageVectors(32, 4, num_vectors)
    torch.nn.init.normal_(module.queries)
    return module


def test_the_first_image_vectors_do_not_know_of_the_others():
    many, few = attending(4), attending(4)
    few.queries = torch.nn.Parameter(few.queries[:2].detach())
    tokens = torch.randn(2, 3, 9, 32)
    torch.testing.assert_close(many(tokens)[:, :, :2], few(tokens))
    assert many(tokens).shape == (2, 3, 4, 32)


def test_image_vectors_are_plain_attention_of_each_head():
    module, tokens = attending(3), torch.randn(2, 9, 32)
    key, value = module.key_value(module.norm(tokens)).chunk(2, dim=-1)
    found = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        weights = (module.queries[:, part] @ key[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
        found.append(weights @ value[..., part])
    expected = tokens.mean(1, keepdim=True) + module.output(torch.cat(found, dim=-1))
    torch.testing.assert_close(module(tokens), expected)
