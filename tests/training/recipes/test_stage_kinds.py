"""A kind of stage is a class and a line in a table: everything that a run asks of a stage, it asks the kind."""

import pytest
from huggingface_hub import ModelCard
from tiny_models import build_model

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.recipes.model_card import describe_measure, write_model_card
from mmgem.training.recipes.recipe import parse_recipe
from mmgem.training.recipes.stage import stage_arguments, stage_trainer
from mmgem.training.recipes.stage_kinds import STAGE_KINDS, StageKind
from mmgem.training.recipes.validation import check_sections, check_stages
from mmgem.training.trainer.trainer import MMGEMTrainer

SCENES = {"scenes": {"seed": 1, "count": 8}}


class CaptionStage(StageKind):
    model_class = MMGEMModel
    losses = {"caption_loss": "loss of what it says"}

    def check(self):
        if self.stage.options != {"loud": True}:
            raise ValueError(f"`captions` of stage `{self.stage.name}` is {self.stage.options}; expected `loud`.")

    def arguments(self):
        return {"contrastive_loss_weight": 0.0}

    def trainer(self, model, arguments, processor, collator, train_dataset, eval_dataset=None):
        return MMGEMTrainer(model, arguments, processor, collator, train_dataset=train_dataset)

    def try_on_meta(self, model):
        raise ValueError(f"tried on {model.device.type}")

    def preview(self, batch):
        raise NotImplementedError


@pytest.fixture
def sections(monkeypatch, tmp_path):
    monkeypatch.setitem(STAGE_KINDS, "captions", f"{__name__}.CaptionStage")
    build_model().save_pretrained(tmp_path)
    stage = {"name": "say", "train_data": SCENES, "captions": {"loud": True}, "training": {"use_cpu": True}}
    return {"model": {"pretrained": str(tmp_path)}, "stages": [stage]}


def test_a_recipe_reads_and_checks_the_section_of_a_kind(sections):
    recipe = parse_recipe(sections)
    assert recipe.stages[0].kind == "captions" and recipe.stages[0].options == {"loud": True}
    check_sections(recipe)
    with pytest.raises(ValueError, match="stage `say`: tried on meta"):
        check_stages(recipe)
    sections["stages"][0]["captions"] = {}
    with pytest.raises(ValueError, match="`captions` of stage `say` is {}; expected `loud`"):
        check_sections(parse_recipe(sections))
    sections["stages"][0]["objective"] = {}
    with pytest.raises(ValueError, match="`captions` and `objective` of stage `say` exclude each other"):
        parse_recipe(sections)


def test_a_kind_chooses_the_arguments_the_trainer_and_the_words_of_the_card(sections, tiny_processor, tmp_path):
    prompts = {"query": "Find ", "document": "Keep "}
    recipe = parse_recipe(sections | {"prompts": prompts})
    [stage] = recipe.stages
    arguments = stage_arguments(recipe, stage, tmp_path)
    assert arguments.contrastive_loss_weight == 0
    model = build_model()
    trainer = stage_trainer(recipe, stage, model, tiny_processor, arguments, [])
    assert type(trainer) is MMGEMTrainer and trainer.data_collator.prompts == model.config.prompts == prompts
    write_model_card(tmp_path, model, recipe, {}, [{"stage": "say", "caption_loss": 0.5}])
    assert "The loss of what it says ended at 0.500." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"scenes": {"seed": 1, "count": 5}}, "5 drawn scenes of seed 1"),
        ({"folder": "photos/held-out"}, "photos/held-out"),
        (
            {"dataset": "nlphuji/flickr30k", "split": "test", "columns": {"captions": "caption"}},
            "nlphuji/flickr30k, test",
        ),
    ],
)
def test_the_card_calls_the_data_by_its_name(sections, section, name, tmp_path):
    recipe = parse_recipe(sections | {"eval_data": section})
    model = build_model(num_embedding_tokens=2, embedding_pooling="multi_vector")
    write_model_card(tmp_path, model, recipe, {"text_to_image_recall@1": 0.5}, [])
    card = ModelCard.load(tmp_path / "README.md")
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == (name, 0.5)
    assert {"multi-vector", "feature-extraction"} <= set(card.data.tags)
    assert f"Measured on {name}." in card.text and "a query may be a text or an image" in card.text
    assert "| text_to_image_recall@1 | 0.500 | every caption searches the images |" in card.text


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("image_to_text_recall@10", "every image searches the captions; any of its own is right"),
        ("text_to_image_recall@5_de", "as above, in another language, such as `captions_de`"),
        ("bleu4", "CIDEr-D and BLEU-4 of generated captions, by pycocoevalcap"),
        ("recall@1", ""),
    ],
)
def test_the_card_says_what_its_figures_are(name, description):
    assert describe_measure(name) == description
