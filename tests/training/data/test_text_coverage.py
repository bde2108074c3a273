"""Languages that a tokenizer does not cover are measured, and said."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmgem.training.data.text_coverage import Coverage, measure_coverage, warn_uncovered

ZH, EN = "两只狗在跑", "two dogs run"


def bytes_tokenizer():
    """As a byte-level BPE without any merge: a token for each byte."""
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words_tokenizer():
    vocab = {"[UNK]": 0, "two": 1, "dogs": 2, "run": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_coverage_counts_bytes_and_unknown_words():
    assert measure_coverage(bytes_tokenizer(), [ZH, ZH]) == Coverage(3.0, 0.0)
    assert measure_coverage(words_tokenizer(), [EN]) == Coverage(3 / 12, 0.0)
    assert measure_coverage(words_tokenizer(), [EN, "two cats run"]).unknown == pytest.approx(1 / 6)
    assert Coverage(1.0, 0.05).is_enough and not Coverage(1.1, 0.0).is_enough and not Coverage(0.3, 0.1).is_enough


def test_only_columns_that_are_not_covered_are_warned_of(caplog):
    rows = [{"caption": EN, "captions_zh": [ZH], "queries": [EN, ZH], "captions_de": None, "label": ZH}] * 2
    rows += [{"caption": EN, "captions_de": 5}, {"caption": EN, "captions_de": ZH}]  # which evaluation leaves out
    with caplog.at_level(logging.WARNING):
        measured = warn_uncovered(words_tokenizer(), rows, "photos")
    assert set(measured) == {"captions", "captions_zh", "queries"} and measured["captions"].is_enough
    assert [record.getMessage().partition(" has ")[0] for record in caplog.records] == [
        "`captions_zh` of photos",
        "`queries` of photos",
    ]
    assert "100% unknown" in caplog.text
