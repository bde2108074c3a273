"""The requests that a server takes: those of OpenAI's and Cohere's clients, and a search."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

Role = Literal["system", "user", "assistant"]
Whole = Annotated[int, Strict()]  # true is not 1
Number = Annotated[float, Strict()]
# What clients write into a chat though it asks for nothing: these values of fields that are not known here.
OF_NO_EFFECT: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "logprobs": [False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "store": [False],
}


class Request(BaseModel):
    """A request, or a part of it, that holds nothing else than what it may hold. A field that is null is left out, as
    some clients write it (LiteLLM).
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        return {name: v for name, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class EmbeddingInput(Request):
    """What one embedding is of: a text, an image or several with a text, or a part of an image.

    Args:
        text: The text.
        image: The data URI of an image, or its URL where the server fetches them; with a text also several of them.
        boxes: `[x0, y0, x1, y1]` in pixels, parts that are seen instead of the image; one where there is no text.
    """

    text: str | None = None
    image: str | list[str] | None = None
    boxes: list[list[Number]] | None = None

    @model_validator(mode="after")
    def _check(self) -> "EmbeddingInput":
        if self.text is None and not self.image:
            raise ValueError("an input has neither `text` nor `image`; expected one of them, or both.")
        if self.text is None and isinstance(self.image, list):
            raise ValueError(f"`image` holds {len(self.image)} images without a `text`; expected one image.")
        if self.boxes is not None and not isinstance(self.image, str):
            raise ValueError("`boxes` came without the one `image` that they lie in; expected it.")
        if self.boxes is not None and (not self.boxes or self.text is None and len(self.boxes) != 1):
            raise ValueError(f"`boxes` holds {len(self.boxes)} boxes; expected one, or several with a `text`.")
        return self


class OpenAIEmbeddings(Request):
    """`POST /v1/embeddings`, as OpenAI's; an input may also be an `EmbeddingInput`.

    Args:
        input: A text, the data URI of an image, an object with both, or a list of any of them.
        model: The name of the served model; may be left out.
        dimensions: The first values of each vector that are kept, brought to unit length again (Matryoshka).
        encoding_format: Vectors as lists of numbers, or as the base64 text of little-endian float32.
        prompt_name: Of the model's prompts, the one that stands before the texts.
        return_multivector: Whether all vectors of an input are returned, as `embeddings`, instead of the first.
        user: Of no meaning here.
    """

    input: list[EmbeddingInput]
    model: str | None = None
    dimensions: Whole | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    prompt_name: str | None = None
    return_multivector: bool = False
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        for number, item in enumerate(values):
            if isinstance(item, int | list):
                raise ValueError(
                    f"`input[{number}]` is {item!r:.40}, in tokens; expected text, since the tokens of another model "
                    "mean something else here."
                )
        return [_read_string(item) if isinstance(item, str) else item for item in values]


class CohereContent(Request):
    """A part of an input: `text`, or `image_url` with its `url`."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check(self) -> "CohereContent":
        if (self.text is None) == (self.type == "text") or ("url" in (self.image_url or {})) == (self.type == "text"):
            raise ValueError(f"a part of type {self.type!r} lacks its content or has another's; expected its own.")
        return self

    @property
    def url(self) -> str:
        """The data URI, or URL, of the image."""
        assert self.image_url is not None
        return self.image_url["url"]


class CohereInput(Request):
    """An input of texts and images, which are embedded together."""

    content: list[CohereContent] = Field(min_length=1)


class CohereEmbed(Request):
    """`POST /v2/embed`, as Cohere's.

    Args:
        input_type: `search_query` and `search_document` put the model's prompts `query` and `document` before texts.
        texts, images, inputs: One of them.
        model: The name of the served model; may be left out.
        embedding_types: `float`, `base64` (of float32), `ubinary` and `binary` (the signs, eight to a byte).
        output_dimension: As `dimensions` of OpenAI's.
        truncate: `END` cuts a text that is too long, `NONE` refuses it.
    """

    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"]
    texts: list[str] | None = None
    images: list[str] | None = None
    inputs: list[CohereInput] | None = None
    model: str | None = None
    embedding_types: list[Literal["float", "base64", "ubinary", "binary"]] = ["float"]
    output_dimension: Whole | None = Field(None, ge=1)
    truncate: Literal["NONE", "END"] = "END"

    @model_validator(mode="after")
    def _check(self) -> "CohereEmbed":
        given = [name for name in ("texts", "images", "inputs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the request has {' and '.join(given) or 'none'} of `texts`, `images` and `inputs`; expected one."
            )
        return self

    def embedding_inputs(self) -> list[EmbeddingInput]:
        """What is to be embedded."""
        found = [EmbeddingInput(text=text) for text in self.texts or []]
        found += [EmbeddingInput(image=image) for image in self.images or []]
        for item in self.inputs or []:
            texts = [part.text for part in item.content if part.text is not None]
            images = [part.url for part in item.content if part.type == "image_url"]
            image = images[0] if len(images) == 1 else images or None
            found.append(EmbeddingInput(text="\n".join(texts) if texts else None, image=image))
        return found


class ImageURL(Request):
    """The data URI of an image, or its URL where the server fetches them."""

    url: str
    detail: str | None = None


class ContentPart(Request):
    """A part of a message: `text`, or `image_url`."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _check(self) -> "ContentPart":
        if (self.text if self.type == "text" else self.image_url) is None:
            raise ValueError(f"a part of type {self.type!r} has no `{self.type}`; expected it.")
        return self


class Message(Request):
    """A turn of a conversation."""

    role: Role
    content: str | list[ContentPart]
    name: str | None = None

    def parts(self) -> list[ContentPart]:
        """Its texts and images, in order."""
        return [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(Request):
    """Whether the stream ends with the counted tokens."""

    include_usage: bool = False


class ChatCompletions(Request):
    """`POST /v1/chat/completions`, as OpenAI's.

    Args:
        messages: The conversation. What the model was trained to read of it, its chat template says.
        model: The name of the served model; may be left out.
        max_completion_tokens, max_tokens: At how many tokens the answer is cut; by default 128.
        temperature: 0, the default, takes the likeliest token, as does less than 0.001; above it, tokens are sampled.
        top_p: Of the sampled ones, the likeliest that have this probability together.
        seed: Of the sampling.
        stop: Texts before the first of which the answer ends.
        stream: Whether the answer comes in pieces, as server-sent events.
        stream_options: Of the stream.
        n: One answer.
        user: Of no meaning here.
    """

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_completion_tokens: Whole | None = Field(None, ge=1)
    max_tokens: Whole | None = Field(None, ge=1)
    temperature: Number = Field(0.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    seed: Whole | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _without_what_has_no_effect(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value not in OF_NO_EFFECT.get(name, [])}


class Search(Request):
    """`POST /search`: what to look for in the index.

    Args:
        text: A text; with an image, what is said about it.
        image: The data URI of an image, or its URL where the server fetches them.
        boxes: Of the image, the part that is looked for, or, with a text, the parts that it speaks about.
        prompt_name: Of the model's prompts, the one that stands before the text.
        vectors, query_vectors: How many of the first vectors of an image and of the query are compared.
        kinds, lexical_weight: As for `SearchIndex.search`.
        where: Conditions, see `Condition.parse`.
        top: The number of answers.
    """

    text: str | None = None
    image: str | list[str] | None = None
    boxes: list[list[Number]] | None = None
    prompt_name: str | None = None
    vectors: Whole | None = None
    query_vectors: Whole | None = None
    kinds: list[str] | None = None
    where: list[str] | None = None
    lexical_weight: Number | None = None
    top: Whole = Field(10, ge=1, le=1000)


class Searches(Search):
    """`POST /search`: one search, or several.

    Args:
        queries: The searches, in place of all other fields.
    """

    queries: list[Search] | None = None

    @model_validator(mode="after")
    def _check_alone(self) -> "Searches":
        if self.queries is not None and len(self.model_fields_set) > 1:
            others = sorted(self.model_fields_set - {"queries"})
            raise ValueError(f"`{others[0]}` is given beside `queries`; expected it in each of them.")
        return self


def _read_string(text: str) -> dict[str, str]:
    """A plain string is a text, also where it is the URL of something, and an image only as a data URI."""
    return {"image": text} if text.startswith("data:image/") else {"text": text}


def refusal(errors: list[dict[str, Any]]) -> str:
    """The most telling of pydantic's errors as a sentence."""
    # Where a value may be of several types there is one of each, in a place with the name of the type.
    error = max(errors, key=lambda error: (error["type"] == "value_error", len(error["loc"])))
    parts = [part for part in error["loc"][1:] if part != "str" and "[" not in str(part)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    message, kind = error["msg"], error["type"]
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "json_invalid":
        return f"the body is no JSON ({error.get('ctx', {}).get('error', message)}); expected a JSON object."
    if not place:
        return f"the body is {error.get('input')!r:.80}; expected a JSON object with `Content-Type: application/json`."
    if kind == "extra_forbidden":
        return f"`{place}` is not known here; expected a request without it."
    if kind == "missing":
        return f"`{place}` is missing; expected it."
    expected = message.removeprefix("Input should be ")
    return f"`{place}` is {error.get('input')!r:.80}; expected {expected[:1].lower()}{expected[1:]}."
