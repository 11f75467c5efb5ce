"""What a client may do with a socket, over raw sockets against the running service."""

import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.service.conftest import PROBLEM_MEMBERS
from tests.service.forms import BOUNDARY, encoded, parts
from tests.support.stack import Stack, embedded_stack, wait_for

HEAD_BYTES, HEADERS, TARGET_BYTES = 8192, 40, 2048
FORM = encoded(parts())
FORM_HEAD = (
    b"POST /jobs?dry_run=true HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: multipart/form-data; boundary=" + BOUNDARY.encode() + b"\r\n"
)
GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of the problem document that it must be."""
        assert self.headers["content-type"] == "application/problem+json"
        problem = json.loads(self.body)
        assert set(problem) == PROBLEM_MEMBERS
        assert problem["status"] == self.status
        assert problem["request_id"] == self.headers["x-request-id"]
        assert self.body.endswith(b"}\n")
        return str(problem["code"])


class Client:
    """A socket, and the answers that came out of it."""

    def __init__(self, stack: Stack) -> None:
        port = int(stack.url.rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._stream = self.socket.makefile("rb")

    def send(self, *pieces: bytes) -> None:
        """Send, as far as the other side takes it."""
        try:
            for piece in pieces:
                self.socket.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has had enough; what it answered is what is asked

    def answer(self, *, has_body: bool = True) -> Answer | None:
        """Return the next answer, or nothing where the connection ends instead."""
        try:
            line = self._stream.readline()
            if not line:
                return None
            found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]*\r\n", line)
            assert found, line
            headers = {}
            while (line := self._stream.readline()) != b"\r\n":
                name, value = line.decode().strip().split(": ", 1)
                headers[name.lower()] = value
            size = int(headers.get("content-length", "0")) if has_body else 0
            return Answer(int(found.group(1)), headers, self._stream.read(size))
        except ConnectionResetError:
            return None

    @property
    def is_ended(self) -> bool:
        """Wait until something comes or the connection ends, and return whether it ended."""
        return self.answer() is None

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()
        self.socket.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run one service for all tests, with patience enough for a slow machine."""
    with embedded_stack(
        tmp_path_factory.mktemp("stack"),
        embedded_workers="0",
        max_head_bytes=str(HEAD_BYTES),
        max_headers=str(HEADERS),
        max_target_bytes=str(TARGET_BYTES),
        max_model_bytes=str(1 << 20),
        max_samples_bytes=str(1 << 20),
        max_connections="20",
    ) as running:
        yield running
        log = (running.folder / "service.log").read_text()
        assert "Traceback" not in log, log  # nothing that was sent is a bug of ours
        assert '"level": "error"' not in log


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run a service that waits for nobody."""
    with embedded_stack(
        tmp_path_factory.mktemp("hasty"),
        embedded_workers="0",
        head_timeout_seconds="1",
        keep_alive_seconds="1",
        transfer_window_seconds="1",
        min_transfer_bytes_per_second=str(64 << 10),
    ) as running:
        yield running
        log = (running.folder / "service.log").read_text()
        assert "Traceback" not in log, log


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """Connect to the patient service; afterwards it must be as well as before."""
    with closing(Client(stack)) as found:
        yield found
    with closing(Client(stack)) as other:
        other.send(GET + b"\r\n")
        answer = other.answer()
        assert answer is not None
        assert answer.status == 200


# Heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"GET /" + b"a" * TARGET_BYTES + b" HTTP/1.1\r\n", 414, "target-too-long"),
        (b"GET /?" + b"a" * TARGET_BYTES, 414, "target-too-long"),
        (GET + b"X: 1\r\n" * (HEADERS + 1), 431, "head-too-large"),
        (GET + b"X: " + b"a" * HEAD_BYTES + b"\r\n\r\n", 431, "head-too-large"),
        (GET + b"X: " + b"a" * HEAD_BYTES, 431, "head-too-large"),
        (GET + b"X" * (HEAD_BYTES + 1), 431, "head-too-large"),
        (b"\r\n" * HEAD_BYTES, 431, "head-too-large"),
        (b"GARBAGE\r\n\r\n", 400, "malformed-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed-request"),
        (b"GET /healthz HTTP/9.9\r\n\r\n", 400, "malformed-request"),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed-request"),
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed-request"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 400, "malformed-request"),
        (GET + b"a b: 1\r\n\r\n", 400, "malformed-request"),
        (GET + b" folded: 1\r\n\r\n", 400, "malformed-request"),
        (GET + b"X: a\0b\r\n\r\n", 400, "malformed-request"),
        (GET + b"X: a\rb\r\n\r\n", 400, "malformed-request"),
        (GET + b"Content-Length: -1\r\n\r\n", 400, "malformed-request"),
        (GET + b"Content-Length: 1, 1\r\n\r\n", 400, "malformed-request"),
        (GET + b"Content-Length: 99999999999999999999999\r\n\r\n", 400, "malformed-request"),
        (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "malformed-request"),
        (GET + b"Host: 127.0.0.1\r\n\r\n", 400, "malformed-request"),
        (GET + b"Range: bytes=0-\r\nRange: bytes=1-\r\n\r\n", 400, "malformed-request"),
    ],
)
def test_head_is_refused(client: Client, head: bytes, status: int, code: str) -> None:
    """A head that is too large, or no HTTP, is refused by a problem document, and the connection ends."""
    client.send(head)
    answer = client.answer()
    assert answer is not None
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["connection"] == "close"
    assert client.is_ended


def test_head_within_the_limits_is_read_in_any_pieces(client: Client) -> None:
    """A head that comes byte by byte, and one that is nearly as large as may be, are heads."""
    for byte in GET + b"\r\n":
        client.send(bytes([byte]))
    client.send(GET + b"X: " + b"a" * (HEAD_BYTES - 200) + b"\r\n\r\n")
    assert [answer and answer.status for answer in (client.answer(), client.answer())] == [200, 200]


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    """Requests that do not wait for each other's answers get one each."""
    nowhere = b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    client.send(GET + b"\r\n" + nowhere + GET + b"\r\n")
    answers = [client.answer() for _ in range(3)]
    assert [answer and answer.status for answer in answers] == [200, 404, 200]


# Bodies --------------------------------------------------------------------------------------------


def chunked(body: bytes, size: int = 4096) -> Iterator[bytes]:
    """Return *body* as chunks."""
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        yield b"%x\r\n" % len(piece) + piece + b"\r\n"
    yield b"0\r\n\r\n"


SMUGGLED = b"0\r\n\r\nDELETE /jobs/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding:\r\n chunked\r\n",
        b"Content-Length: +4\r\n",
        b"Content-Length: 0x4\r\n",
        b"Content-Length: 4 4\r\n",
        b"Content-Length: 4\r\ncontent-length: 5\r\n",
    ],
)
def test_body_that_can_be_measured_in_two_ways_is_refused(client: Client, framing: bytes) -> None:
    """Where a body ends must be beyond doubt, or what follows could be smuggled past a proxy."""
    client.send(FORM_HEAD + framing + b"\r\n" + SMUGGLED)
    answer = client.answer()
    assert answer is not None
    assert answer.status == 400
    assert answer.code in {"malformed-request", "not-multipart"}
    assert client.is_ended  # the second request is not looked at


def test_chunked_form_is_a_form(client: Client) -> None:
    """A body in chunks is as good as one with a length, and the connection goes on behind it."""
    client.send(FORM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunked(FORM))
    client.send(GET + b"\r\n")
    assert [answer and answer.status for answer in (client.answer(), client.answer())] == [200, 200]


@pytest.mark.parametrize("size", [b"fffffffffffffffff", b"-1", b"0x10", b"g", b"1 1", b""])
def test_chunk_of_no_size_is_refused(client: Client, size: bytes) -> None:
    """A chunk's size is a hexadecimal number; anything else ends the connection."""
    client.send(FORM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", size + b"\r\nabc\r\n")
    answer = client.answer()
    assert answer is None or answer.status == 400


def test_endless_body_is_cut_off(client: Client) -> None:
    """Chunks are counted up to the limit; then the client is told, and cut off."""
    head = FORM[: FORM.index(b"\r\n\r\n") + 4]
    client.send(
        FORM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % len(head) + head + b"\r\n"
    )
    sent, piece = 0, b"10000\r\n" + bytes(0x10000) + b"\r\n"
    try:
        for _ in range(4096):  # 256 MiB, where 5 are allowed
            client.socket.sendall(piece)
            sent += len(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert sent < 4096 * len(piece)


def test_length_beyond_the_limit_is_refused_unread(client: Client) -> None:
    """A body that says it is too large is answered before a byte of it."""
    client.send(FORM_HEAD + b"Content-Length: 99999999999\r\n\r\n")
    answer = client.answer()
    assert answer is not None
    assert (answer.status, answer.code) == (413, "too-large")
    assert client.is_ended


def test_answer_is_read_by_who_only_looks_after_sending(client: Client) -> None:
    """A refusal reaches a client that sends its whole body before it looks."""
    body = b"x" * (6 << 20)
    client.send(FORM_HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body)
    answer = client.answer()
    assert answer is not None
    assert answer.code == "too-large"


@pytest.mark.parametrize("length", [len(FORM) - 1, len(FORM) - 100, 10])
def test_length_that_is_too_small_cuts_the_form(client: Client, length: int) -> None:
    """What is behind the announced length is no part of the form."""
    client.send(FORM_HEAD + b"Content-Length: %d\r\n\r\n" % length + FORM)
    answer = client.answer()
    assert answer is not None
    if length >= len(FORM) - 2:  # only the last line break is missing, which nothing needs
        assert answer.status == 200
    else:
        assert answer.code == "not-multipart"


def test_length_that_is_too_large_ends_with_the_connection(client: Client) -> None:
    """Bytes that were announced and never come make no form of what came."""
    client.send(FORM_HEAD + b"Content-Length: %d\r\n\r\n" % (len(FORM) + 10) + FORM)
    client.socket.shutdown(socket.SHUT_WR)
    answer = client.answer()
    assert answer is None or answer.status == 400


def test_expectation_is_met_only_for_a_form_that_will_be_read(client: Client) -> None:
    """``100 Continue`` is sent for a form, and not for what is refused by its head."""
    expects = b"Expect: 100-continue\r\n"
    client.send(FORM_HEAD + expects + b"Content-Length: %d\r\n\r\n" % len(FORM))
    interim = client.answer()
    assert interim is not None
    assert interim.status == 100
    client.send(FORM)
    answer = client.answer()
    assert answer is not None
    assert answer.status == 200
    client.send(FORM_HEAD.replace(b"true", b"perhaps") + expects + b"Content-Length: 1000\r\n\r\n")
    refused = client.answer()
    assert refused is not None
    assert refused.status == 422
    assert client.is_ended


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def test_upgrade_is_not_followed(client: Client) -> None:
    """A client that would like another protocol is answered in this one."""
    client.send(GET + UPGRADE + b"\r\n")
    answer = client.answer()
    assert answer is not None
    assert answer.status == 200
    assert client.is_ended


def test_upgrade_with_a_body_is_refused(client: Client) -> None:
    """It cannot be told whose protocol the body is in, so the client is told to ask without it."""
    client.send(FORM_HEAD + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(FORM) + FORM)
    answer = client.answer()
    assert answer is not None
    assert answer.code == "malformed-request"
    assert b"Upgrade" in answer.body
    assert client.is_ended


# Time ----------------------------------------------------------------------------------------------


def gone_after(client: Client) -> float:
    """Wait until the service has ended the connection, and return the seconds."""
    started = time.monotonic()
    while client.answer() is not None:
        pass
    return time.monotonic() - started


@pytest.mark.parametrize(
    "start", [b"", b"G", GET, GET + b"\r\n", GET + b"\r\n\r\n", GET + b"\r\nGET /"]
)
def test_idle_socket_is_cut(hasty: Stack, start: bytes) -> None:
    """Whoever sends nothing, half a head, or nothing after an answer, loses the connection."""
    with closing(Client(hasty)) as client:
        client.send(start)
        assert gone_after(client) < 50  # before its own patience ends


def drip(client: Client, drops: Iterable[bytes]) -> bytes:
    """Send *drops*, a tenth of a second apart, until something is answered; return all of that."""
    client.socket.settimeout(0.1)
    for drop in drops:
        client.send(drop)
        try:
            received = client.socket.recv(4096)
            break
        except TimeoutError:
            continue
    client.socket.settimeout(60)
    while more := client.socket.recv(4096):
        received += more
    return received


def test_head_in_drops_is_cut(hasty: Stack) -> None:
    """A head that goes on for ever is answered with 408, however steadily it comes."""
    with closing(Client(hasty)) as client:
        client.send(GET)
        received = drip(client, [b"X: 1\r\n"] * 600)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"too-slow"' in received


def test_slow_upload_is_cut(hasty: Stack) -> None:
    """A form that comes in drops is answered with 408, and leaves nothing on the disk."""
    with closing(Client(hasty)) as client:
        client.send(FORM_HEAD + b"Content-Length: %d\r\n\r\n" % len(FORM))
        received = drip(client, (FORM[place : place + 1] for place in range(600)))
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"too-slow"' in received
    uploads = hasty.folder / "var" / "uploads"
    wait_for(lambda: not list(uploads.rglob("model")) or None)


def test_reader_who_does_not_read_is_cut(hasty: Stack) -> None:
    """Whoever asks again and again and takes no answer loses the connection, and holds nothing."""
    with closing(Client(hasty)) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.socket.settimeout(1)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

        def is_cut() -> bool | None:
            try:
                client.socket.sendall(request * 50)
            except TimeoutError:
                return None  # both buffers are full: it no longer reads either
            except (BrokenPipeError, ConnectionResetError):
                return True
            return None

        wait_for(is_cut)


# Places --------------------------------------------------------------------------------------------


def test_connections_have_a_limit(stack: Stack) -> None:
    """When all places are taken a client is told to come back, and can when one is free again."""
    held: Sequence[Client] = [Client(stack) for _ in range(20)]
    try:
        for client in held:
            client.send(GET)

        def told() -> Answer | None:
            with closing(Client(stack)) as other:
                return other.answer()

        answer = wait_for(told)
        assert (answer.status, answer.code) == (503, "busy")
        assert int(answer.headers["retry-after"]) > 0
    finally:
        for client in held:
            client.close()

    def is_served() -> bool | None:
        with closing(Client(stack)) as other:
            other.send(GET + b"\r\n")
            found = other.answer()
            return (found is not None and found.status == 200) or None

    assert wait_for(is_served)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Stack]:
    """Run a service that receives one upload at a time."""
    with embedded_stack(tmp_path, embedded_workers="0", max_uploads="1") as running:
        yield running


def test_uploads_have_a_limit(crowded: Stack) -> None:
    """While one form is on its way another one is told to come back, and is taken afterwards."""
    first, length = Client(crowded), b"Content-Length: %d\r\n\r\n" % len(FORM)
    with closing(first):
        first.send(FORM_HEAD + b"Expect: 100-continue\r\n" + length)
        interim = first.answer()
        assert interim is not None
        assert interim.status == 100  # it holds the place now
        with closing(Client(crowded)) as second:
            second.send(FORM_HEAD + length + FORM)
            answer = second.answer()
            assert answer is not None
            assert (answer.status, answer.code) == (503, "busy")
        first.send(FORM)
        taken = first.answer()
        assert taken is not None
        assert taken.status == 200
    with closing(Client(crowded)) as third:
        third.send(FORM_HEAD + length + FORM)
        answer = third.answer()
        assert answer is not None
        assert answer.status == 200
