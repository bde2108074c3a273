"""A recipe is a YAML file that says everything about a training run: a model, and stages of data and arguments.

Reading one imports neither a model nor a trainer. Names and values that only their classes know are checked by
`mmgem.training.recipes.validation`.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from mmgem.training.argument_checks import check_keys, check_type
from mmgem.training.data.open_source import check_section
from mmgem.training.recipes.stage_kinds import STAGE_KINDS

TRAINED_WITH = ("attn_implementation", "dtype")  # sections of `model` beside those that say which model
MAX_IMAGE_SIZE = 1 << 14  # the side of the largest picture that is read
MAX_NODES = 100_000  # values of a recipe, with what aliases repeat
# Names that every file system keeps as they are, and that no folder has which is not finished.
_FOLDER_NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))[\w-][\w.-]*(?<!\.)(?<!\.partial)")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that a recipe starts from: `pretrained`, a VLM, two towers, or two configurations of towers.

    Args:
        pretrained: The folder or the name of a checkpoint.
        vlm: The folder or the name of a finished vision-language model.
        vision: The folder or the name of a vision tower.
        text: The folder or the name of a language model.
        gguf_file: The file in the folder `text` to read the language model from.
        num_hidden_layers: How many of the first layers of the language model to keep; by default all.
        trim_vocabulary: The most tokens of its vocabulary to keep, those that the data of the first stage use most; by
            default all.
        vision_config: The configuration of a fresh vision tower.
        text_config: The configuration of a fresh language model.
        config: Further fields of `MMGEMConfig`.
        attn_implementation: The attention to train with.
        dtype: The type of the weights to train with.
    """

    pretrained: str | None = None
    vlm: str | None = None
    vision: str | None = None
    text: str | None = None
    gguf_file: str | None = None
    num_hidden_layers: int | None = None
    trim_vocabulary: int | None = None
    vision_config: Mapping[str, Any] | None = None
    text_config: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    attn_implementation: str | None = None
    dtype: str | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether the model begins with random weights, and takes a tokenizer that learns from data."""
        return self.vision_config is not None

    @property
    def reads_data(self) -> bool:
        """Whether its vocabulary follows from the data of the first stage."""
        return self.is_fresh or self.trim_vocabulary is not None


@dataclass(frozen=True, kw_only=True)
class FeatureCaching:
    """How features of a frozen vision tower are computed once, and kept.

    Args:
        views: Views of each image: the whole image, and others, drawn by the `augmentation` of the collator.
        texts: Whether the language model is frozen too, and is run once for each text that is embedded. Only
            projections and the aggregator train then, by the contrastive loss.
        folder: Where they are kept, perhaps for other runs too; by default in the folder of the run.
    """

    views: int = 1
    texts: bool = False
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        name: The name of its folder.
        image_size: The side of the images in pixels; by default as before.
        text_attention: The attention while a text is embedded; by default as before.
        embedding: Arguments of `MMGEMModel.set_embedding_tokens`; by default as before.
        cache_features: How the features of the frozen vision tower are kept; by default the tower runs at each step.
        train_data: Data sections, each perhaps with a `weight`.
        collator: Arguments of `MMGEMCollator`.
        training: Arguments of `MMGEMTrainingArguments`.
        kind: The kind of its training, a key of `STAGE_KINDS`.
        options: The section of its kind.
    """

    name: str
    image_size: int | None = None
    text_attention: Literal["causal", "bidirectional"] | None = None
    embedding: Mapping[str, Any] | None = None
    cache_features: FeatureCaching | None = None
    train_data: Sequence[Mapping[str, Any]]
    collator: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any]
    kind: str = next(iter(STAGE_KINDS))
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as `load_recipe` reads it; see there for its sections."""

    seed: int = 0
    model: ModelSection
    image_processor: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    prompts: Mapping[str, str] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    eval_data: Mapping[str, Any] | None = None
    stages: Sequence[Stage]

    def stage_number(self, stage: str | int) -> int:
        """Find which stage, from 0 on, a user means by a name or by a number from 1 on.

        Raises:
            ValueError: If there is no such stage.
        """
        names = [stage.name for stage in self.stages]
        numbers = [str(number) for number in range(1, len(names) + 1)]
        for known in (names, numbers):
            if str(stage) in known:
                return known.index(str(stage))
        raise ValueError(
            f"`stage` is {stage!r}; expected a number from 1 to {len(names)} or one of {', '.join(names)}."
        )


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 has it; to PyYAML it is text."""

    def get_single_node(self):
        """As of every loader, but for aliases that would make a small file endless."""
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"its aliases repeat themselves, or make more than {MAX_NODES:,} values", node.start_mark
            )
        return node

    def construct_scalar(self, node):
        """As of every loader, but for halves of characters: those of one, as JSON escapes it, are put together."""
        value = super().construct_scalar(node)
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(value, str) else value
        except UnicodeDecodeError as error:
            message = f"{value!r:.80} has half a surrogate pair"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error

    def construct_yaml_int(self, node):
        """As of every loader, but for numbers that nothing could take."""
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            message = f"{node.value:.80} is beyond the numbers of 64 bits"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        if ":" in node.value or re.match(r"[-+]?0\d", node.value):
            message = (
                f"{node.value:.80} would be {value}, to base 60 or 8; expected digits without colon and first zero"
            )
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return value

    def compose_mapping_node(self, anchor):
        """As of every loader, but for a key that is there twice, of which one would be lost."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.composer.ComposerError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))


def _count(node: yaml.Node, counts: dict[yaml.Node, float]) -> float:
    """Nodes with all that aliases repeat; infinitely many where one holds itself."""
    if node not in counts:
        counts[node] = math.inf  # while it is counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for pair in inner for one in pair] if isinstance(node, yaml.MappingNode) else inner
        counts[node] = 1 + sum(_count(one, counts) for one in inner)
    return counts[node]


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    | section | content |
    |---|---|
    | `model` | which model, in one of four ways, see below |
    | `tokenizer` | arguments of `train_tokenizer`, which learns from the data of the first stage |
    | `image_processor` | arguments of the image processor that are to be others |
    | `prompts` | instructions by name, which the model keeps for those who embed or, "region_caption", caption boxes |
    | `generation` | arguments of `GenerationConfig`, or `image_similarity_weight`; by default those of the model |
    | `eval_data` | a data section (see [`mmgem.training.data.open_source.open_source`]) to measure the model on |
    | `seed` | of weights, orders and draws; 0 by default |
    | `stages` | a list, see below |

    The model is `{pretrained: NAME}`, or begins as a finished VLM, `{vlm: NAME}`, or is composed of towers,
    `{vision: NAME, text: NAME}`, with a `gguf_file` where the language model is in one, and `num_hidden_layers` and
    `trim_vocabulary` to begin with its first layers, and with the part of its vocabulary that the data use, or, from
    nothing, `{vision_config: {...}, text_config: {...}}`, which takes the sections `tokenizer` and `image_processor`.
    The last three may have further fields of `MMGEMConfig`, each of the four an `attn_implementation` and a `dtype` to
    train with.

    | section of a stage | content |
    |---|---|
    | `name` | a name for its folder |
    | `train_data` | a data section or a list of them, each with a `weight`: a mixture |
    | `training` | arguments of `MMGEMTrainingArguments` |
    | `image_size` | side of the images in pixels; by default as before |
    | `text_attention` | `causal` or `bidirectional`, while a text is embedded; by default as before |
    | `embedding` | arguments of `MMGEMModel.set_embedding_tokens`; by default as before |
    | `cache_features` | `true`, or arguments of `FeatureCaching`, see below; by default `false` |
    | `collator` | arguments of `MMGEMCollator` |
    | `objective` | options of [`mmgem.training.trainer.contrastive_losses.build_objective`] |
    | `self_critical` | options of [`mmgem.training.self_critical.trainer.SelfCritical`], see below |
    | `reconstruction` | options of [`mmgem.training.reconstruction.masking.Reconstruction`], see below |

    With `cache_features` the features of the frozen vision tower are computed once, before the first step, and kept on
    the disk for all steps and later stages. With an `augmentation` in the `collator` there are some `views` of each
    image instead of ever new ones. `cache_features: {texts: true}` does the same for a frozen language model, so that
    a step is no more than projections and the contrastive loss, with `fusemix` and `structure` among the options of
    `objective`.

    A stage with a section `self_critical`, be it empty (`{}`), draws captions too, and learns to write those that
    CIDEr-D prefers, beside the joint loss with plain InfoNCE; it takes no `objective`.

    A stage with a section `reconstruction`, be it empty (`{}`), learns to put back masked tokens and patches, and
    nothing else; it takes no `objective`.

    Args:
        path: A YAML file with these sections.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, has a section that is unknown (the nearest known one is named), lacks one, or
            has one of a wrong type.
    """
    return parse_recipe(read_yaml(path))


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; errors are those of `load_recipe`."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file" if path.exists() else "which is not there"
        raise FileNotFoundError(f"recipe is {str(path)!r}, {what}; expected a YAML file.")
    try:
        with open(path, "rb") as file:  # whose name the errors have
            return yaml.load(file, _Loader)  # noqa: S506, a SafeLoader
    except RecursionError as error:
        raise ValueError(f"recipe is {str(path)!r}, nested too deeply; expected YAML that can be read.") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not, for instance
        raise ValueError(f"recipe is {str(path)!r}; expected YAML: {error}.") from error


def parse_recipe(sections: Any) -> Recipe:
    """Make a `Recipe` of what its file holds; sections and errors are those of `load_recipe`."""
    check_keys(sections, _names_of(Recipe), "recipe")
    for name in ("model", "stages"):
        if not sections.get(name):
            raise ValueError(f"recipe has no section `{name}`; expected one.")
    check_type(sections.get("seed", 0), int, "`seed`")
    if "prompts" in sections:
        check_type(sections["prompts"], dict[str, str], "`prompts`")
    if "generation" in sections:
        _check_mapping(sections["generation"], "`generation`")
    model = _parse_model(sections["model"])
    for name in ("tokenizer", "image_processor"):
        if name in sections:
            _check_mapping(sections[name], f"`{name}`")
        elif model.is_fresh:
            raise ValueError(f"recipe has no section `{name}`; expected one, which a model from nothing takes.")
    if "tokenizer" in sections and not model.is_fresh:
        raise ValueError("recipe has a section `tokenizer`, but the model has one; expected to leave it out.")
    if "eval_data" in sections:
        check_section(sections["eval_data"], "`eval_data`")
    check_type(sections["stages"], list, "`stages`")
    stages = [_parse_stage(stage, number) for number, stage in enumerate(sections["stages"], start=1)]
    names = [stage.name for stage in stages]
    if len({unicodedata.normalize("NFKC", name).casefold() for name in names}) < len(names):
        raise ValueError(
            f"`stages` are called {', '.join(names)}; expected a name of its own for each, be letters small or large."
        )
    return Recipe(**{**sections, "model": model, "stages": stages})


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """Say where the contents of two recipes differ first; None if they do not.

    Args:
        old: The content of one of them, from `read_yaml`.
        new: The content of the other.
        name: The place of both in their recipes.

    Returns:
        Words such as "`stages[1].training.max_steps` is 10, was 20".
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        missing = object()
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            was, now = old.get(key, missing), new.get(key, missing)
            if was is missing or now is missing:
                return f"`{inner}` is {'new' if was is missing else 'gone'}"
            if difference := first_difference(was, now, inner):
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"`{name}` has {len(new)} entries, had {len(old)}"
        pairs = enumerate(zip(old, new, strict=True))
        return next((found for i, pair in pairs if (found := first_difference(*pair, f"{name}[{i}]"))), None)
    return None if old == new else f"`{name}` is {new!r:.80}, was {old!r:.80}"


def _parse_model(section: Any) -> ModelSection:
    _check_mapping(section, "`model`")
    if "pretrained" in section:
        required = ["pretrained"]
        check_keys(section, [*required, *TRAINED_WITH], "`model`")
    elif "vlm" in section:
        required = ["vlm"]
    else:
        required = ["vision", "text"] if {"vision", "text"} & set(section) else ["vision_config", "text_config"]
    if missing := [name for name in required if name not in section]:
        raise ValueError(
            f"`model` has no `{missing[0]}`; expected `pretrained`, or `vlm`, or `vision` and `text`, or "
            "`vision_config` and `text_config`."
        )
    for name in required:
        if name in ("vision_config", "text_config"):
            _check_mapping(section[name], f"`{name}` in `model`")
        else:
            check_type(section[name], str, f"`{name}` in `model`")
    check_type(section.get("attn_implementation", ""), str, "`attn_implementation` in `model`")
    check_type(section.get("dtype", "float32"), Literal["float32", "bfloat16", "float16"], "`dtype` in `model`")
    optional = {"gguf_file": str, "num_hidden_layers": int, "trim_vocabulary": int} if "text" in required else {}
    for name in set(optional) & set(section):
        check_type(section[name], optional[name], f"`{name}` in `model`")
    taken = {name: section[name] for name in (*required, *optional, *TRAINED_WITH) if name in section}
    return ModelSection(**taken, config={name: value for name, value in section.items() if name not in taken})


def _parse_stage(section: Any, number: int) -> Stage:
    own = _names_of(Stage, without=["kind", "options"])
    check_keys(section, [*own, *STAGE_KINDS], f"stage {number}")
    for name in ("name", "train_data", "training"):
        if name not in section:
            raise ValueError(f"stage {number} comes without `{name}`; expected one.")
    check_type(section["name"], str, f"`name` of stage {number}")
    if not _FOLDER_NAME.fullmatch(section["name"]) or len(section["name"].encode()) > 100:
        raise ValueError(f"`name` of stage {number} is {section['name']!r}; expected a name for a folder.")
    of_stage = f"of stage `{section['name']}`"
    check_type(section.get("image_size", 1), int, f"`image_size` {of_stage}")
    if not 1 <= section.get("image_size", 1) <= MAX_IMAGE_SIZE:
        raise ValueError(f"`image_size` {of_stage} is {section['image_size']}; expected 1 to {MAX_IMAGE_SIZE} pixels.")
    check_type(
        section.get("text_attention", "causal"), Literal["causal", "bidirectional"], f"`text_attention` {of_stage}"
    )
    sources = section["train_data"] if isinstance(section["train_data"], list) else [section["train_data"]]
    if not sources:
        raise ValueError(f"`train_data` {of_stage} is an empty list; expected at least one source.")
    for source in sources:
        check_section(source, f"`train_data` {of_stage}")
    for name in ("embedding", "collator", "training", *STAGE_KINDS):
        if name in section:
            _check_mapping(section[name], f"`{name}` {of_stage}")
    caching = _parse_caching(section.get("cache_features"), f"`cache_features` {of_stage}")
    default, *others = kinds = [*STAGE_KINDS]
    given = [name for name in (*others, default) if name in section]
    if len(given) > 1:
        raise ValueError(f"`{given[0]}` and `{given[1]}` {of_stage} exclude each other; expected one of them.")
    kind = given[0] if given else default
    taken = {name: value for name, value in section.items() if name not in kinds}
    taken |= {"train_data": sources, "kind": kind, "options": section.get(kind, {}), "cache_features": caching}
    return Stage(**taken)


def _parse_caching(section: Any, where: str) -> FeatureCaching | None:
    if section is None or section is False:
        return None
    section = {} if section is True else section
    check_keys(section, _names_of(FeatureCaching), where)
    caching = FeatureCaching(**section)
    check_type(caching.views, int, f"`views` in {where}")
    check_type(caching.texts, bool, f"`texts` in {where}")
    check_type(caching.folder, str | None, f"`folder` in {where}")
    if caching.views < 1:
        raise ValueError(f"`views` in {where} is {caching.views}; expected 1 or more.")
    return caching


def _names_of(dataclass_type: type, without: Iterable[str] = ()) -> list[str]:
    return [own.name for own in fields(dataclass_type) if own.name not in without]


def _check_mapping(section: object, where: str) -> None:
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} is {section!r:.80}; expected a mapping.")
