"""What `pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer` of version 1.2 makes of captions, recorded with Java."""

import pytest

from mmgem.training.evaluation.caption_words import caption_words

RECORDED = [
    ("A man's dog isn't here .", "a man 's dog is n't here"),
    ("Two girls' toys; it's 5:30 p.m. (really)", "two girls toys it 's 5:30 p.m. -lrb- really -rrb-"),
    ('He said "hello" & left', "he said hello & left"),
    ("A t-shirt, 3.5 miles, 1/2 price $5 50% #1", "a t-shirt 3.5 miles 1/2 price $ 5 50 % # 1"),
    ("can't won't cannot gonna I'm they've we'd she'll", "ca n't wo n't can not gon na i 'm they 've we 'd she 'll"),
    ("U.S. flag... on Mr. Smith's house!", "u.s. flag on mr. smith 's house"),
    ("a 10-year-old -- boy", "a 10-year-old boy"),
    ("café naïve", "café naïve"),
    ("email me@x.com", "email me@x.com"),
    ("black/white dog", "black/white dog"),
    ("A dog.", "a dog"),
    ("the '90s car", "the '90s car"),
    ("An x-ray 's", "an x-ray 's"),
    ("wanna gimme", "wan na gim me"),
    ("don’t “quote”", "do n't quote"),
    ("O'Neil", "o'neil"),
    ("2nd 3rd", "2nd 3rd"),
    ("a b/c d", "a b/c d"),
    ("a_b", "a_b"),
    ("half-naked", "half-naked"),
    ("e.g. dogs", "e.g. dogs"),
    ("no. 5", "no. 5"),
    ("St. Bernard", "st. bernard"),
    ("vs. them", "vs. them"),
    ("A.J.", "a.j."),
    ("i.e. cats", "i.e. cats"),
    ("one.two", "one.two"),
]


@pytest.mark.parametrize(("text", "words"), RECORDED)
def test_words_are_those_of_the_reference_implementation(text, words):
    assert caption_words(text) == words


def test_other_languages_have_words_too():
    assert caption_words("Zwei Hunde spielen auf der Straße.") == "zwei hunde spielen auf der straße"
    assert caption_words("两只狗在路上打架。") == "两只狗在路上打架"
    assert caption_words("...") == caption_words("") == ""
