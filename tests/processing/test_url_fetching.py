"""URLs are fetched only where that was asked for, within limits, and never from inside the network."""

import http.server
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mmgem.processing import url_fetching
from mmgem.processing.image_loading import load_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
_BUFFER = io.BytesIO()
PICTURE.save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()
HERE = ["127.0.0.1"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        place = self.path.strip("/")
        if place == "bad-status":
            self.wfile.write(b"GARBAGE\r\n\r\n")
            return
        if place.startswith("to-"):
            target = {
                "to-ftp": "ftp://127.0.0.1/x.png",
                "to-file": "file:///etc/passwd",
                "to-localhost": "http://localhost/x",
            }
            self.send_response(302)
            self.send_header("Location", target.get(place, "/picture"))
            self.end_headers()
            return
        self.send_response(404 if place == "nothing" else 200)
        if place in ("short", "long"):
            self.send_header("Content-Length", str(len(PNG) + 100 if place == "short" else 10**12))
        self.end_headers()
        self.wfile.write(PNG[:50] if place == "slow" else PNG)
        if place == "slow":
            self.wfile.flush()
            time.sleep(0.3)
            self.wfile.write(PNG[50:])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", ["picture", "to-picture"])
def test_a_host_that_is_named_is_asked(url, place):
    assert np.array_equal(np.asarray(load_image(f"{url}/{place}", allow_urls=HERE)), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("place", "allow_urls", "message"),
    [
        ("picture", False, "is a URL, and fetching is off; expected a file, or `allow_urls`"),
        ("picture", [], "fetching is off"),
        ("picture", True, "cannot be fetched: '127.0.0.1' is 127.0.0.1, which is no public address"),
        ("picture", ["example.org"], "'127.0.0.1' is none of the hosts in `allow_urls`"),
        ("nothing", HERE, "cannot be fetched: HTTP Error 404"),
        ("bad-status", HERE, "cannot be fetched: GARBAGE"),
        ("short", HERE, r"it ends after \d+ of \d+ bytes"),
        ("long", HERE, "it is 1,000,000,000,000 bytes long"),
        ("to-ftp", HERE, "`ftp` is not fetched"),
        ("to-file", HERE, "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to-localhost", HERE, "'localhost' is none of the hosts"),
    ],
)
def test_what_is_not_fetched(url, place, allow_urls, message):
    with pytest.raises(ValueError, match=rf"`images\[2\]` .*{message}"):
        load_image(f"{url}/{place}", "images[2]", allow_urls=allow_urls)


@pytest.mark.parametrize(
    "text", ["ftp://example.org/a.png", "file:///etc/a.png", "FILE:///etc/a.png", "HTTP://127.0.0.1/"]
)
def test_other_kinds_of_urls_are_no_paths(text):
    with pytest.raises(ValueError, match="fetching is off"):
        load_image(text)
    with pytest.raises(ValueError, match="cannot be fetched"):
        load_image(text, allow_urls=True)


def test_one_host_is_a_list_of_one(url):
    with pytest.raises(TypeError, match="`allow_urls` is '127.0.0.1'; expected True, False or a list of hosts"):
        load_image(f"{url}/picture", allow_urls="127.0.0.1")


def test_limits_of_size_and_time(url, monkeypatch):
    monkeypatch.setattr(url_fetching, "MAX_URL_BYTES", 20)
    with pytest.raises(ValueError, match="above 20 bytes long"):
        load_image(f"{url}/picture", allow_urls=HERE)
    monkeypatch.setattr(url_fetching, "MAX_URL_BYTES", 2**20)
    monkeypatch.setattr(url_fetching, "URL_SECONDS", 0.1)
    with pytest.raises(ValueError, match="cannot be fetched: .*(timed out|took more than 0.1 seconds)"):
        load_image(f"{url}/slow", allow_urls=HERE)


PRIVATE = ["127.0.0.1", "0.0.0.0", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"]
PRIVATE += ["::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fd00::1", "::"]


@pytest.mark.parametrize("number", PRIVATE)
def test_no_name_leads_into_the_network(monkeypatch, number):
    monkeypatch.setattr(url_fetching.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (number, 80))])
    with pytest.raises(ValueError, match=f"'pictures.example.org' is {number}, which is no public address"):
        load_image("https://pictures.example.org/a.png", allow_urls=True)


def test_the_processor_fetches_what_it_is_told_to(url, tiny_processor, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"`images\[0\]` .*fetching is off"):
        tiny_processor(images=f"{url}/picture")
    monkeypatch.setattr(tiny_processor, "allow_urls", HERE)
    assert tiny_processor(images=f"{url}/picture", return_tensors="pt")["pixel_values"].shape[0] == 1
    tiny_processor.save_pretrained(tmp_path)
    assert type(tiny_processor).from_pretrained(tmp_path).allow_urls is False
