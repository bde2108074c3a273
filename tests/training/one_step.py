"""One SGD step of MMGEMTrainer, and the four fixed rows that it takes by default."""

import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, build_model

from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments

CAPTIONS = ["a red star", "two blue moons and a green heart", "nothing", "a large white cross on the left"]


def rows() -> list[dict]:
    """Four images, one caption each, of different lengths; one of the images, so one of two processes, has boxes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    data = [
        {"image": Image.fromarray(image.numpy()), "caption": text}
        for image, text in zip(pixels, CAPTIONS, strict=True)
    ]
    data[0] |= {"boxes": [[2, 3, 20, 30], [10, 0, 32, 12]], "region_captions": ["a tall region", "a flat one"]}
    return data


def arguments_of_one_step(output_dir, **arguments) -> MMGEMTrainingArguments:
    """Of one SGD step with learning rate 1, whose change of a parameter is its gradient."""
    return MMGEMTrainingArguments(
        output_dir=str(output_dir),
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )


def gradient_of_one_step(
    processor, output_dir: str, train_dataset=None, data_collator=None, model=None, **arguments
) -> dict[str, torch.Tensor]:
    """Parameter by parameter, what one optimizer step with learning rate 1 subtracts; by default on `rows()`."""
    model = build_model() if model is None else model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_dataset = rows() if train_dataset is None else train_dataset
    arguments = arguments_of_one_step(output_dir, **arguments)
    MMGEMTrainer(model, arguments, processor, data_collator, train_dataset=train_dataset).train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def read_processor(tokenizer_folder: str):
    """The tests' `tiny_processor`, in another process."""
    from transformers import AutoTokenizer, SiglipImageProcessorPil

    from mmgem.processing.processing_mmgem import MMGEMProcessor

    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return MMGEMProcessor(image_processor, AutoTokenizer.from_pretrained(tokenizer_folder), num_visual_tokens=4)
