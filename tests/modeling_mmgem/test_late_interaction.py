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


def build_image_vectors(num_vectors: int) -> ImageVectors:
    torch.manual_seed(0)
    module = ImageVectors(32, num_vectors)
    torch.nn.init.normal_(module.queries, std=3.0)
    return module


def test_the_first_image_vector_is_the_mean_of_the_tokens_and_all_lie_among_them():
    tokens = torch.randn(2, 3, 9, 32)
    found = build_image_vectors(4)(tokens)
    assert found.shape == (2, 3, 4, 32)
    torch.testing.assert_close(found[:, :, 0], tokens.mean(2))
    alike = tokens[:, :, :1].expand(-1, -1, 9, -1)
    torch.testing.assert_close(build_image_vectors(4)(alike), alike[:, :, :4])


def test_the_first_image_vectors_do_not_know_of_the_others():
    many, few = build_image_vectors(4), build_image_vectors(4)
    few.queries = torch.nn.Parameter(few.queries[:1].detach())
    tokens = torch.randn(2, 3, 9, 32)
    torch.testing.assert_close(many(tokens)[:, :, :2], few(tokens))


def test_each_query_takes_its_share_of_what_those_before_it_left():
    module, tokens = build_image_vectors(4), torch.randn(9, 32)
    keys, left, expected = module.key(module.norm(tokens)), torch.ones(9), [tokens.mean(0)]
    for query in module.queries:
        taken = left * (keys @ query / 32**0.5).sigmoid()
        expected.append((taken / taken.sum()) @ tokens)
        left = left - taken
    torch.testing.assert_close(module(tokens), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_equal_queries_look_at_different_places():
    module, tokens = build_image_vectors(3), torch.eye(9, 32)
    module.queries.data[:] = 10 * module.key(module.norm(tokens))[4].detach()  # all ask for the fifth token most
    _, first, second = module(tokens)[:, :9]  # the weights, as these tokens are unit vectors
    assert first.argmax() == 4 and second.argmin() == 4


@pytest.mark.parametrize("name", ["query_embeds", "document_embeds"])
def test_what_is_no_vectors_is_refused_by_its_name(name):
    sides = {"query_embeds": vectors(2, 3), "document_embeds": vectors(2, 3)}
    with pytest.raises(TypeError, match=f"`{name}` is a list; expected a tensor"):
        similarity(**sides | {name: [[1.0]]})
    for shape in [(2, 0), (2, 0, 3)]:
        other = (2, 3) if len(shape) == 2 else (2, 1, 3)
        sides = {"query_embeds": torch.zeros(other), "document_embeds": torch.zeros(other)}
        with pytest.raises(ValueError, match="expected vectors with at least one number"):
            similarity(**sides | {name: torch.zeros(shape)})


@pytest.mark.parametrize("make", ["config", "set_embedding_tokens"])
def test_vectors_of_a_new_model_differ(make):
    torch.manual_seed(0)
    several = {"num_embedding_tokens": 4, "embedding_pooling": "multi_vector"}
    model = build_model(num_visual_tokens=9, **several if make == "config" else {})
    if make == "set_embedding_tokens":
        model.set_embedding_tokens(**several)
    tokens = F.normalize(torch.randn(64, 9, 32), dim=-1)
    found = F.normalize(model.image_vectors(tokens), dim=-1)  # (64, 4, 32)
    alike = (found @ found.mT).mean(0)  # (4, 4)
    assert alike.fill_diagonal_(0).max() < 0.8
    embedding_tokens = F.normalize(model.embedding_tokens, dim=-1)
    assert (embedding_tokens @ embedding_tokens.T).fill_diagonal_(0).max() < 0.7
