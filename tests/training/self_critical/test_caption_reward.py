import pytest
import torch

from mmgem.training.evaluation.metrics import cider
from mmgem.training.self_critical.caption_reward import CaptionReward

REFERENCES = [
    ["A dog runs over the grass.", "A brown dog is running."],
    ["Two children play in the water.", "Children splash in a pool.", "Kids swim."],
    ["A man climbs a rock.", "A climber on a steep rock."],
]
CAPTIONS = ["a dog dog dog runs over a rock", "two children in the water", "kids"]


def test_it_is_cider_of_the_corpus_with_ends_as_words():
    pytest.importorskip("pycocoevalcap")
    reward = CaptionReward(REFERENCES)
    ended = [[f"{caption} end" for caption in own] for own in REFERENCES]
    expected = cider([f"{caption} end" for caption in CAPTIONS], ended).values
    rewards = [reward([caption], [True], own)[0] for caption, own in zip(CAPTIONS, REFERENCES, strict=True)]
    torch.testing.assert_close(torch.tensor(rewards, dtype=torch.float64), expected)


def test_a_caption_without_an_end_has_less():
    reward = CaptionReward(REFERENCES)
    whole, cut = reward(["a dog runs over the grass"] * 2, [True, False], REFERENCES[0][:1])
    assert whole == pytest.approx(10) and cut < 10
    assert reward([""], [False], REFERENCES[0]) == [0.0]


def test_words_weigh_by_the_corpus_and_not_by_what_is_compared():
    rare, common = (CaptionReward([["a dog"], *[[other]] * 8]) for other in ("a cat", "a dog runs"))
    assert rare(["dog"], [False], ["dog"]) != common(["dog"], [False], ["dog"]) == [0.0]
    with pytest.raises(ValueError, match="`corpus` has captions of 1 images; expected 2 or more"):
        CaptionReward([["a dog"]])
