"""Compiled in one graph, every path gives what it gives uncompiled; exported, for every batch and length."""

import pytest
import torch
from tiny_models import IMAGE_SIZE, build_model
from transformers import CompileConfig

COMPILED = {"fullgraph": True, "backend": "eager"}
SEVERAL = {"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Three images, three texts of up to 7 tokens, and as prompts after their image."""
    torch.manual_seed(0)
    ids = torch.randint(2, 300, (3, 7))
    return {
        "pixel_values": torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": ids,
        "attention_mask": (torch.arange(7) < torch.tensor([[7], [5], [3]])).long(),
        "prompt": torch.cat([torch.ones(3, 4, dtype=torch.long), ids], dim=1),
        "boxes": torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]]] * 3),
    }


# The forward pass of pairs runs `get_image_features` and `get_text_features`, that of images the former.
PATHS = {
    "boxes": lambda model, x: model.get_image_features(x["pixel_values"], x["boxes"]).pooler_output,
    "fused": lambda model, x: model.get_multimodal_features(x["prompt"], None, x["pixel_values"]).pooler_output,
    "forward of a text": lambda model, x: model(input_ids=x["input_ids"]).logits,
    "forward of pairs": lambda model, x: model(x["input_ids"], x["pixel_values"], x["attention_mask"]).logits_per_text,
}
PATHS_OF_SEVERAL = {
    "text": lambda model, x: model.get_text_features(x["input_ids"], x["attention_mask"]).pooler_output,
    "forward of images": lambda model, x: model(pixel_values=x["pixel_values"]).pooler_output,
}


@pytest.mark.parametrize("path", [*PATHS, *PATHS_OF_SEVERAL])
@torch.no_grad()
def test_full_graph_gives_the_same(path, inputs):
    model, run = build_model(layers=1, **({} if path in PATHS else SEVERAL)), (PATHS | PATHS_OF_SEVERAL)[path]
    assert type(model)._can_compile_fullgraph
    compiled = torch.compile(lambda x: run(model, x), **COMPILED)
    torch.testing.assert_close(compiled(inputs), run(model, inputs))


@torch.no_grad()
def test_graph_of_prompts_gives_the_same_and_refuses_texts_that_are_only_compared(inputs):
    model = build_model(layers=1)

    def loss(ids):
        return model(ids, inputs["pixel_values"], labels=ids).loss

    compiled = torch.compile(loss, **COMPILED)
    torch.testing.assert_close(compiled(inputs["prompt"]), loss(inputs["prompt"]))
    with pytest.raises(RuntimeError):
        compiled(inputs["prompt"] + 1)


def test_compiled_generation_writes_the_same(inputs):
    model = build_model(layers=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(inputs["prompt"])}
    settings |= {"input_ids": inputs["prompt"], "pixel_values": inputs["pixel_values"]}
    compile_config = CompileConfig(**COMPILED, mode=None)
    compile_config._compile_all_devices = True
    written = model.generate(**settings, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(written, model.generate(**settings))


@torch.no_grad()
def test_exported_program_takes_every_batch_and_length(inputs):
    class Vectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_model(layers=1, **SEVERAL)

        def forward(self, pixel_values, input_ids, attention_mask):
            images, texts = self.model.get_image_features(pixel_values), self.model.get_text_features
            return images.pooler_output, texts(input_ids, attention_mask).pooler_output

    module, dynamic = Vectors(), torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: dynamic}} | dict.fromkeys(["input_ids", "attention_mask"], {0: dynamic, 1: dynamic})
    given = [inputs[name] for name in shapes]
    program = torch.export.export(module.eval(), tuple(given), dynamic_shapes=shapes).module()
    others = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(2, 300, (2, 90)), torch.ones(2, 90).long()
    for arguments in (given, others):
        for actual, expected in zip(program(*arguments), module(*arguments)):
            torch.testing.assert_close(actual, expected)
