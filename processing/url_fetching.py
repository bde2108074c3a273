"""Pictures from the web, fetched only where that was asked for, and never from inside the network of this machine."""

import ipaddress
import socket
import time
from collections.abc import Collection
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

URL_SECONDS = 30.0  # for all of a picture, redirects included
MAX_URL_BYTES = 64 * 2**20
_CHUNK = 2**16

AllowedURLs = bool | Collection[str]


def is_url(text: str) -> bool:
    """Whether a text is a URL, also of a kind that is not fetched (`ftp:`, `file:`)."""
    return (
        isinstance(text, str) and text.split("://", 1)[0].lower() in ("http", "https", "ftp", "file") and "://" in text
    )


def fetch(url: str, label: str, allow_urls: AllowedURLs) -> bytes:
    """Fetches a picture.

    Args:
        url: Of `http` or `https`. Up to ten redirects are followed, each held to the same rules.
        label: What error messages call the picture.
        allow_urls: True for every host with a public address, or the names of the hosts that are allowed, which may
            then be private. False for none.

    Raises:
        ValueError: If the URL is not allowed, the answer is no whole file of at most `MAX_URL_BYTES` within
            `URL_SECONDS`, or the host is on the loopback, a private network or the like.
    """
    if not allow_urls:
        raise ValueError(f"{label} is a URL, and fetching is off; expected a file, or `allow_urls`.")
    if isinstance(allow_urls, str):
        raise TypeError(f"`allow_urls` is {allow_urls!r}; expected True, False or a list of hosts.")
    hosts = None if allow_urls is True else frozenset(host.lower() for host in allow_urls)
    deadline = time.monotonic() + URL_SECONDS
    handlers = (ProxyHandler({}), _Redirects(hosts), _handler(hosts, HTTPConnection), _handler(hosts, HTTPSConnection))
    try:
        _check(url, hosts)
        # Some hosts refuse the default agent of urllib.
        request = Request(url, headers={"User-Agent": "mmgem"})
        with build_opener(*handlers).open(request, timeout=URL_SECONDS) as response:
            return _read(response, deadline)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"{label} cannot be fetched: {error}; expected the URL of an image.") from error


def _read(response, deadline: float) -> bytes:
    declared = response.headers.get("Content-Length", "")
    length = int(declared) if declared.isdigit() else None
    if length is not None and length > MAX_URL_BYTES:
        raise ValueError(f"it is {length:,} bytes long, above {MAX_URL_BYTES:,}")
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > MAX_URL_BYTES:
            raise ValueError(f"it is above {MAX_URL_BYTES:,} bytes long")
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {URL_SECONDS:g} seconds")
    if length is not None and len(data) < length:
        raise ValueError(f"it ends after {len(data):,} of {length:,} bytes")
    return bytes(data)


def _check(url: str, hosts: frozenset[str] | None):
    """Refuses other schemes and hosts."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"`{parts.scheme}` is not fetched")
    if hosts is not None and (parts.hostname or "") not in hosts:
        raise ValueError(f"{parts.hostname!r} is none of the hosts in `allow_urls`")


class _Redirects(HTTPRedirectHandler):
    def __init__(self, hosts: frozenset[str] | None):
        self.hosts = hosts

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check(newurl, self.hosts)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _handler(hosts: frozenset[str] | None, connection_class: type[HTTPConnection]):
    """A handler of urllib whose connections go to checked addresses."""

    class Connection(connection_class):  # type: ignore[valid-type, misc]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # The address that is checked is the one that is connected to: a name may have another one the next time.
            self._create_connection = lambda address, *rest: _connect(address, hosts, *rest)

    if connection_class is HTTPConnection:

        class Handler(HTTPHandler):
            def http_open(self, req):
                return self.do_open(Connection, req)

        return Handler()

    class SecureHandler(HTTPSHandler):
        def https_open(self, req):
            return self.do_open(Connection, req)

    return SecureHandler()


def _connect(address: tuple[str, int], hosts: frozenset[str] | None, *rest) -> socket.socket:
    host, port = address
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    # A host that is named is trusted to be where it is.
    public = [number for number in found if hosts is not None or _is_public(number)]
    if not public:
        raise ValueError(f"{host!r} is {', '.join(found)}, which is no public address")
    return socket.create_connection((public[0], port), *rest)


def _is_public(number: str) -> bool:
    address = ipaddress.ip_address(number)
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_global and not address.is_multicast
