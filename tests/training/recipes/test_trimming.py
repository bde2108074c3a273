import copy
import json

import pytest
import torch
from gguf_files import write_gguf
from tiny_models import TEXT_CONFIGS, build_towers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, SiglipImageProcessorPil

from mmgem.training.data.mixture import Mixture
from mmgem.training.data.sources import DatasetSource
from mmgem.training.recipes.recipe import parse_recipe
from mmgem.training.recipes.starting_model import build_model
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.recipes.trimming import keep_first_layers, trim_tokenizer, trim_vocabulary, with_first_layers
from mmgem.training.recipes.validation import check_sections, check_stages

TEXTS = ["two dogs run through the field", "ein kleines Mädchen klettert", "两只狗在路上打架", "a dog and a girl"]
OTHERS = ["thirty trains threw thistles", "größere Straßen", "白色的房子", "völlig anders", "\x00 \U0001f436"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((TEXTS + OTHERS) * 9, vocab_size=500, model_max_length=99)


@pytest.fixture(scope="module")
def trimmed(tokenizer):
    return trim_tokenizer(tokenizer, TEXTS, 340)


def test_texts_whose_tokens_stay_are_cut_as_before_and_others_can_still_be_written(tokenizer, trimmed):
    small, old_ids = trimmed
    assert 258 < len(small) == len(old_ids) <= 340 < len(tokenizer)
    same = 0
    for text in [*TEXTS, *OTHERS, *(word for text in TEXTS + OTHERS for word in text.split())]:
        before, after = tokenizer(text)["input_ids"], small(text)["input_ids"]
        assert small.decode(after) == tokenizer.decode(before)
        if set(before) <= set(old_ids):
            assert [old_ids[token] for token in after] == before
            same += 1
        else:
            assert len(after) > len(before)
    assert same >= len(TEXTS)


def test_of_too_many_tokens_the_frequent_ones_stay_with_what_they_are_merged_from(tokenizer):
    texts = ["two dogs"] * 9 + TEXTS
    room = trim_tokenizer(tokenizer, ["two dogs"], 500)[1]
    small, old_ids = trim_tokenizer(tokenizer, texts, len(room))
    assert len(old_ids) <= len(room) and len(small("two dogs")["input_ids"]) == len(tokenizer("two dogs")["input_ids"])
    merges = json.loads(small.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = small.get_vocab()
    assert merges and all({left, right, left + right} <= vocabulary.keys() for left, right in merges)


def test_a_trimmed_tokenizer_is_the_same_once_saved(trimmed, tmp_path):
    small, _ = trimmed
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [small(text)["input_ids"] for text in TEXTS]
    assert loaded.eos_token_id == small.eos_token_id == small.get_vocab()["<|endoftext|>"]


def test_tokens_beside_the_vocabulary_and_those_of_a_post_processor_move_along():
    letters = {letter: number for number, letter in enumerate("abcdefgh")}
    vocabulary = letters | {"ab": 8, "cd": 9, "abcd": 10, "ef": 11}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 12)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    small, old_ids = trim_tokenizer(tokenizer, ["efab"], 11)
    assert old_ids == [*range(8), 8, 11, 12] and small.bos_token_id == 10
    assert small("efab")["input_ids"] == [10, 9, 8] and small.convert_ids_to_tokens([10, 9, 8]) == ["<s>", "ef", "ab"]
    assert small("abcd")["input_ids"] == [10, 8, 2, 3]


def test_the_model_says_of_the_words_that_stay_what_it_said(tokenizer, trimmed):
    small, old_ids = trimmed
    for name in ("llama", "gpt2"):
        config = TEXT_CONFIGS[name]()
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        whole = copy.deepcopy(model)
        model.generation_config.eos_token_id = [0, 499]
        trim_vocabulary(model, old_ids)
        ids = torch.tensor([small(TEXTS[0])["input_ids"]])
        expected = whole(torch.tensor(old_ids)[ids]).logits[..., old_ids]
        torch.testing.assert_close(model(ids).logits, expected)
        assert model.config.vocab_size == len(old_ids) == model.get_input_embeddings().num_embeddings
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.config.eos_token_id == old_ids.index(0) and model.generation_config.eos_token_id == [0]


def test_what_is_no_bpe_and_too_small_a_vocabulary_are_refused(tokenizer):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="type WordLevel; expected a BPE"):
        trim_tokenizer(words, TEXTS, 400)
    with pytest.raises(ValueError, match="`trim_vocabulary` is 100; expected at least 258"):
        trim_tokenizer(tokenizer, TEXTS, 100)


@pytest.mark.parametrize("text", ["llama", "gpt2", "gemma3"])
def test_the_first_layers_do_what_they_did(text):
    _, model = build_towers(text=text)
    cut = keep_first_layers(model, 1).eval()
    assert cut.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    ids = torch.arange(2, 40)[None]
    states = [each(ids, output_hidden_states=True).hidden_states[1] for each in (model, cut)]
    # Those of a last layer come after the norm.
    norm = next(m for m in reversed(list(cut.get_decoder().modules())) if getattr(m, "weight", None) is not None)
    torch.testing.assert_close(norm(states[0]), states[1])
    whole = keep_first_layers(model, 2)
    torch.testing.assert_close(whole(ids).logits, model(ids).logits)


def test_logits_after_fewer_layers_are_calm():
    _, model = build_towers(text="llama")
    with torch.no_grad():
        model.model.norm.weight *= 500
        logits = keep_first_layers(model, 1)(torch.randint(2, 300, (4, 50))).logits
        assert model(torch.randint(2, 300, (4, 50))).logits.std() > 10
    assert 0.5 < logits.std() < 2


@pytest.mark.parametrize("number", [0, 3])
def test_more_layers_than_there_are_or_none_are_refused(number):
    with pytest.raises(ValueError, match=f"`num_hidden_layers` is {number}; expected 1 to 2, those of the `llama`"):
        with_first_layers(TEXT_CONFIGS["llama"](), number)


def test_a_recipe_starts_from_a_part_of_a_language_model(tmp_path):
    vision, _ = build_towers()
    vision.save_pretrained(tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    write_gguf(tmp_path / "tiny.gguf", num_layers=3)
    model = {"vision": str(tmp_path / "vision"), "text": str(tmp_path), "gguf_file": "tiny.gguf"}
    model |= {"num_hidden_layers": 2, "trim_vocabulary": 258, "num_visual_tokens": 4, "aggregator_size": 8}
    stage = {"name": "align", "train_data": {"scenes": {"seed": 5, "count": 2}}, "training": {}}
    recipe = parse_recipe({"model": model, "stages": [stage]})
    check_sections(recipe)
    check_stages(recipe)
    source = DatasetSource([{"captions": ["a dog"], "image": "unread.png"}, {"captions": [""]}])
    built, processor = build_model(recipe, Mixture([source], None, 0, 1))
    assert built.config.text_config.num_hidden_layers == len(built.language_model.model.layers) == 2
    assert built.config.text_config.vocab_size == 259 == len(processor.tokenizer)  # with <image>
    assert processor.image_token_id == 258 and processor.is_plain
    batch = processor(images=[torch.zeros(3, 32, 32)], text=["a dog"], return_tensors="pt")
    assert built(**batch, return_loss=True).loss.isfinite()
    for key, value in {"num_hidden_layers": "2", "trim_vocabulary": 1.5}.items():
        with pytest.raises(ValueError, match=f"`{key}` in `model`"):
            parse_recipe({"model": model | {key: value}, "stages": [stage]})
