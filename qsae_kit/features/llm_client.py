"""Questions to a server that speaks OpenAI's chat protocol, with a key that stays between the two.

Nothing that a server says is trusted: where it sends one on, how long its answer is, how slowly
it comes.
"""

import asyncio
import contextlib
import email.utils
import ipaddress
import json
import queue
import random
import re
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias, TypeVar

import httpx

Ask: TypeAlias = Callable[[list[dict[str, str]]], str]
"""Chat messages ({"role", "content"}) -> the answer's text."""

MAX_BYTES = 4 * 2**20
"""Of an answer that is read, as it comes and unpacked."""
TRIES = 4
"""Of one question, at most."""
FIRST_WAIT = 0.5
"""Seconds before the second try, doubled for each further one; drawn from once to twice that."""
TOO_BUSY = (429, 500, 502, 503, 504)
"""Statuses after which a question is asked again."""
LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
"""Errors of a connection after which a question is asked again."""
MAX_SAID = 200
"""Characters that an error quotes of what a server or a library says."""
LEAST_SECRET = 16
"""Characters from which a key is masked in answers too: a shorter one ("EMPTY") may be a word."""
EXAMPLE = '"http://127.0.0.1:8000/v1"'
"""An address, for errors."""
MAX_ADDRESS = 4096
"""Characters of an address: httpx takes 65,536, when they are quoted with up to twelve for one."""
MAX_PORT = 2**16 - 1
GZIP = 16
"""Added to zlib's window bits: gzip's header is before what is packed."""
HOST = re.compile(r"(?=.{1,254}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
"""A host's name that name servers can hold; httpx takes nearly anything."""

_jitter = random.Random()
_T = TypeVar("_T")


class Tried(NamedTuple):
    """What one try of a question brought."""

    text: str = ""
    error: str = ""
    """A sentence; empty where `text` is the answer."""
    again: bool = False
    """Whether another try may bring more."""
    wait: float = 0.0
    """Seconds that the server wants to be left alone before that."""


class _Unreadable(ValueError):
    """An answer that is none; says why."""


def openai_chat(
    url: str, model: str, key: str = "", timeout: float = 120.0, *, plain_http: bool = False
) -> Ask:
    """Asks a server that speaks OpenAI's chat protocol: `url` + "/chat/completions", temperature 0.

    url: http or https, without user:password@ and fragment; a query (?api-version=...) is sent
    along, and httpx logs it at level INFO. key: sent as a bearer token; over plain http only to
    this machine (localhost, 127.0.0.0/8, ::1), unless `plain_http` allows it everywhere.
    timeout: seconds for one question in all, with name resolution, further tries and waiting.

    A question is asked up to `TRIES` times where the server is busy (`TOO_BUSY`) or the connection
    is lost, after waiting for `FIRST_WAIT` seconds, longer each time, and at least as long as
    Retry-After says. Redirects are not followed, more than `MAX_BYTES` are not read. The
    environment's proxies (HTTPS_PROXY, NO_PROXY, ...) serve all but plain http to this machine;
    credentials of a .netrc are not used. Errors show neither the key nor the query.

    Raises ValueError at once for an address, key or timeout that cannot be used, and when asked
    where no answer comes. What it returns may be called by several threads, also where an asyncio
    loop is running.
    """
    return _Server(url, model, key, timeout, plain_http).ask


class _Server:
    """One server, and what errors must not show; no dataclass, whose repr would show the key."""

    def __init__(self, url: str, model: str, key: str, timeout: float, plain_http: bool) -> None:
        if not (isinstance(timeout, int | float) and 0 < timeout <= threading.TIMEOUT_MAX):
            raise _error(
                f"timeout={timeout!r} was given",
                "give the seconds that a question may take, more than 0 and finite",
            )
        key = (key or "").strip()  # None comes from os.environ.get
        if not (key.isascii() and key.isprintable()):
            raise _error(
                "The key that was given has characters inside that are not printable ASCII",
                "copy it anew",
            )
        parsed = _parsed(url)
        path, _, query = parsed.raw_path.decode().partition("?")
        path = path.rstrip("/")
        values = [value or name for name, _, value in map(_pair, query.split("&"))]
        known = (key, *values, *map(urllib.parse.unquote_plus, values))
        self.secrets = [secret for secret in known if secret]
        place = f"{parsed.scheme}://{parsed.netloc.decode()}{path}"
        self.name = f"The server at {_masked(place, self.secrets)!r}"
        plain, here = parsed.scheme == "http", _is_here(parsed.raw_host.decode())
        if plain and key and not here and not plain_http:
            raise _error(
                f"{self.name} was given with a key, which plain http shows to all on the way",
                "give an address with https://, or plain_http=True where you trust the network",
            )
        target = f"{path}/chat/completions" + (f"?{query}" if query else "")
        self.url = parsed.copy_with(raw_path=target.encode())
        self.model, self.key, self.timeout = model, key, timeout
        # A proxy for plain http to this machine would be another machine that sees the key.
        self.proxies = not (plain and here)

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to chat messages; `openai_chat` says what it raises."""
        until = time.monotonic() + self.timeout
        tried = _within(self.timeout, self._asked(messages, until))
        if tried is None:
            raise _error(
                f"{self.name} gave no answer within {self.timeout:g} seconds",
                "give a larger timeout or try again later",
            )
        if tried.error:
            raise ValueError(tried.error)
        return _masked(tried.text, [self.key] if len(self.key) >= LEAST_SECRET else [])

    async def _asked(self, messages: list[dict[str, str]], until: float) -> Tried:
        """What the last try brought; no exception leaves it, whose text could hold a secret."""
        try:
            question = {"model": self.model, "messages": messages, "temperature": 0}
            body = json.dumps(question).encode()
        except Exception as error:
            given = f"Messages were given that JSON cannot hold ({type(error).__name__})"
            return Tried(error=_sentence(given, 'give dicts of texts, "role" and "content"'))
        try:
            async with httpx.AsyncClient(
                timeout=None,
                trust_env=self.proxies,
                event_hooks={"response": [self._mask_location]},
            ) as client:
                return await self._tries(client, body, until)
        except Exception as error:
            given = f"The environment's proxies or certificates fail ({type(error).__name__})"
            names = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR"
            return Tried(error=_sentence(given, f"check {names}"))

    async def _tries(self, client: httpx.AsyncClient, body: bytes, until: float) -> Tried:
        tried = await self._try(client, body)
        for n in range(TRIES - 1):
            wait = max(tried.wait, FIRST_WAIT * 2**n * (1 + _jitter.random()))
            if not tried.again or time.monotonic() + wait >= until:
                break
            await asyncio.sleep(wait)
            tried = await self._try(client, body)
        return tried

    async def _try(self, client: httpx.AsyncClient, body: bytes) -> Tried:
        # gzip only: httpx unpacks without bounds, `_read` within them.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            request = client.stream(
                "POST", self.url, content=body, headers=headers, follow_redirects=False
            )
            async with request as response:
                if response.is_success:
                    return Tried(text=_content(await _read(response)))
                return await self._refusal(response)
        except Exception as error:
            own = isinstance(error, _Unreadable)
            why = self._quoted(str(error) if own else f"{type(error).__name__}: {error}")
            given = f"{self.name} gave no answer that could be read ({why})"
            told = _sentence(given, "check address and model")
            return Tried(error=told, again=isinstance(error, LOST))

    async def _mask_location(self, response: httpx.Response) -> None:
        """Before httpx takes it apart: a part of it, as in its errors, may be a part of the key."""
        if "Location" in response.headers:
            masked = _masked(response.headers["Location"], self.secrets)
            response.headers["Location"] = masked

    async def _refusal(self, response: httpx.Response) -> Tried:
        status = response.status_code
        if response.next_request:
            to = response.next_request.url
            place = self._quoted(f"{to.scheme}://{to.netloc.decode()}")
            given = f"{self.name} redirects to {place} (status {status}), which is not followed"
            return Tried(error=_sentence(given, "give that address, if it may have the key"))
        said = await _said(response)
        given = f"{self.name} answered with status {status}"
        given += f", {self._quoted(said)}" if said else ""
        return Tried(
            error=_sentence(given, "check address, model and key"),
            again=status in TOO_BUSY,
            wait=_seconds(response.headers.get("Retry-After", "")),
        )

    def _quoted(self, text: str) -> str:
        """Text of others for an error, masked before it is cut, which could leave half a secret."""
        return repr(_masked(text, self.secrets)[:MAX_SAID])


def _sentence(given: str, do: str) -> str:
    return f"{given}; {do}."


def _error(given: str, do: str) -> ValueError:
    return ValueError(_sentence(given, do))


def _pair(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _parsed(url: str) -> httpx.URL:
    """An address that can be asked. Raises ValueError without any of it, which may be secret."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        parsed = None
    # Raised out here: an exception keeps the one that it is raised within, and so the address.
    if not url.isprintable() or " " in url:
        raise _error("An address with spaces or control characters was given", "give it without")
    if len(url) > MAX_ADDRESS:
        raise _error(
            f"An address of {len(url)} characters was given", f"give one of at most {MAX_ADDRESS}"
        )
    if not url.lower().startswith(("http://", "https://")):
        raise _error(
            "An address was given that is none of a server, which begins with http:// or https://",
            f"give one such as {EXAMPLE}",
        )
    if parsed is None:
        raise _error(
            "An address was given that cannot be taken apart",
            f"give scheme, host and path, as in {EXAMPLE}",
        )
    if parsed.userinfo:
        raise _error(
            "An address with a user or password was given", "give it without, and a key as key="
        )
    if "#" in url:
        raise _error("An address with a fragment was given", "leave out # and what follows")
    host = parsed.raw_host.decode()
    if not HOST.fullmatch(host) and not _address(host):
        raise _error(
            "An address was given whose host cannot exist",
            "give a name of letters, digits, hyphens and dots, or an IP address",
        )
    if parsed.port is not None and not 0 < parsed.port <= MAX_PORT:
        raise _error(f"An address with port {parsed.port} was given", f"give 1 to {MAX_PORT}")
    return parsed


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    """Whether what is sent to it stays on this machine."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _masked(text: str, secrets: list[str]) -> str:
    """Without the secrets, as they are and as URLs, JSON and Python write them, in any case."""
    forms: set[str] = set()
    for secret in secrets:
        forms |= {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        forms |= {urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return re.sub(pattern, "***", text, flags=re.IGNORECASE) if pattern else text


async def _read(response: httpx.Response) -> bytes:
    """The body, unpacked. Raises _Unreadable beyond `MAX_BYTES` and for a packing but gzip."""
    packing = response.headers.get("Content-Encoding", "identity").lower()
    if packing not in ("identity", "gzip"):
        raise _Unreadable(f"it is packed as {packing!r} though gzip was asked for")
    packed = packing == "gzip"
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | GZIP)
    read, body = 0, bytearray()
    async for part in response.aiter_raw():
        read += len(part)
        body += unpacker.decompress(part, MAX_BYTES + 1 - len(body)) if packed else part
        if max(read, len(body)) > MAX_BYTES:
            raise _Unreadable(f"it is longer than {MAX_BYTES} bytes")
    if packed and not unpacker.eof:
        raise _Unreadable("it is packed and ends too early")
    return bytes(body)


def _content(body: bytes) -> str:
    """The text of a completion's first choice. Raises _Unreadable where there is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise _Unreadable("it is not JSON") from None
    match found:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return text
    raise _Unreadable('it has no text at ["choices"][0]["message"]["content"]')


async def _said(response: httpx.Response) -> str:
    """What a refusal says for people: OpenAI's {"error": {"message"}} or what others make of it."""
    try:
        found = json.loads(await _read(response))
    except (httpx.HTTPError, ValueError, RecursionError, zlib.error):
        return ""
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def _seconds(after: str) -> float:
    """Retry-After in seconds, which it gives as such or as a date (past: below 0); else 0."""
    if re.fullmatch("[0-9]+", after):
        return float(after)
    try:
        date = email.utils.parsedate_to_datetime(after)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return (date - datetime.now(UTC)).total_seconds()


def _within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What the coroutine returns, or None where it has not after so many seconds.

    It runs in a thread and loop of its own, as this thread's loop may be running, and is cancelled
    when it is late or this thread is interrupted. Looking up a name cannot be cancelled, so
    nobody waits for the thread.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    found: queue.SimpleQueue[_T] = queue.SimpleQueue()

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            found.put(loop.run_until_complete(task))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    threading.Thread(target=run, name="openai_chat", daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return None
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(task.cancel)
