"""The benchmark of the side that asks, in a setting of seconds, on a random model."""

import pytest
import torch
from contrastive_batches import image_batch
from encoders import multi_vector_model

from benchmarks.maxsim_directions import MEASURES, OBJECTIVES, States, TextsAsk, measure, report, train
from mmgem.training.trainer.contrastive_losses import InfoNCE


@pytest.fixture(scope="module")
def states() -> States:
    """Eight images, two texts each, whose states are told apart."""
    config = multi_vector_model().config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, config.num_visual_tokens, config.grid.hidden_size, generator=generator)
    texts = torch.randn(8, config.num_embedding_tokens, config.text_config.hidden_size, generator=generator)
    return States(images, texts, torch.arange(8))


def test_heads_learn_to_find_and_every_side_is_measured(states):
    config = multi_vector_model().config
    groups = [[1, 1], [config.num_embedding_tokens] * 2]
    lines = []
    for asked, objective in OBJECTIVES.items():
        for seed in (0, 1):
            found = measure(train(config, states, objective(vector_groups=groups), seed, steps=40), states)
            assert list(found) == list(MEASURES) and all(0 <= value <= 1 for value in found.values())
            lines.append({"asked": asked, **found})
    assert lines[2]["image to text, the image asks"] == 1
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in report(lines).splitlines()[2:]]
    assert [row[0] for row in rows] == ["texts", "both"] and len(rows[0]) == 1 + len(MEASURES)


@pytest.mark.parametrize(("objective", "asking"), [(TextsAsk, [3, 3]), (InfoNCE, [3, 2])])
def test_who_asks_in_training(objective, asking, monkeypatch):
    vectors, score = [], objective.score

    def recorded(self, query_embeds, document_embeds):
        vectors.append(query_embeds.shape[1])
        return score(self, query_embeds, document_embeds)

    monkeypatch.setattr(objective, "score", recorded)
    objective()(image_batch(torch.randn(4, 2, 8), torch.randn(4, 3, 8)))
    assert vectors == asking
