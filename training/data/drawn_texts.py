"""The texts that are drawn from each row of a batch, and what the model learns from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from string import Formatter
from typing import Any

import torch

from mmgem.training.data.rows import captions_of, edit_of, images_of, row_name

NONE = -1


@dataclass
class DrawnText:
    """One text of a batch.

    Args:
        text: The text that is embedded and generated.
        prompt: The text before it that is neither embedded nor generated; only for a text that is not embedded.
        is_generated: Whether the model learns to write it.
        columns: Values of columns of [`mmgem.text_rows.TextRows`], by name; the others are -1 and False. A column
            that can point to several has a list.
    """

    text: str
    prompt: str = ""
    is_generated: bool = True
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False, repr=False)
class TextDrawing:
    """How many texts of each kind are drawn from a row. A row without the column has none of them.

    Args:
        captions_per_image: Captions drawn for each image; each is embedded and generated.
        queries_per_image: Queries drawn for each image; each is embedded.
        regions_per_image: Boxes drawn for each image; their captions are embedded and generated.
        questions_per_image: Questions drawn for each image; the answers are generated.
        long_caption_probability: Share of the images whose long caption is embedded.
        label_template: Text to embed for a `label`, such as "a photo of a {label}"; None to leave labels out.
        hard_negatives_per_image: Hard negatives drawn for each image.
        edits_per_image: Edits drawn for each image, of which a row has at most one. Embedded with the image, the
            instruction is to find the edited image (composed retrieval).
        instructed_regions_per_image: Instructions drawn for each image. Embedded with the image, each is to find the
            box it names, which has at least one other box of the image beside it, where there is one (ABC,
            https://arxiv.org/abs/2503.00329).
        memory_captions_per_image: Captions drawn for each image; each is generated from the [EMB] vectors of the
            image alone, its memory (the compress stage of CoMa, https://arxiv.org/abs/2511.08480).
        memory_questions_per_image: Questions drawn for each image; the answers are generated from its memory.
        match_captions_per_image: Captions drawn for each image; each is to find the image as the language model
            embeds it, by the [EMB] vectors that also are its memory (the match stage of CoMa).
        prompts: Instructions by name, those of the model's configuration; "edit" stands before the instructions of
            edits, "object" before those that name a box, and the one that the `prompt_name` of a row names before the
            other texts of the row, where they are embedded. "region_caption" stands between a box and its caption,
            where that is generated; without it boxes are captioned as images are.

    Raises:
        ValueError: For a number below 0, a probability above 1, or a template without `{label}` or with anything else.
    """

    captions_per_image: int = 1
    queries_per_image: int = 1
    regions_per_image: int = 2
    questions_per_image: int = 1
    long_caption_probability: float = 0.25
    label_template: str | None = None
    hard_negatives_per_image: int = 0
    edits_per_image: int = 0
    instructed_regions_per_image: int = 0
    memory_captions_per_image: int = 0
    memory_questions_per_image: int = 0
    match_captions_per_image: int = 0
    prompts: Mapping[str, str] | None = None

    def __post_init__(self):
        for name in (option.name for option in fields(TextDrawing) if option.name.endswith("_per_image")):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 0 or more.")
        if not 0 <= self.long_caption_probability <= 1:
            raise ValueError(
                f"`long_caption_probability` is {self.long_caption_probability}; expected a number from 0 to 1."
            )
        if self.label_template is not None and _fields_of(self.label_template) != {"label"}:
            raise ValueError(f"`label_template` is {self.label_template!r}; expected a text with {{label}} in it.")

    @property
    def uses_boxes(self) -> bool:
        """Whether boxes are drawn from rows."""
        return self.regions_per_image > 0 or self.instructed_regions_per_image > 0

    @property
    def text_columns(self) -> list[str]:
        """The columns of [`mmgem.text_rows.TextRows`] that batches have, beside the tokens.

        They follow from the options, not from what was drawn, so that all processes of a run take the same steps.
        """
        writes_memories = self.memory_captions_per_image > 0 or self.memory_questions_per_image > 0
        finds_memories = self.match_captions_per_image > 0
        is_fused = self.edits_per_image > 0 or self.instructed_regions_per_image > 0
        is_used = {
            "image_index": True,
            "box_index": True,
            "contrastive_mask": True,
            "hard_negative_mask": self.hard_negatives_per_image > 0,
            "fused_index": is_fused or writes_memories or finds_memories,
            "target_row": finds_memories,
            "memory_row": writes_memories,
        }
        return [name for name, used in is_used.items() if used]

    def pictures_of(self, row: Mapping[str, Any]) -> list:
        """The images that a row brings into a batch: its own, and after them the edited one if its edit is drawn."""
        edit = edit_of(row) if self.edits_per_image else None
        return images_of(row) if edit is None else [*images_of(row), edit[1]]

    def check_prompt(self, row: Mapping[str, Any]) -> str:
        """Return the prompt that a row names, or "".

        Raises:
            ValueError: If the model has none of that name.
        """
        name, prompts = row.get("prompt_name"), self.prompts or {}
        if name is not None and name not in prompts:
            known = f"one of {', '.join(prompts)}" if prompts else "None, since the model has no prompts"
            raise ValueError(f"`prompt_name` of {row_name(row, 0)} is {name!r}; expected {known}.")
        return "" if name is None else prompts[name]

    def embeddable_texts(self, row: Mapping[str, Any]) -> list[str]:
        """List all texts of a row that may be drawn to be embedded alone, after the prompt of the row.

        Args:
            row: Its columns; images need not be loaded.
        """
        columns = {
            "queries": self.queries_per_image,
            "region_captions": self.regions_per_image,
            "hard_negatives": self.hard_negatives_per_image,
        }
        texts = captions_of(row) if self.captions_per_image else []
        texts += [text for column, count in columns.items() if count for text in row.get(column) or []]
        if self.long_caption_probability and row.get("long_caption"):
            texts.append(row["long_caption"])
        if self.label_template is not None and row.get("label") is not None:
            texts.append(self.label_template.format(label=row["label"]))
        prompt = self.check_prompt(row)
        return [prompt + text for text in texts]

    def draw_texts(
        self, row: Mapping[str, Any], in_view: Sequence[bool], first_image: int = 0, first_text: int = 0
    ) -> tuple[list[DrawnText], list[int]]:
        """Draw from a row: by its `draw_seed`, or else with torch's generator.

        Args:
            row: Its columns.
            in_view: For each of its boxes, whether the model sees it.
            first_image, first_text: Number that its first image, and its first text, have in the batch.

        Returns:
            The texts, and the numbers of the boxes to find, in the order that `box_index` gives.
        """
        draw = _RowDraw(self, row, first_image, first_text)
        draw.descriptions()
        draw.regions(in_view)
        if draw.images:
            draw.hard_negatives()
            draw.instructed_regions(in_view)
            draw.edit()
            draw.from_memory()
        return draw.texts, draw.boxes


def _fields_of(template: str) -> set[str | None]:
    """What stands in braces."""
    try:
        return {name for _, name, *_ in Formatter().parse(template)} - {None}
    except ValueError:  # a single brace
        return set()


class _RowDraw:
    """The draws from one row; what is drawn first does not depend on what is drawn after it."""

    def __init__(self, options: TextDrawing, row: Mapping[str, Any], first_image: int, first_text: int):
        self.options, self.row, self.prompts = options, row, options.prompts or {}
        self.prompt = options.check_prompt(row)
        self.images = range(first_image, first_image + len(images_of(row)))
        self.first_text = first_text
        seed = row.get("draw_seed")
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.texts: list[DrawnText] = []
        self.boxes: list[int] = []

    def descriptions(self):
        """Captions, the long one, the label, questions; each of one of the row's images."""
        options, row, has_image = self.options, self.row, len(self.images) > 0
        for caption in self._some(captions_of(row), options.captions_per_image):
            if has_image:
                self._describe(self._image(), caption)
            else:
                self._add(caption, image_index=NONE)
        for query in self._some(row.get("queries") or [], options.queries_per_image) if has_image else ():
            self._embed(query, image_index=self._image())
        if has_image and row.get("long_caption"):
            if float(torch.rand((), generator=self.generator)) < options.long_caption_probability:
                self._embed(row["long_caption"], image_index=self._image())
        if has_image and options.label_template is not None and row.get("label") is not None:
            self._embed(options.label_template.format(label=row["label"]), image_index=self._image())
        for turn in self._some(row.get("qa") or [], options.questions_per_image):
            self._answer(turn, image_index=self._image())

    def regions(self, in_view: Sequence[bool]):
        self.box_order = [box for box in self._some(range(len(in_view)), len(in_view)) if in_view[box]]
        question = self.prompts.get("region_caption", "")
        for box in self.box_order[: self.options.regions_per_image]:
            caption, place = self.row["region_captions"][box], self._place_of(box)
            self._describe(self.images[0], caption, question, box_index=place)

    def hard_negatives(self):
        for text in self._some(self.row.get("hard_negatives") or [], self.options.hard_negatives_per_image):
            self._embed(text, image_index=self._image(), hard_negative_mask=True)

    def instructed_regions(self, in_view: Sequence[bool]):
        instructions = [one for one in self.row.get("instructions") or [] if in_view[one["box"]]]
        drawn = self._some(instructions, self.options.instructed_regions_per_image)
        for one in drawn:
            image, box = self.images[0], self._place_of(one["box"])
            self._embed(one["text"], "object", image_index=image, box_index=box, fused_index=[image])
        if drawn:  # something of the same image has to be there that is not meant
            self.boxes += [box for box in self.box_order if box not in self.boxes][:1]

    def edit(self):
        edit = edit_of(self.row)
        if self.options.edits_per_image and edit is not None:
            self._embed(edit[0], "edit", image_index=self.images.stop, fused_index=list(self.images))

    def from_memory(self):
        """Captions and answers from the memory of images, and captions that are to find it."""
        options, captions = self.options, captions_of(self.row)
        memories: dict[int, int] = {}  # of each image, the text whose [EMB] vectors they are: an empty one

        def memory_of(image: int) -> int:
            if image not in memories:
                memories[image] = self.first_text + len(self.texts)
                self._add("", is_generated=False, image_index=image, fused_index=[image])
            return memories[image]

        for caption in self._some(captions, options.memory_captions_per_image):
            image = self._image()
            self._add(caption, image_index=image, memory_row=memory_of(image))
        for turn in self._some(self.row.get("qa") or [], options.memory_questions_per_image):
            image = self._image()
            self._answer(turn, image_index=image, memory_row=memory_of(image))
        for caption in self._some(captions, options.match_captions_per_image):
            image = self._image()
            target_row = memory_of(image)
            self._embed(caption, image_index=image, target_row=target_row)

    def _describe(self, image: int, text: str, question: str = "", **columns):
        """A text that is embedded, with the row's prompt before it, and generated, without, as the answer to a
        question if there is one."""
        if question:
            self._embed(text, image_index=image, **columns)
            self._answer({"question": question, "answer": text}, image_index=image, **columns)
        elif self.prompt:
            self._embed(text, image_index=image, **columns)
            self._add(text, image_index=image, **columns)
        else:
            self._add(text, image_index=image, contrastive_mask=True, **columns)

    def _embed(self, text: str, prompt: str | None = None, **columns):
        """A text that is only embedded, with one of the model's prompts before it, or else the row's."""
        text = (self.prompt if prompt is None else self.prompts.get(prompt, "")) + text
        self._add(text, is_generated=False, contrastive_mask=True, **columns)

    def _answer(self, turn: Mapping[str, str], **columns):
        self.texts.append(DrawnText(" " + turn["answer"], prompt=turn["question"], columns=columns))

    def _add(self, text: str, is_generated: bool = True, **columns):
        self.texts.append(DrawnText(text, is_generated=is_generated, columns=columns))

    def _place_of(self, box: int) -> int:
        """Its number among the boxes drawn, of which it becomes one."""
        if box not in self.boxes:
            self.boxes.append(box)
        return self.boxes.index(box)

    def _some(self, items: Sequence, count: int) -> list:
        """`count` of the items, or all if there are fewer, in random order; nothing is drawn for a `count` of 0."""
        if not count:
            return []
        return [items[i] for i in torch.randperm(len(items), generator=self.generator)[:count].tolist()]

    def _image(self) -> int:
        """One of the images of the row, or `NONE`."""
        if len(self.images) < 2:
            return self.images[0] if self.images else NONE
        return self.images[int(torch.randint(len(self.images), (), generator=self.generator))]
