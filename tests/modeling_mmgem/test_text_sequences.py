"""The texts of a joint step as sequences, against plain loops over lists."""

import random
from types import SimpleNamespace

import pytest
import torch

from mmgem.text_rows import IGNORED_LABEL, TextRows
from mmgem.text_sequences import caption_sequences, count_labels, embedded_sequences, lay_out, recalled_sequences

IMAGE, BOS, EOS, OTHER_END = 9, 2, 3, 4
LENGTHS = {"image": 4, "box": 3, "memory": 2}
NOWHERE = -1


def config(bos, eos):
    return SimpleNamespace(
        image_token_id=IMAGE, text_config=SimpleNamespace(bos_token_id=bos, eos_token_id=eos), num_visual_tokens=4
    )


def some_texts(chance: random.Random, bos, eos) -> list[dict]:
    """Texts with and without [BOS], an end of their own, images, boxes, memories, and labels."""
    texts: list[dict] = []
    for _ in range(chance.randrange(1, 7)):
        tokens = [chance.choice([5, 6, 7, 8]) for _ in range(chance.randrange(5))]
        tokens = [BOS] * chance.randrange(2) + tokens + [chance.choice([EOS, OTHER_END])] * chance.randrange(2)
        text = {"tokens": tokens, "image": chance.choice([NOWHERE, 0, 1]), "box": NOWHERE, "memory": NOWHERE}
        text["fused"] = [chance.choice([NOWHERE, 0, 1]) for _ in range(2)]
        if text["image"] >= 0 and chance.random() < 0.4:
            text["box"] = 0
        if texts and chance.random() < 0.3:
            text["memory"] = chance.randrange(len(texts))
        start = chance.choice([0, 1, 99])  # from where on it is written
        stop = len(tokens) - chance.choice([0, 0, 1])
        text["labels"] = [t if start <= n < stop else IGNORED_LABEL for n, t in enumerate(tokens)]
        texts.append(text)
    return texts


def rows_of(texts: list[dict], side: str) -> TextRows:
    length = max(len(text["tokens"]) for text in texts) + 1

    def padded(values: list[int], with_: int) -> list[int]:
        pads = [with_] * (length - len(values))
        return pads + values if side == "left" else values + pads

    images = torch.tensor([text["image"] for text in texts])
    columns = {
        "input_ids": torch.tensor([padded(text["tokens"], BOS) for text in texts]),
        "attention_mask": torch.tensor([padded([1] * len(text["tokens"]), 0) for text in texts]),
        "labels": torch.tensor([padded(text["labels"], IGNORED_LABEL) for text in texts]),
        "image_index": images,
        "box_index": torch.tensor([text["box"] for text in texts]),
        "fused_index": torch.tensor([text["fused"] for text in texts]),
        "memory_row": torch.tensor([text["memory"] for text in texts]),
        "contrastive_mask": images >= 0,
    }
    return TextRows.from_columns(columns, 2, torch.ones(2, 1, 4))


def laid_out(texts: list[tuple], bos, suffix: list[list[tuple[int, int]]]) -> dict[str, list]:
    """Columns of the tokens of texts, each with its tokens, labels and the lengths of its units."""
    columns: dict[str, list] = {name: [] for name in ("token", "label", "unit", "is_suffix", "is_prompt")}
    lengths, units = [], 0
    for (tokens, labels, of_units), after in zip(texts, suffix, strict=True):
        one = []  # rows of `columns`
        has_places = IMAGE in tokens
        has_bos = bool(tokens) and tokens[0] == bos and not has_places
        if has_bos:
            one.append((bos, IGNORED_LABEL, -1, False, True))
        for length in [] if has_places else of_units:
            one += [(None, IGNORED_LABEL, units, False, True)] * length
            units += 1
        is_prompt = True
        for token, label in list(zip(tokens, labels, strict=True))[int(has_bos) :]:
            is_prompt = is_prompt and label == IGNORED_LABEL
            if token == IMAGE:
                one += [(None, IGNORED_LABEL, units, False, is_prompt)] * of_units[0]
                units += 1
            else:
                one.append((token, label, -1, False, is_prompt))
        one += [(token, label, -1, True, False) for token, label in after]
        lengths.append(len(one))
        for row in one:
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    return columns | {"lengths": lengths}


def written(texts: list[dict], bos, eos) -> dict[str, list]:
    """Of texts that are generated, which know the lengths of their units."""
    ends = eos if isinstance(eos, list) else [eos]
    rows, suffix = [], []
    for text in texts:
        labels, tokens, units = list(text["labels"]), text["tokens"], text["units"]
        if tokens and not units:
            labels[0] = IGNORED_LABEL
        adds_end = eos is not None and not (tokens and tokens[-1] in ends)
        rows.append((tokens, labels, units))
        suffix.append([(ends[0], ends[0] if text["labels"][-1] != IGNORED_LABEL else IGNORED_LABEL)] * adds_end)
    return laid_out(rows, bos, suffix)


def assert_equal(found, expected: dict[str, list]) -> None:
    assert found.lengths.tolist() == expected["lengths"]
    assert found.labels.tolist() == expected["label"] and found.unit.tolist() == expected["unit"]
    assert found.is_suffix.tolist() == expected["is_suffix"] and found.is_prompt.tolist() == expected["is_prompt"]
    assert found.is_prefix.tolist() == [unit >= 0 for unit in expected["unit"]]
    assert [t for t, e in zip(found.token_ids.tolist(), expected["token"], strict=True) if e is not None] == [
        token for token in expected["token"] if token is not None
    ]
    assert found.sequence.tolist() == [n for n, length in enumerate(expected["lengths"]) for _ in range(length)]


def test_one_image_stands_where_its_placeholder_is():
    ids, nothing = torch.tensor([[BOS, 5, IMAGE, 6]]), torch.zeros(1, 0, dtype=torch.long)
    labels, has_unit, length = torch.full_like(ids, IGNORED_LABEL), torch.ones(1, 1).bool(), torch.tensor([3])
    found = lay_out(ids, torch.ones_like(ids), labels, has_unit, length, nothing.bool(), nothing, config(BOS, EOS))
    assert found.unit.tolist() == [-1, -1, 0, 0, 0, -1] and found.lengths.tolist() == [6]


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("eos", [None, EOS, [EOS, OTHER_END]])
def test_sequences_are_those_of_plain_loops(bos, eos):
    chance, settings = random.Random(0), config(bos, eos)
    for number in range(60):
        texts = some_texts(chance, bos, eos)
        rows = rows_of(texts, ("left", "right")[number % 2])
        is_written = [any(label != IGNORED_LABEL for label in text["labels"]) for text in texts]
        captions, recalled = [], []
        for text, flag in zip(texts, is_written, strict=True):
            if flag and text["memory"] >= 0:
                recalled.append(text | {"units": [LENGTHS["memory"]]})
            elif flag:
                kind = "box" if text["box"] >= 0 else "image"
                captions.append(text | {"units": [LENGTHS[kind]] * (text["image"] >= 0)})
        expected = written(captions, bos, eos), written(recalled, bos, eos)
        assert_equal(caption_sequences(rows, LENGTHS["image"], LENGTHS["box"], settings), expected[0])
        assert_equal(recalled_sequences(rows, LENGTHS["memory"], settings), expected[1])
        assert count_labels(rows, settings) == sum(
            label != IGNORED_LABEL for part in expected for label in part["label"]
        )
        embedded = [text for text, flag in zip(texts, rows.is_embedded.tolist(), strict=True) if flag]
        unlabelled = [
            (text["tokens"], [IGNORED_LABEL] * len(text["tokens"]), [4] * sum(n >= 0 for n in text["fused"]))
            for text in embedded
        ]
        end = (max((eos if isinstance(eos, list) else [eos])[0] or 0, 0), IGNORED_LABEL)
        assert_equal(embedded_sequences(rows, 4, 5, settings), laid_out(unlabelled, bos, [[end] * 5] * len(embedded)))


@pytest.mark.parametrize("bos", [None, BOS])
def test_images_stand_at_their_placeholders(bos):
    texts = [[BOS, 5, IMAGE, 6, IMAGE], [IMAGE, IMAGE], [BOS, 5]]
    fused = [[0, 1], [1, 1], [0, -1]]
    given = [
        {"tokens": tokens, "labels": [IGNORED_LABEL] * len(tokens), "image": 0, "box": -1, "memory": -1, "fused": own}
        for tokens, own in zip(texts, fused, strict=True)
    ]
    rows = rows_of(given, "right")
    expected = [(text["tokens"], text["labels"], [4] * sum(n >= 0 for n in text["fused"])) for text in given]
    assert_equal(
        embedded_sequences(rows, 4, 1, config(bos, EOS)), laid_out(expected, bos, [[(EOS, IGNORED_LABEL)]] * 3)
    )
    rows.fused_index[1, 1] = -1
    with pytest.raises(ValueError, match=r"holds \[2, 2, 0\] image placeholders in texts that go with \[2, 1, 1\]"):
        embedded_sequences(rows, 4, 1, config(bos, EOS))
