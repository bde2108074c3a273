import copy

import pytest
import torch
from one_step import rows
from tiny_models import build_model
from transformers import TrainerCallback

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.trainer.grad_cache import split_batch
from mmgem.training.trainer.teacher import Teacher
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments

ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "contrastive_objective": {"soft_targets": 0.4, "teacher": {"momentum": 0.5}},
}


class Recorder(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.text_projection.weight.detach().clone())


def trainer_in(folder, processor, **arguments):
    arguments = MMGEMTrainingArguments(output_dir=str(folder), **(ARGUMENTS | arguments))
    return MMGEMTrainer(build_model(), arguments, processor, train_dataset=rows())


def test_a_momentum_teacher_is_the_average_of_the_steps(tiny_processor, tmp_path):
    trainer, recorder = trainer_in(tmp_path, tiny_processor, max_steps=3, save_strategy="no"), Recorder()
    trainer.add_callback(recorder)
    expected = trainer.model.text_projection.weight.detach().clone()
    trainer.train()
    for weights in recorder.weights:
        expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(trainer.teacher.model.text_projection.weight, expected)
    assert (expected - recorder.weights[-1]).abs().max() > 1e-3


def test_a_teacher_embeds_the_batch_the_model_embeds(tiny_processor):
    model = build_model()
    teacher, batch = Teacher(model, tiny_processor, momentum=0.9), MMGEMCollator(tiny_processor)(rows())
    own = model(**batch, return_contrastive_batch=True).contrastive_batch
    for chunks in ([batch], split_batch(batch, 3)):
        seen = teacher.embed(chunks)
        torch.testing.assert_close(seen.query_embeds.sort(0).values, own.query_embeds.sort(0).values)
        assert not seen.query_embeds.requires_grad


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_resumed_training_has_the_teacher_it_had(tiny_processor, tmp_path, chunk_size):
    arguments = {"max_steps": 4, "save_steps": 2, "grad_cache_chunk_size": chunk_size}
    whole = trainer_in(tmp_path, tiny_processor, **arguments)
    whole.train()
    resumed = trainer_in(tmp_path, tiny_processor, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in ((whole.model, resumed.model), (whole.teacher.model, resumed.teacher.model)):
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=0, atol=1e-5)


def test_a_pretrained_teacher_stays_as_it_is(tiny_processor, tmp_path):
    build_model(embedding_pooling="mean").save_pretrained(tmp_path / "teacher")
    tiny_processor.save_pretrained(tmp_path / "teacher")
    objective = {"false_negative_teacher_margin": 0.0, "teacher": {"pretrained": str(tmp_path / "teacher")}}
    arguments = {"max_steps": 2, "save_steps": 1, "contrastive_objective": objective}
    trainer = trainer_in(tmp_path / "out", tiny_processor, **arguments)
    before = trainer.teacher.model.text_projection.weight.detach().clone()
    trainer.train()
    torch.testing.assert_close(trainer.teacher.model.text_projection.weight, before, rtol=0, atol=0)
    assert not (tmp_path / "out" / "checkpoint-2" / "teacher.safetensors").exists()


def test_a_teacher_that_sees_other_images_is_refused(tiny_processor, tmp_path):
    build_model().save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.size = {"height": 16, "width": 16}
    with pytest.raises(ValueError, match="sees images with `size`"):
        Teacher(build_model(), processor, pretrained=str(tmp_path))
