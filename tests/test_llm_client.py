"""Questions to servers that are busy, broken, slow or curious; all of them on this machine."""

import asyncio
import contextlib
import email.utils
import gzip
import json
import math
import signal
import socket
import struct
import threading
import time
import tracemalloc
from urllib.parse import quote, unquote

import pytest

from qsae_kit import openai_chat
from qsae_kit.features import llm_client

ASKED = [{"role": "user", "content": "What is it?"}]
KEY = "sk-Proj/0123456789+abc"
TOLERANCE = 0.5
"""Seconds beyond a timeout."""
LAST = 2.0
"""Seconds in which a server notices that nobody listens."""


class Server:
    """Answers the nth connection with the nth of its replies, then with the last one again.

    replies: bytes, or functions that take the connection and the request's bytes.
    """

    def __init__(self, *replies):
        self.replies, self.requests, self.times = replies, [], []
        self.left = threading.Event()
        """Set when somebody hung up on a reply."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            head, request = b"", b""
            while not head or (b"POST" in head and not request.endswith(b"}")):
                part = connection.recv(65536)
                if not part:
                    return
                request += part
                head, end, _ = request.partition(b"\r\n\r\n")
                head = head if end else b""
            self.times.append(time.monotonic())
            self.requests.append(request)
            reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
            try:
                reply(connection, request) if callable(reply) else connection.sendall(reply)
            except OSError:
                self.left.set()

    def close(self):
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def serve():
    servers = []

    def start(*replies):
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Little waiting between tries."""
    monkeypatch.setattr(llm_client, "FIRST_WAIT", 0.005)


def http(body=b"", status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def content(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


OK = http(content("It is a test."))
SLOWLY = b"HTTP/1.1 200 "
"""Begins a status line."""


def busy(status, *headers):
    return http(b"", f"{status} Whatever", *headers)


def drip(begin):
    """Sends what it begins with, then a byte now and then for as long as somebody listens."""

    def reply(connection, request):
        connection.sendall(begin)
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    return reply


def reset(connection, request):
    """Half an answer, then the connection is torn down."""
    connection.sendall(OK[:-5])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def echo(make):
    """Sends what `make` makes of the request's bearer token and target."""

    def reply(connection, request):
        target = request.split(b" ")[1].decode()
        token = request.partition(b"Bearer ")[2].partition(b"\r")[0].decode()
        connection.sendall(make(token, target))

    return reply


def refused(url, *secrets, **how):
    """The one ValueError that asking ends in; its text and its chain hold none of the secrets."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        openai_chat(url, "m", **how)(ASKED)
    error = caught.value
    assert type(error) is ValueError
    assert error.__cause__ is None
    assert error.__context__ is None
    for secret in secrets:
        assert secret.lower() not in repr(error).lower()
    assert "\n" not in str(error)
    return str(error)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_question_and_its_answer(serve):
    server = serve(OK)
    url = server.url + "/?api-version=1"
    assert openai_chat(url, "a-model", f" {KEY}\r\n")(ASKED) == "It is a test."
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions?api-version=1 HTTP/1.1\r\n")
    assert f"\r\nAuthorization: Bearer {KEY}\r\n".encode() in head + b"\r\n"
    assert json.loads(body) == {"model": "a-model", "messages": ASKED, "temperature": 0}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_told_not_followed(serve, status):
    other = serve(OK)
    moved = f"Location: http://{other.host}/v1?token={KEY}"
    server = serve(http(b"", f"{status} Moved", moved))
    told = refused(server.url, KEY, key=KEY)
    assert f"redirects to 'http://{other.host}'" in told
    assert not other.requests
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["sk-a\nX-Other: b", "sk-\x00b", "sk-\x7fb", "sk-☃", "sk-\xadb"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(ValueError, match="not printable ASCII") as caught:
        openai_chat("https://example.com/v1", "m", key)
    assert "sk-" not in repr(caught.value)


ECHOES = {
    "a refusal": lambda token, target: http(
        json.dumps({"error": {"message": f"{token} {token.upper()} {target}"}}).encode(), "401 No"
    ),
    "a refusal in other forms": lambda token, target: http(
        json.dumps({"message": f"{quote(token, safe='')} {unquote(target)}"}).encode(), "404 No"
    ),
    "a long refusal": lambda token, target: http(
        json.dumps({"detail": "." * (llm_client.MAX_SAID - 12) + token + target}).encode(), "400 No"
    ),
    "a redirect": lambda token, target: http(b"", "302 Found", f"Location: /{token}?{target}"),
    "a status line": lambda token, target: f"HTTP/9 {token} {target}\r\n\r\n".encode(),
    "a packing": lambda token, target: http(OK, "200 OK", f"Content-Encoding: {token}{target}"),
    "a port": lambda token, target: http(b"", "302 Found", f"Location: //a:{token}{target}"),
}


@pytest.mark.parametrize("how", ECHOES)
def test_what_a_server_echoes_is_masked(serve, how):
    told = refused(
        serve(echo(ECHOES[how])).url + "?a=tok&api_key=hun%20ter2&tok3n",
        KEY,
        KEY[:7],
        "hun ter2",
        "hun%20ter2",
        "hun+ter2",
        "tok",
        "3n",
        "0123456789",
        key=KEY,
    )
    assert "***" in told or how == "a redirect"


@pytest.mark.parametrize("key", ["sk-0123456789", "sk-01234/56789", "sk-01234@56789"])
def test_a_redirect_to_the_key_is_masked(serve, key):
    moved = echo(lambda token, target: http(b"", "302 Found", f"Location: http://{token}.com/"))
    assert "redirects to 'http://***.com'" in refused(serve(moved).url, "sk-01234", key=key)


def test_an_answer_that_echoes_the_key(serve):
    server = serve(echo(lambda token, target: http(content(f"You sent {token}."))))
    assert openai_chat(server.url, "m", KEY)(ASKED) == "You sent ***."
    assert openai_chat(server.url, "m", "none")(ASKED) == "You sent none."


def test_nothing_of_the_address_but_its_place_is_shown(serve):
    secret = "hunter2"
    for url in (f"http://127.0.0.1:{closed_port()}/v1", serve(busy(404)).url, serve(b"").url):
        told = refused(f"{url}?api_key={secret}", secret)
        assert repr(url) in told
    told = refused(f"{serve(busy(404)).url}/{KEY}", KEY, key=KEY)
    assert "/v1/***'" in told


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://user:hunter2@127.0.0.1/v1", "user or password.*key="),
        ("https://hunter2@example.com", "user or password"),
        ("http://example.com\\@hunter2.com", "user or password"),
        ("http://example.com/v1#hunter2", "fragment"),
        ("http://example.com/v1#", "fragment"),
        ("ftp://hunter2.com/v1", "begins with http"),
        ("hunter2", "begins with http"),
        ("", "begins with http"),
        ("http://", "host cannot exist"),
        ("http:///hunter2", "host cannot exist"),
        ("http://?hunter2", "host cannot exist"),
        ("http://exa mple/hunter2", "spaces or control"),
        ("http://example.com/v1\r\nhunter2", "spaces or control"),
        ("http://example.com/hunter2\u202e", "spaces or control"),
        ("http://[::1", "taken apart"),
        ("http://\u2603", "taken apart"),
        ("http://\ud800hunter2", "spaces or control"),
        ("http://example.com:hunter2/", "taken apart"),
        ("http://1.2.3.999/", "taken apart"),
        ("http://example.com:0/", "port 0"),
        ("http://example.com:65536/", "port 65536"),
        ("http://exa%20mple/", "host cannot exist"),
        ("http://a..b/", "host cannot exist"),
        ("http://" + "a" * 300, "host cannot exist"),
        ("http://" + "a." * 200 + "com", "host cannot exist"),
        ("http://example.com/" + "a" * 65_510, "65529 characters"),
    ],
)
def test_addresses_that_cannot_be_asked(url, match):
    with pytest.raises(ValueError, match=match) as caught:
        openai_chat(url, "m")
    assert type(caught.value) is ValueError
    assert caught.value.__context__ is None
    assert "hunter2" not in repr(caught.value)


def test_a_key_goes_in_the_clear_to_this_machine_only():
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:8000", "[::1]:8000"):
        openai_chat(f"http://{host}/v1", "m", KEY)
    for host in tuple(
        (
            "example.com 10.0.0.1 0.0.0.0 128.0.0.1 [::2] localhost.example.com"
            " 127.0.0.1.example.com 127.example.com"
        ).split()
    ):
        with pytest.raises(ValueError, match="plain_http=True") as caught:
            openai_chat(f"http://{host}/v1", "m", KEY)
        assert KEY not in repr(caught.value)
        openai_chat(f"http://{host}/v1", "m")
        openai_chat(f"http://{host}/v1", "m", KEY, plain_http=True)
        openai_chat(f"https://{host}/v1", "m", KEY)


def test_no_more_is_read_than_the_limit(serve):
    size = 300 * 2**20
    sent = []

    def flood(connection, request):
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // 65536):
            connection.sendall(bytes(65536))
            sent.append(65536)

    server = serve(flood)
    tracemalloc.start()
    told = refused(server.url)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"longer than {llm_client.MAX_BYTES} bytes" in told
    assert len(server.requests) == 1
    assert server.left.wait(LAST)
    assert sum(sent) < size // 4
    assert peak < 4 * llm_client.MAX_BYTES
    just = content("a" * (llm_client.MAX_BYTES - len(content(""))))
    assert len(just) == llm_client.MAX_BYTES
    assert len(openai_chat(serve(http(just)).url, "m")(ASKED)) > 4_000_000
    assert "longer than" in refused(serve(http(just + b" ")).url)


def test_packed_answers(serve):
    zipped = "Content-Encoding: gzip"
    packed = gzip.compress(content("It is a test."))
    server = serve(http(packed, "200 OK", zipped))
    assert openai_chat(server.url, "m")(ASKED) == "It is a test."
    assert b"accept-encoding: gzip\r\n" in server.requests[0].lower()
    assert "ends too early" in refused(serve(http(packed[:-9], "200 OK", zipped)).url)
    assert "could be read" in refused(serve(http(b"no gzip", "200 OK", zipped)).url)
    behind = packed + bytes(llm_client.MAX_BYTES)
    assert "longer than" in refused(serve(http(behind, "200 OK", zipped)).url)
    assert "packed as 'br'" in refused(serve(http(OK, "200 OK", "Content-Encoding: br")).url)
    bomb = gzip.compress(bytes(16 * llm_client.MAX_BYTES))
    assert len(bomb) < 2**17
    server = serve(http(bomb, "200 OK", zipped), OK)
    tracemalloc.start()
    told = refused(server.url)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "longer than" in told
    assert peak < 4 * llm_client.MAX_BYTES


def timed_out(url, timeout=0.3, **how):
    begin = time.monotonic()
    told = refused(url, timeout=timeout, **how)
    assert f"no answer within {timeout:g} seconds" in told
    assert timeout <= time.monotonic() - begin < timeout + TOLERANCE


@pytest.mark.parametrize(
    "begin",
    [
        SLOWLY,
        b"HTTP/1.1 200 OK\r\nX-Slow: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"HTTP/1.1 401 No\r\n\r\n",
    ],
)
def test_slow_answers(serve, begin):
    server = serve(drip(begin))
    timed_out(server.url)
    assert server.left.wait(LAST)
    assert len(server.requests) == 1


def test_a_server_that_says_nothing(serve):
    held = threading.Event()
    timed_out(serve(lambda connection, request: held.wait()).url)
    held.set()


def test_a_name_that_takes_long_to_look_up(monkeypatch):
    held = threading.Event()

    def lookup(*_, **__):
        held.wait()
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    timed_out("https://example.com/v1")
    held.set()
    assert "could be read" in refused("https://example.com/v1", KEY, key=KEY)


def test_waits_count_to_the_timeout(serve, monkeypatch):
    monkeypatch.setattr(llm_client, "FIRST_WAIT", 0.1)
    server = serve(busy(503), drip(SLOWLY))
    timed_out(server.url, timeout=0.5)
    assert len(server.requests) == 2


def test_within_a_running_loop(serve):
    async def cell():
        return openai_chat(serve(busy(503), OK).url, "m")(ASKED)

    assert asyncio.run(cell()) == "It is a test."

    async def slow():
        timed_out(serve(drip(SLOWLY)).url, timeout=0.3)

    asyncio.run(slow())


def test_an_interrupt_ends_the_question(serve):
    server = serve(drip(SLOWLY))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            openai_chat(server.url, "m", timeout=60)(ASKED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert server.left.wait(LAST)


def test_no_thread_stays(serve):
    server = serve(drip(SLOWLY))
    before = {*threading.enumerate()}
    refused(server.url, timeout=0.2)
    for _ in range(20):
        if not [t for t in threading.enumerate() if t.name == "openai_chat" and t not in before]:
            return
        time.sleep(0.1)
    raise AssertionError("A thread is left.")


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, 1e300])
def test_timeouts_that_cannot_be_used(timeout):
    with pytest.raises(ValueError, match="more than 0 and finite"):
        openai_chat("https://example.com/v1", "m", timeout=timeout)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(serve, status):
    server = serve(busy(status), OK)
    assert openai_chat(server.url, "m")(ASKED) == "It is a test."
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize("lost", [reset, b"", OK[:-5]])
def test_lost_connections_are_tried_again(serve, lost):
    server = serve(lost, OK)
    assert openai_chat(server.url, "m")(ASKED) == "It is a test."
    assert len(server.requests) == 2


def test_refused_connections_are_tried_again(serve, monkeypatch):
    monkeypatch.setattr(llm_client, "FIRST_WAIT", 0.3)
    port = closed_port()
    found = []
    ask = openai_chat(f"http://127.0.0.1:{port}", "m")
    thread = threading.Thread(target=lambda: found.append(ask(ASKED)))
    thread.start()
    time.sleep(0.15)
    with socket.create_server(("127.0.0.1", port)) as listener:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(OK)
        thread.join()
    assert found == ["It is a test."]


def test_tries_are_counted(serve):
    server = serve(*[busy(500 + n) for n in (0, 2, 3, 4)], OK)
    assert "answered with status 504" in refused(server.url)
    assert len(server.requests) == llm_client.TRIES == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 204, 304])
def test_other_statuses_are_final(serve, status):
    server = serve(http(b'{"error": "no such model"}', f"{status} No"), OK)
    told = refused(server.url)
    assert len(server.requests) == 1
    if status >= 400:
        assert f"answered with status {status}, 'no such model'" in told


def gaps(server):
    openai_chat(server.url, "m")(ASKED)
    return [later - sooner for sooner, later in zip(server.times, server.times[1:], strict=False)]


def test_waits_grow_and_are_drawn(serve, monkeypatch):
    class Draw:
        def random(self):
            return self.drawn

    draw = Draw()
    monkeypatch.setattr(llm_client, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(llm_client, "_jitter", draw)
    draw.drawn = 0.0
    first, second = gaps(serve(busy(503), busy(503), OK))
    assert first >= 0.1
    assert second >= 0.2
    draw.drawn = 3.0
    (first,) = gaps(serve(busy(503), OK))
    assert first >= 0.4


def test_the_wait_that_a_server_asks_for(serve):
    (gap,) = gaps(serve(busy(429, "Retry-After: 1"), OK))
    assert gap >= 1
    for other in ("soon", "-5", "²", "Wed, 99 Abc 0 25:00:00", "Wed, 21 Oct 2015 07:28:00 -0000"):
        (gap,) = gaps(serve(http(b"", "503 No", f"Retry-After: {other}"), OK))
        assert gap < TOLERANCE
    assert 59 <= llm_client._seconds(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60


@pytest.mark.parametrize("after", ["60", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_beyond_the_timeout_is_not_begun(serve, after):
    server = serve(busy(429, f"Retry-After: {after}"), OK)
    begin = time.monotonic()
    assert "answered with status 429" in refused(server.url, timeout=30)
    assert time.monotonic() - begin < TOLERANCE
    assert len(server.requests) == 1


def deep(n):
    return b'{"choices": [' + b"[" * n + b"]" * n + b"]}"


UNREADABLE = {
    "nothing": b"",
    "no HTTP": b"220 Welcome\r\n",
    "an odd status": b"HTTP/1.1 abc OK\r\n\r\n",
    "an odd version": b"HTTP/3.7 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "an early end": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + content("It"),
    "a late end": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + content("It"),
    "an odd length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n" + content("It"),
    "an odd chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "switching": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "an empty 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "an odd redirect": busy(302, "Location: http://[::1"),
    "an empty body": http(b""),
    "a page": http(b"<html>not JSON"),
    "no UTF-8": http(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "depth": http(deep(100_000)),
    "a long number": http(b"1" * 100_000),
    "a refusal of depth": http(deep(100_000), "400 No"),
    "a refusal of bytes": http(b"\xff\xfe\x00", "400 No"),
    "a refusal of odd shape": http(b'{"error": [1]}', "400 No"),
    "a refusal cut off": b"HTTP/1.1 400 No\r\nContent-Length: 999\r\n\r\n{",
}
SHAPES = [
    *("null", "[]", "1", '"text"', "{}", '{"choices": null}', '{"choices": {}}', '{"choices": []}'),
    *('{"choices": [null]}', '{"choices": ["x"]}', '{"choices": [{}]}', '{"choices": "text"}'),
    *('{"choices": [{"message": null}]}', '{"choices": [{"message": {}}]}'),
    *(f'{{"choices": [{{"message": {{"content": {c}}}}}]}}' for c in ("null", '["x"]', "7", "{}")),
]


@pytest.mark.parametrize("how", UNREADABLE)
def test_answers_that_are_none(serve, how):
    told = refused(serve(UNREADABLE[how]).url, KEY, key=KEY)
    assert told.startswith("The server at 'http://127.0.0.1")
    assert ("answered with status 400;" in told) == how.startswith("a refusal")


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_of_other_shapes(serve, shape):
    assert "has no text at" in refused(serve(http(shape.encode())).url)


def test_messages_that_cannot_be_sent(serve):
    server = serve(OK)
    circle = []
    circle.append(circle)
    for what in (b"bytes", {1}, circle):
        with pytest.raises(ValueError, match="JSON cannot hold"):
            openai_chat(server.url, "m")([{"role": "user", "content": what}])
    assert not server.requests


def test_proxies_of_the_environment(serve, monkeypatch):
    proxy, server = serve(OK), serve(OK)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{proxy.host}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    openai_chat("http://example.invalid/v1", "m")(ASKED)
    line = b"POST http://example.invalid/v1/chat/completions HTTP/1.1\r\n"
    assert proxy.requests[0].startswith(line)
    openai_chat(server.url, "m", KEY)(ASKED)
    assert len(server.requests) == len(proxy.requests) == 1
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:hunter2@[::1")
    told = refused("http://example.invalid/v1", "hunter2")
    assert "HTTPS_PROXY" in told


def test_a_netrc_adds_nothing(serve, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("default login someone password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server = serve(OK)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://{server.host}")
    openai_chat(server.url, "m")(ASKED)
    openai_chat("http://example.invalid/v1", "m")(ASKED)
    assert len(server.requests) == 2
    assert not [request for request in server.requests if b"authorization" in request.lower()]
