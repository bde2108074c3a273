"""What a server takes of one request, and the gate that holds requests to it before anything is parsed or embedded."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUSY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_bytes: The longest body of a request.
        max_inputs: Inputs of a request.
        max_pixels: Pixels of one picture.
        max_tokens: Tokens of one text, where the model would take more.
        max_new_tokens: Tokens that are written in answer to a request.
        max_queue: Inputs of all requests that are read, waiting or embedded.
        max_requests: Requests with a body at a time.
        max_batch: Inputs that the model is given at a time.
        max_wait: Seconds that an input waits for others to come with it.
        timeout: Seconds of a request, from its headers to the end of its answer.
    """

    max_bytes: int = 32 * 2**20
    max_inputs: int = 512
    max_pixels: int = 1 << 26
    max_tokens: int = 8192
    max_new_tokens: int = 512
    max_queue: int = 2048
    max_requests: int = 128
    max_batch: int = 32
    max_wait: float = 0.005
    timeout: float = 60.0


def error_body(path: str, status: int, sentence: str) -> dict:
    """An error as OpenAI's clients read it, or Cohere's, which has paths that begin with `/v2/`."""
    body = {"message": sentence}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return body if path.startswith("/v2/") else {"error": body | {"type": kind, "param": None, "code": status}}


def error_response(path: str, status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response with an error."""
    return JSONResponse(error_body(path, status, sentence), status, headers)


class Gate:
    """ASGI middleware that reads the body of a request, up to the limits of bytes and time, before the server sees it;
    and that ends the work on a request whose time is over, or whose client has gone.

    Args:
        app: The application behind it.
        limits: The limits.
        observe: Called with route, status and seconds of each request that has ended.
    """

    def __init__(self, app: ASGIApp, limits: Limits, observe: Callable[[str, int, float], None]):
        self.app = app
        self.limits = limits
        self.observe = observe
        self.open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # of a client that has gone before it was answered

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        has_body = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        self.open_requests += has_body
        try:
            if has_body and self.open_requests > self.limits.max_requests:
                raise HTTPException(
                    503, f"{self.limits.max_requests} requests are being answered; expected a later one.", BUSY
                )
            await self._pass_on(scope, receive, send_and_note)
        except HTTPException as error:
            if status == 499:
                response = error_response(scope["path"], error.status_code, error.detail, dict(error.headers or {}))
                await response(scope, receive, send_and_note)
        except asyncio.CancelledError:  # by a server that ends, and has waited as long as it does
            if status != 499:
                raise
            response = error_response(scope["path"], 503, "the server is ending; expected a later request.", BUSY)
            await response(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            self.open_requests -= has_body
            route = getattr(scope.get("route"), "path", "other")
            self.observe(route, status, time.monotonic() - started)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, seconds = asyncio.get_running_loop(), self.limits.timeout
        deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                body = await self._read(scope, receive)
        except TimeoutError as error:
            raise HTTPException(
                408, f"the body of the request took more than {seconds:g} seconds; expected it sooner."
            ) from error
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            return await asyncio.shield(gone)

        gone = asyncio.ensure_future(_until_gone(receive))
        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({work, gone}, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work  # which raises what it has raised
            elif not gone.done():
                raise HTTPException(
                    503, f"no answer within {seconds:g} seconds; expected a smaller request or a later one.", BUSY
                )
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None if the client has gone."""
        limit, headers = self.limits.max_bytes, dict(scope["headers"])
        if (encoding := headers.get(b"content-encoding", b"identity").decode("latin-1")) != "identity":
            raise HTTPException(415, f"`Content-Encoding` is {encoding!r:.40}; expected a body as it is.")
        declared = headers.get(b"content-length", b"")
        body = bytearray()
        if declared.isdigit() and int(declared) > limit:
            raise HTTPException(413, f"the body has {int(declared):,} bytes; expected at most {limit:,}.")
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > limit:
                raise HTTPException(413, f"the body has more than {limit:,} bytes; expected at most as many.")
            if not message.get("more_body", False):
                return bytes(body)
        return None


async def _until_gone(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message
