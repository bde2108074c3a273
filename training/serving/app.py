"""The routes of a server, and their answers in the shapes of OpenAI and Cohere."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from mmgem.training.search.index import SearchIndex
from mmgem.training.search.row_search import Hit
from mmgem.training.serving.answers import Answer, ChatSettings, until_stop
from mmgem.training.serving.inputs import ModelInput
from mmgem.training.serving.limits import Gate, Limits, error_body, error_response
from mmgem.training.serving.schemas import ChatCompletions, CohereEmbed, OpenAIEmbeddings, Searches, refusal
from mmgem.training.serving.server import Server

READING = ["GET", "HEAD"]
COHERE_PROMPTS = {"search_query": "query", "search_document": "document"}


def create_app(
    name: str,
    model,
    processor,
    index: SearchIndex | None = None,
    limits: Limits = Limits(),
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """Builds the application; arguments as for `Server`, and `allow_origins` as for `serve`."""
    server = Server(name, model, processor, index, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.close()
        server.readers.shutdown(cancel_futures=True)

    app = FastAPI(title="mmgem", lifespan=lifespan)
    app.add_middleware(Gate, limits=limits, observe=server.observe)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _answer_errors(app)
    for add_routes in (_add_status, _add_embeddings, _add_chat, _add_search):
        add_routes(app, server)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Whatever is refused or fails is answered with a sentence, in the shape of its route."""

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(request.url.path, 422, refusal(list(error.errors())))

    @app.exception_handler(HTTPException)
    @app.exception_handler(ValueError)
    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else None
        status, sentence = _status_of(error)
        if status == 400:  # from FastAPI, which says no more
            sentence = (
                "the body cannot be read; expected a JSON object in UTF-8, without deep nesting or huge numbers."
            )
        if status in (404, 405) and sentence == HTTPStatus(status).phrase:  # from whoever looks for the route
            paths = [route.path for route in app.routes if isinstance(route, APIRoute)]
            sentence = f"{request.method} {request.url.path} is not known here; expected {', '.join(paths)}."
        return error_response(request.url.path, status, sentence, headers)


def _add_status(app: FastAPI, server: Server) -> None:
    """The routes that say how the server is, and which model it has."""
    card = {"id": server.name, "object": "model", "created": int(time.time()), "owned_by": "mmgem"}

    @app.api_route("/health", methods=READING)
    async def health() -> JSONResponse:
        is_alive = server.worker.is_alive
        status = "ok" if is_alive else "the model has stopped"
        body = {"status": status, "model": server.name, "in_work": server.worker.in_work}
        return JSONResponse(body, 200 if is_alive else 503)

    @app.api_route("/metrics", methods=READING)
    async def metrics() -> Response:
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/v1/models", methods=READING)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    @app.api_route("/v1/models/{model_name:path}", methods=READING)
    async def one_model(model_name: str) -> JSONResponse:
        server.check_model(model_name)
        return JSONResponse(card)


def _add_embeddings(app: FastAPI, server: Server) -> None:
    """The routes that embed texts and images, as OpenAI's and as Cohere's."""
    prompts = server.model.config.prompts or {}

    @app.post("/v1/embeddings")
    async def embeddings(request: OpenAIEmbeddings) -> JSONResponse:
        server.check_model(request.model)
        if request.prompt_name is not None and request.prompt_name not in prompts:
            known = f"one of {', '.join(map(repr, prompts))}" if prompts else "none, as the model has no prompts"
            raise ValueError(f"`prompt_name` is {request.prompt_name!r}; expected {known}.")
        prompt = "" if request.prompt_name is None else prompts[request.prompt_name]
        _check_dimensions("dimensions", request.dimensions, server.model)
        vectors, count = await server.embed(request.input, "input", prompt=prompt)
        encode = _ENCODINGS[request.encoding_format]
        data = []
        for number, rows in enumerate(vectors):
            encoded = [encode(row) for row in _shorten(rows, request.dimensions)]
            own = {"embeddings": encoded} if request.return_multivector else {"embedding": encoded[0]}
            data.append({"object": "embedding", "index": number} | own)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": server.name, "usage": usage})

    @app.post("/v2/embed")
    async def embed_as_cohere(request: CohereEmbed) -> JSONResponse:
        server.check_model(request.model)
        _check_dimensions("output_dimension", request.output_dimension, server.model)
        prompt = prompts.get(COHERE_PROMPTS.get(request.input_type, ""), "")
        given = next(part for part in ("texts", "images", "inputs") if getattr(request, part) is not None)
        inputs, is_cut = request.embedding_inputs(), request.truncate == "END"
        vectors, count = await server.embed(inputs, given, prompt=prompt, is_cut=is_cut)
        rows = [_shorten(row, request.output_dimension)[0] for row in vectors]
        found = {kind: [_ENCODINGS[kind](row) for row in rows] for kind in request.embedding_types}
        num_images = sum(1 if isinstance(item.image, str) else len(item.image or ()) for item in inputs)
        units = {"input_tokens": count, "images": num_images}
        meta = {"api_version": {"version": "2"}, "billed_units": units}
        body = {"id": uuid.uuid4().hex, "response_type": "embeddings_by_type", "embeddings": found}
        return JSONResponse(body | {"texts": request.texts or [], "meta": meta})


def _add_chat(app: FastAPI, server: Server) -> None:
    """The route that writes about images, at once or in pieces."""

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletions) -> Response:
        server.check_model(request.model)
        read, settings = await server.read_chat(request)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if request.stream:
            with_usage = request.stream_options is not None and request.stream_options.include_usage
            head["object"] = "chat.completion.chunk"
            return StreamingResponse(_stream(server, head, read, settings, with_usage), media_type="text/event-stream")
        answer = await server.write(read, settings)
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
        head["object"] = "chat.completion"
        return JSONResponse(head | {"choices": [choice], "usage": _usage(read, answer)})


def _add_search(app: FastAPI, server: Server) -> None:
    """The route that searches the index."""

    @app.post("/search")
    async def search(request: Searches) -> JSONResponse:
        if server.index is None:
            raise HTTPException(404, "there is no index here; expected a server with `--index`.")
        root = Path(server.index.facts.folder)

        def shown(hit: Hit) -> dict[str, Any]:
            path = hit.path.relative_to(root).as_posix()
            return {"score": round(hit.score, 6), "path": path, "row": hit.row, **hit.details}

        answers = await server.search([request] if request.queries is None else request.queries)
        found = [{"hits": list(map(shown, hits))} for hits in answers]
        return JSONResponse(found[0] if request.queries is None else {"results": found})


async def _stream(
    server: Server, head: dict, read: ModelInput, settings: ChatSettings, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events with the pieces of an answer."""
    streamer = settings.streamer
    assert streamer is not None

    def event(delta: dict | None, finish: str | None = None, **more: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
        return f"data: {json.dumps(head | {'choices': choices} | more)}\n\n"

    writing = asyncio.ensure_future(server.write(read, settings))
    # The streamer does not end by itself where writing fails.
    writing.add_done_callback(lambda _: streamer.text_queue.put_nowait(streamer.stop_signal))
    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in until_stop(streamer, settings.stop):
            if piece:
                yield event({"content": piece})
        answer = await writing
    except Exception as error:  # whose status would come too late
        yield f"data: {json.dumps(error_body('', *_status_of(error)))}\n\n"
        return
    finally:
        writing.cancel()
    yield event({}, _finish(answer))
    if with_usage:
        yield event(None, usage=_usage(read, answer))
    yield "data: [DONE]\n\n"


def _status_of(error: Exception) -> tuple[int, str]:
    """The status and the sentence of what was raised."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, ValueError):
        return 422, " ".join(str(error).split())
    return 500, f"the server failed with a {type(error).__name__}; its log says where."


def _check_dimensions(name: str, dimensions: int | None, model) -> None:
    if dimensions is not None and dimensions > model.embedding_dim:
        raise ValueError(f"`{name}` is {dimensions}; expected 1 to {model.embedding_dim}, what the model gives.")


def _shorten(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first values of each of (k, D) vectors, of unit length again."""
    if dimensions is None:
        return vectors
    vectors = vectors[:, :dimensions]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


_ENCODINGS: dict[str, Callable[[np.ndarray], Any]] = {
    "float": lambda vector: vector.tolist(),
    "base64": _base64,
    "ubinary": lambda vector: np.packbits(vector > 0).tolist(),
    "binary": lambda vector: (np.packbits(vector > 0).astype(np.int16) - 128).tolist(),
}


def _finish(answer: Answer) -> str:
    return "length" if answer.is_cut else "stop"


def _usage(read: ModelInput, answer: Answer) -> dict[str, int]:
    counts = {"prompt_tokens": read.num_tokens, "completion_tokens": answer.num_tokens}
    return counts | {"total_tokens": sum(counts.values())}
