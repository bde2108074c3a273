from types import SimpleNamespace

import pytest
import self_critical_step
import torch
from one_step import rows
from self_critical_step import gradient_of_one_step, parts
from tiny_models import build_model
from torchrun import assert_both_step, run_on_two

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.self_critical.trainer import SelfCritical, SelfCriticalTrainer, check_can_draw
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.trainer import MMGEMTrainer


def reward_of_a(captions, are_whole, references):
    """The more "a" the better, whatever the image."""
    return [float(caption.count("a")) for caption in captions]


def build_trainer(processor, folder, reward=reward_of_a, options=None, model=None, **arguments):
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    return SelfCriticalTrainer(
        build_model() if model is None else model,
        MMGEMTrainingArguments(output_dir=str(folder), **fixed | arguments),
        processor,
        reward=reward,
        options=SelfCritical(max_new_tokens=6) if options is None else options,
        train_dataset=rows(),
    )


def batch_of(trainer):
    return trainer._prepare_inputs(trainer.data_collator(rows()))


def test_the_gradient_is_that_of_the_expected_reward(tiny_processor, tmp_path):
    """With one token, the expectation is a sum over the vocabulary."""
    worth = torch.randn(len(tiny_processor.tokenizer), generator=torch.Generator().manual_seed(0))
    texts = tiny_processor.tokenizer.batch_decode(torch.arange(len(worth))[:, None], skip_special_tokens=True)
    value_of_text = dict(zip(texts, worth.tolist(), strict=True))
    value = torch.tensor([value_of_text[text] for text in texts])

    trainer = build_trainer(
        tiny_processor,
        tmp_path,
        lambda captions, are_whole, references: [value_of_text[caption] for caption in captions],
        SelfCritical(captions_drawn=4000, max_new_tokens=1, temperature=0.5),
    )
    model = trainer.model
    tokens = model.get_image_features(batch_of(trainer)["pixel_values"][:2]).last_hidden_state.detach()
    head = [*model.token_projection.parameters()]
    actual = torch.autograd.grad(trainer._negative_reward(tokens, tokens[:, 0], [["a"], ["b"]]), head)
    prompt_ids = trainer._prompt_ids().repeat(2, 1)
    logits = model(input_ids=prompt_ids, visual_tokens=tokens).logits[:, -1]
    logits = logits.index_fill(1, torch.tensor([model.config.image_token_id]), -torch.inf)
    expected = torch.autograd.grad(-((2 * logits).softmax(-1) * value).sum(), head)
    for own, other in zip(actual, expected, strict=True):
        assert torch.cosine_similarity(own.flatten(), other.flatten(), dim=0) > 0.98
        assert own.norm() / other.norm() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_captions_are_drawn_from_what_the_loss_thinks_of_them(tiny_processor, tmp_path, lora):
    """Whatever the model usually writes, and the prompt is that of captions."""
    trainer = build_trainer(
        tiny_processor, tmp_path, options=SelfCritical(temperature=0.5, max_new_tokens=2), lora=lora
    )
    model = trainer.model
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=1, min_new_tokens=4, temperature=0.01)
    usual = model.generation_config
    images = [row["image"] for row in rows()]
    inputs = tiny_processor(
        images=images, text=[tiny_processor.prompt()] * 4, return_tensors="pt", **tiny_processor.prompt_kwargs
    )
    assert torch.equal(trainer._prompt_ids(), inputs["input_ids"][0])
    tokens = model.get_image_features(inputs["pixel_values"][:1]).last_hidden_state
    first = trainer._draw(inputs["input_ids"][:1].repeat(6000, 1), tokens.expand(6000, -1, -1))[:, 0]
    logits = model(input_ids=inputs["input_ids"][:1], visual_tokens=tokens).logits[0, -1]
    logits[model.config.image_token_id] = -torch.inf  # would ask for another image
    shares = first.bincount(minlength=len(logits)) / len(first)
    torch.testing.assert_close(shares, (2 * logits).softmax(-1), atol=0.02, rtol=0)
    assert model.generation_config is usual


def test_what_is_alike_teaches_nothing_and_ends_are_ends(tiny_processor, tmp_path):
    seen = []

    def reward(captions, are_whole, references):
        seen.append((captions, are_whole))
        return [1.0] * len(captions)

    trainer = build_trainer(tiny_processor, tmp_path, reward)
    model, tokens = trainer.model, torch.randn(3, 4, trainer.model.config.grid.hidden_size)
    loss = trainer._negative_reward(tokens, tokens[:, 0], [["a"]] * 3)
    [gradient] = torch.autograd.grad(loss, [*model.token_projection.parameters()][:1])
    assert not gradient.any()

    end = model.generation_config.eos_token_id
    word = next(i for i in range(len(tiny_processor.tokenizer)) if i not in tiny_processor.tokenizer.all_special_ids)
    drawn = torch.tensor([[word, end, word], [word, word, word]] * 5)
    trainer._draw = lambda prompt_ids, visual_tokens: drawn[: len(prompt_ids)]
    seen.clear()
    model.zero_grad()
    trainer._negative_reward(tokens[:2], tokens[:2, 0], [["a"]] * 2).backward()
    [(captions, are_whole), _] = seen
    assert are_whole == [True, False, True, False, True]
    one, three = (tiny_processor.tokenizer.decode([word] * count) for count in (1, 3))
    assert [caption.strip() for caption in captions[:2]] == [one.strip(), three.strip()]


@pytest.fixture(scope="module")
def folder(tiny_processor, tmp_path_factory):
    return run_on_two(self_critical_step, tiny_processor, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", parts())
def test_two_processes_step_as_one(folder, tiny_processor, tmp_path, case):
    expected = gradient_of_one_step(tiny_processor, tmp_path, parts()[case], 2)
    without = gradient_of_one_step(tiny_processor, tmp_path, parts()[case], 2, reward_weight=1e-9)
    name = "language_model.model.embed_tokens.weight"
    assert (expected[name] - without[name]).abs().max() > 1e-2
    assert_both_step(folder, case, expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_adds_the_mean_reward_to_the_joint_loss(tiny_processor, tmp_path, steps):
    trainer = build_trainer(tiny_processor, tmp_path, options=SelfCritical(reward_weight=0.5))
    trainer.current_gradient_accumulation_steps = steps
    trainer._negative_reward = lambda visual_tokens, image_embeds, references: 8.0 * torch.tensor(len(references))
    batch = batch_of(trainer)
    assert batch["references"] == [[row["caption"]] for row in rows()]
    batch["references"][1] = []  # an image without captions has none to be compared with
    plain = MMGEMTrainer(build_model(), trainer.args, tiny_processor, MMGEMCollator(tiny_processor))
    plain.current_gradient_accumulation_steps = steps
    without = {name: value for name, value in batch.items() if name != "references"}
    joint = plain.compute_loss(plain.model, without, num_items_in_batch=torch.tensor(9))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(9))
    torch.testing.assert_close(loss - joint, torch.tensor(0.5 * 8.0 / steps))


@pytest.mark.parametrize("vectors", [{}, {"num_embedding_tokens": 2, "embedding_pooling": "multi_vector"}])
def test_a_caption_is_worth_how_well_it_finds_its_image(tiny_processor, tmp_path, vectors):
    trainer = build_trainer(tiny_processor, tmp_path, model=build_model(**vectors))
    captions = ["a red star", "two blue moons and a green heart", "nothing", "a star"]  # two of each image
    inputs = tiny_processor.tokenizer(captions, padding=True, return_tensors="pt")
    outputs = trainer.model(**inputs, pixel_values=batch_of(trainer)["pixel_values"][:2])
    found = trainer._found(captions, outputs.image_embeds)
    shares = outputs.logits_per_text.softmax(-1)  # (4, 2)
    torch.testing.assert_close(found, torch.stack([shares[:2, 0], shares[2:, 1]]))

    seen = []
    trainer.options = SelfCritical(captions_drawn=2, max_new_tokens=3, retrieval_weight=2.0)
    trainer.reward = lambda captions, are_whole, references: [5.0, 5.0]
    trainer._found = lambda captions, image_embeds: torch.tensor([[0.75, 0.25]])
    keep = trainer._keep
    trainer._keep = lambda **figures: (seen.append(figures), keep(**figures))
    drawn = torch.tensor([[7, 8, 9], [9, 8, 7]])
    trainer._draw = lambda prompt_ids, visual_tokens: drawn
    model, tokens = trainer.model, torch.randn(1, 4, trainer.model.config.grid.hidden_size)
    loss = trainer._negative_reward(tokens, outputs.image_embeds[:1], [["a"]])
    ids = torch.cat([trainer._prompt_ids().repeat(2, 1), drawn], dim=1)
    logits = model(input_ids=ids, visual_tokens=tokens.repeat(2, 1, 1)).logits[:, -4:-1]
    logits = logits.index_fill(2, torch.tensor([model.config.image_token_id]), -torch.inf)
    likelihood = logits.log_softmax(-1).gather(2, drawn[..., None]).sum((1, 2))
    torch.testing.assert_close(loss, -(likelihood[0] - likelihood[1]) / 2)  # advantages are 1 and -1
    assert seen == [{"caption_reward": torch.tensor(5.0)}]


def test_captions_become_what_is_rewarded(tiny_processor, tmp_path):
    trainer = build_trainer(
        tiny_processor,
        tmp_path,
        max_steps=20,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        caption_loss_weight=0.0,
        logging_steps=1,
        options=SelfCritical(captions_drawn=16, max_new_tokens=6),
    )
    trainer.train()
    rewards = [entry["caption_reward"] for entry in trainer.state.log_history if "caption_reward" in entry]
    assert len(rewards) == 20 and sum(rewards[-3:]) > 2 * sum(rewards[:3])


def test_what_cannot_be_is_refused(tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="`captions_drawn` is 1; expected 2 or more"):
        SelfCritical(captions_drawn=1)
    with pytest.raises(ValueError, match="`reward_weight` is 0; expected a number above 0"):
        SelfCritical(reward_weight=0)
    with pytest.raises(ValueError, match="`retrieval_weight` is -1; expected 0 or more"):
        SelfCritical(retrieval_weight=-1)
    with pytest.raises(ValueError, match="`grad_cache_chunk_size` is 2; expected None"):
        build_trainer(tiny_processor, tmp_path, grad_cache_chunk_size=2)
    began_as_vlm = SimpleNamespace(config=SimpleNamespace(vlm_config=object()))
    with pytest.raises(ValueError, match="came with a model that began as a VLM; expected one composed of towers"):
        check_can_draw(began_as_vlm)
    with pytest.raises(ValueError, match="nothing that writes trains"):
        build_trainer(tiny_processor, tmp_path, freeze=["language_model", "token_projection"])
