import pytest
from tiny_models import TEXT_CONFIGS, VISION_CONFIGS

from mmgem.configuration_mmgem import MMGEMConfig


def build_config(**changes):
    towers = {"vision_config": VISION_CONFIGS["siglip"]().to_dict(), "text_config": TEXT_CONFIGS["llama"]().to_dict()}
    return MMGEMConfig(**(towers | changes))


def test_save_and_load(tmp_path):
    config = build_config(num_visual_tokens=25, num_embedding_tokens=4, embedding_pooling="mean")
    config.save_pretrained(tmp_path)
    loaded = MMGEMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.vision_config.model_type == "siglip_vision_model" and loaded.text_config.hidden_size == 32


def test_every_way_in_leads_to_the_one_model_class():
    config = build_config()
    for auto_class in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForZeroShotImageClassification"):
        assert config.auto_map[auto_class] == "modeling_mmgem.MMGEMModel"
    assert config.custom_pipelines["image-to-text"]["impl"] == "pipeline_mmgem.MMGEMImageToTextPipeline"


def test_tied_heads_are_told_to_the_library():
    assert build_config().tie_word_embeddings  # of the language model
    assert not build_config(text_config=TEXT_CONFIGS["qwen3"]().to_dict()).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visual_tokens": 15}, "`num_visual_tokens` is 15; expected a square"),
        ({"aggregator_size": 0}, "`aggregator_size` is 0; expected 1 or more"),
        ({"num_visual_tokens": 0}, "`num_visual_tokens` is 0; expected a square"),
        ({"num_embedding_tokens": 0}, "`num_embedding_tokens` is 0; expected a whole number of at least 1"),
        ({"projection_dim": -3}, "`projection_dim` is -3"),
        ({"image_token_id": -1}, "`image_token_id` is -1"),
        ({"logit_scale_init_value": 5.0}, "`logit_scale_init_value` is 5.0; expected at most ln 100"),
        ({"image_token_id": 300}, "`image_token_id` is 300; expected one of the 300 tokens"),
        ({"vision_grid": {"layout": "rows"}}, "`vision_grid` is {'layout': 'rows'}"),
        ({"embedding_pooling": "max"}, "embedding_pooling.*max"),
        ({"text_attention": "sideways"}, "text_attention.*sideways"),
        ({"projection_dim": "wide"}, "projection_dim.*wide"),
    ],
)
def test_values_that_make_no_sense_are_named(change, message):
    with pytest.raises(Exception, match=r"(?s)" + message) as error:
        build_config(**change)
    assert isinstance(error.value, (ValueError, TypeError)) or "Validation" in type(error.value).__name__
