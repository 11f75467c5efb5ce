"""A form is read in one way only, in pieces of any size, and within limits that it cannot move."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import NotMultipart
from common.settings import Settings
from service.uploads import Form, _Reader, announced_boundary
from tests.service.conftest import Service, problem_of
from tests.service.forms import BOUNDARY, content_type, encoded, parts

HONEST = encoded(parts())
DELIMITER = f"--{BOUNDARY}".encode()


def with_header(line: bytes) -> bytes:
    """Return a form whose last part, a plain field, has another header."""
    at = HONEST.rindex(b"\r\n\r\n")
    return HONEST[:at] + b"\r\n" + line.removesuffix(b"\r\n") + HONEST[at:]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(HONEST.replace(b"\r\n", b"\n"), id="bare line feeds"),
        pytest.param(b"x" + HONEST, id="a byte before the first delimiter"),
        pytest.param(bytes(66 << 10) + b"\r\n", id="long preamble"),
        pytest.param(with_header(b"Content-Type: multipart/mixed; boundary=y"), id="nested form"),
        pytest.param(with_header(b'Content-Disposition: form-data; name="x"'), id="two names"),
        pytest.param(with_header(b"Content-Length: 1"), id="part longer than it says"),
        pytest.param(with_header(b"Content-Length: 99"), id="part shorter than it says"),
        pytest.param(with_header(b"Content-Length: -1"), id="part of a negative length"),
        pytest.param(with_header(b"no colon"), id="header without a colon"),
        pytest.param(with_header(b"X\xff: 1"), id="header that is no text"),
        pytest.param(with_header(b"X: " + bytes(9000)), id="long header"),
        pytest.param(with_header(b"X: 1\r\n" * 8), id="many headers"),
        pytest.param(with_header(b" folded" * 1200), id="long folded header"),
        pytest.param(
            DELIMITER + b'\r\nContent-Disposition: attachment; name="model"\r\n\r\n\r\n',
            id="no form-data",
        ),
    ],
)
def test_hostile_form_is_refused(service: Service, body: bytes) -> None:
    """What could be read in two ways, or has headers without an end, is no form."""
    answer = service.client.post("/jobs", content=body, headers=content_type())
    problem_of(answer, 400, "not-multipart")
    assert service.left_behind() == []


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[_Reader]:
    """Return a reader of a form."""
    found = _Reader(BOUNDARY, Settings(), tmp_path)
    yield found
    found.close()


def read(reader: _Reader, body: bytes, size: int) -> Form:
    """Read *body* in pieces."""
    for start in range(0, len(body), size):
        reader.feed(body[start : start + size])
    return reader.form()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1 << 20])
def test_pieces_of_any_size_are_one_form(reader: _Reader, size: int) -> None:
    """However a body is cut on its way, the form is the same."""
    form = read(reader, b"\r\n" + HONEST + b"\r\n", size)
    assert {name: file.sha256 for name, file in form.files.items()} == {
        part.name: hashlib.sha256(part.content).hexdigest() for part in parts() if part.filename
    }
    assert form.texts == {"architecture": "small_cnn"}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        DELIMITER + b'\r\nContent-Disposition: form-data; name="model"; x="',
        DELIMITER + b'\r\nContent-Disposition: form-data; name="model"\r\nX: ' + b"\r\n " * 9000,
        HONEST,
    ],
    ids=["preamble", "header", "folded header", "epilogue"],
)
def test_bytes_of_no_part_are_not_gathered(reader: _Reader, head: bytes) -> None:
    """What is no part's content is refused long before it could fill the memory."""
    taken = 0
    with pytest.raises(NotMultipart):  # noqa: PT012 - how far it gets is what is asked
        reader.feed(head or b" ")
        for _ in range(1000):
            reader.feed(b" " * 4096)
            taken += 4096
    assert taken <= 128 << 10


@pytest.mark.parametrize(
    "boundary",
    [
        "x",
        "a" * 70,
        '"a b"',
        "'()+_,-./:=?",
        '"==\'()+_,-./:=?"',
        "----WebKitFormBoundary7MA4YWxkTrZu0gW",
        "------------------------d74496d66958873e",
    ],
)
def test_boundary_of_the_standard_is_read(boundary: str) -> None:
    """What RFC 2046 allows is taken, quoted or as a token."""
    header = f"multipart/form-data; boundary={boundary}"
    if not boundary.startswith('"') and set(boundary) & set("()/:=?,"):
        header = f'multipart/form-data; boundary="{boundary}"'
    assert announced_boundary(header) == boundary.strip('"')


@pytest.mark.parametrize(
    "announced",
    [
        "boundary=a; boundary=b",
        "boundary=a; Boundary=b",
        'boundary="a "',
        'boundary="a;b"',
        'boundary="a\\"b"',
        'boundary="a\r\nb"',
        'boundary="é"',
        'boundary=""',
        "boundary=" + "a" * 71,
        "boundary=" + "a" * 100_000,
    ],
)
def test_boundary_beside_the_standard_is_refused(announced: str) -> None:
    """A boundary that is long, odd or there twice is none."""
    with pytest.raises(NotMultipart):
        announced_boundary(f"multipart/form-data; {announced}")
