"""Pipelines: image-to-text, which transformers 5 no longer has, and what stock ones do otherwise than this model.

A stock pipeline decodes pictures by itself, 16-bit and transparent ones otherwise than the processor; here the
processor reads them all.
"""

# The parent's attributes are annotated as None, and its methods take whatever a subclass makes of them.
# mypy: disable-error-code="assignment, misc, operator, override, union-attr"

from transformers import GenerationConfig, Pipeline
from transformers.pipelines import (
    FeatureExtractionPipeline,
    ImageFeatureExtractionPipeline,
    ImageTextToTextPipeline,
    ZeroShotImageClassificationPipeline,
)


class MMGEMImageToTextPipeline(Pipeline):
    """Captions images, answers questions about them, or captions boxes in them.

        describe = pipeline("image-to-text", model=folder, trust_remote_code=True)
        describe("photo.jpg")                                        # [{"generated_text": "a red circle ..."}]
        describe(["a.jpg", "b.jpg"], batch_size=2)                   # one such list for each image
        describe("photo.jpg", prompt="what color is the circle?")
        describe("photo.jpg", boxes=[[0, 0, 40, 40], [9, 9, 60, 60]])  # one dict for each box

    Whatever sets up generation can be given here or in the call: `max_new_tokens`, or anything in `generate_kwargs`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(self, prompt=None, boxes=None, max_new_tokens=None, generate_kwargs=None):
        """Sorts the arguments of a call by the step they belong to."""
        generate_kwargs = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in generate_kwargs:
                raise ValueError(
                    f"`max_new_tokens` is given twice, as {max_new_tokens} and in `generate_kwargs` as "
                    f"{generate_kwargs['max_new_tokens']}; expected one of them."
                )
            generate_kwargs["max_new_tokens"] = max_new_tokens
        preprocess_kwargs = {} if prompt is None else {"prompt": prompt}
        if boxes is not None:
            preprocess_kwargs["boxes"] = boxes
        return preprocess_kwargs, {"generate_kwargs": generate_kwargs} if generate_kwargs else {}, {}

    def __call__(self, images, boxes=None, **kwargs):
        """Generates text for images.

        Args:
            images: A picture of any kind the processor takes (path, URL, PIL image, array, ...), a list of them, or a
                generator or dataset, for which results are generated as they are asked for.
            boxes: Boxes to caption instead of the image: for one image a list of `[x0, y0, x1, y1]` in its pixels, for
                a list of images a list of such lists.
            kwargs: `prompt` (a question, or the beginning of a caption; of boxes, by default, the model's prompt
                "region_caption" if there is one), `max_new_tokens`, `generate_kwargs`, `batch_size`.

        Returns:
            `[{"generated_text": ...}]`, without the prompt, with one entry for each box and returned sequence; for a
            list of images, a list of such lists.

        Raises:
            ValueError: No image at all, boxes that do not fit the list of images, or as the processor raises.
        """
        if isinstance(images, list):
            if not images:
                raise ValueError("`images` is an empty list; expected at least one image.")
            if boxes is not None:
                if len(boxes) != len(images):
                    raise ValueError(
                        f"`boxes` has {len(boxes)} entries for {len(images)} images; expected the boxes of each."
                    )
                # The boxes of one image are a batch already.
                return [self(image, boxes=rows, **kwargs) for image, rows in zip(images, boxes)]
        return super().__call__(images, **kwargs, **({} if boxes is None else {"boxes": boxes}))

    def preprocess(self, image, prompt=None, boxes=None):
        """One picture and the prompt as model inputs: one row, or one for each box."""
        if prompt is None:
            prompt = "" if boxes is None else (self.model.config.prompts or {}).get("region_caption", "")
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` is {prompt!r:.100}; expected a string.")
        image_token = self.processor.image_token
        options = {"return_tensors": "pt"}
        if image_token not in prompt:
            prompt, options = self.processor.prompt(prompt), options | self.processor.prompt_kwargs
        if boxes is None:
            return self.processor(images=[image], text=[prompt], **options)
        return self.processor(images=[image], text=[prompt] * len(boxes), boxes=[boxes], **options)

    def _forward(self, model_inputs, generate_kwargs=None):
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs or {}, pad_token_id=self.tokenizer.pad_token_id, return_dict_in_generate=False
        )
        rows, prompt_length = model_inputs["input_ids"].shape
        generated = self.model.generate(**model_inputs, **generate_kwargs)[:, prompt_length:]
        # The first dimension is what a batch of several images is taken apart by.
        return {"generated": generated.reshape(rows, -1, generated.shape[-1])}

    def postprocess(self, model_outputs):
        """Token ids as text."""
        texts = self.processor.batch_decode(model_outputs["generated"].flatten(0, 1), skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]


def _read(pipeline: Pipeline, pictures) -> list:
    """As upright RGB images."""
    return pipeline.processor.prepare_inputs_layout(images=pictures)[0]


class MMGEMImageTextToTextPipeline(ImageTextToTextPipeline):
    """The stock pipeline, with the pictures as the processor reads them."""

    def preprocess(self, inputs=None, **kwargs):
        """Prompts and pictures, or a conversation, as model inputs."""
        if isinstance(inputs, dict) and inputs.get("images") is not None:
            images = inputs["images"] if isinstance(inputs["images"], list | tuple) else [inputs["images"]]
            inputs = inputs | {"images": _read(self, images)}
        return super().preprocess(inputs, **kwargs)


class MMGEMZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """The stock pipeline, with the pictures as the processor reads them."""

    _load_processor = True

    def preprocess(self, image, candidate_labels=None, **kwargs):
        """A picture and its labels as model inputs."""
        is_list = isinstance(candidate_labels, list | tuple) and len(candidate_labels) > 0
        if not is_list or not all(isinstance(label, str) for label in candidate_labels):
            raise ValueError(f"`candidate_labels` is {candidate_labels!r:.100}; expected a list of at least one text.")
        return super().preprocess(*_read(self, [image]), candidate_labels, **kwargs)


class MMGEMImageFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """Pictures to visual tokens, (1, n, C); with `pool=True` to their embedding, (1, D), of several vectors the first.

    Pictures are as the processor reads them.
    """

    _load_processor = True

    def preprocess(self, image, *args, **kwargs):
        """A picture as model inputs."""
        return super().preprocess(*_read(self, [image]), *args, **kwargs)

    def _forward(self, model_inputs):
        outputs = super()._forward(model_inputs)
        if self.model.config.is_multi_vector:
            outputs.pooler_output = outputs.pooler_output[:, 0]  # (B, D)
        return outputs


class MMGEMFeatureExtractionPipeline(FeatureExtractionPipeline):
    """Texts to their embeddings, (1, D) or (1, k, D), where the stock pipeline has vocabulary logits."""

    def _forward(self, model_inputs):
        return {"embeddings": self.model.get_text_features(**model_inputs).pooler_output}

    def postprocess(self, model_outputs, return_tensors=False):
        """As a list, or as a tensor."""
        embeddings = model_outputs["embeddings"]
        return embeddings if return_tensors else embeddings.tolist()
