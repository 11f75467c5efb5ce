"""What becomes of the file names that strangers choose."""

import unicodedata
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.names import (
    MAX_NAME_BYTES,
    MAX_NAME_CHARACTERS,
    content_disposition,
    display_name,
)

ANY = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        (None, "model"),
        ("", "model"),
        ("model.pt", "model.pt"),
        ("modèle (2) v1.0+cu.pt", "modèle (2) v1.0+cu.pt"),
        ("模型.safetensors", "模型.safetensors"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\model.pt", "model.pt"),
        ("/", "model"),
        ("..", "model"),
        (".bashrc", "bashrc"),
        ("-rf", "rf"),
        ("a\r\nSet-Cookie: x=1.pt", "a__Set-Cookie_ x_1.pt"),
        ("a\0.pt", "a_.pt"),
        ("a\x1b[31m.pt", "a__31m.pt"),
        ('a";b.pt', "a__b.pt"),
        ("$(id).pt", "_(id).pt"),
        ("`id`|x&y;z.pt", "_id__x_y_z.pt"),
        ("<script>.pt", "_script_.pt"),
        ("a\u202etp.exe", "a_tp.exe"),
        ("a\u2066b\u2069.pt", "a_b_.pt"),
        ("a\u200b\ufeff.pt", "a__.pt"),
        ("a\u2028b.pt", "a_b.pt"),
        ("a%0d%0ab.pt", "a_0d_0ab.pt"),
        ("x" * 500 + ".pt", "x" * (MAX_NAME_CHARACTERS - 3) + ".pt"),
    ],
)
def test_name_is_shown_as(given_name: str | None, shown: str) -> None:
    """Letters of any script stay; paths go, and so does whatever a program could act on."""
    assert display_name(given_name, default="model") == shown


@given(given_name=ANY)
def test_any_name_becomes_a_plain_one(given_name: str) -> None:
    """What is shown fits a file system, stands on one line, names no folder and starts no option."""
    shown = display_name(given_name, default="model")
    assert shown
    assert len(shown) <= MAX_NAME_CHARACTERS
    assert len(shown.encode()) <= MAX_NAME_BYTES
    assert shown[0] not in "-. "
    assert not set(shown) & set("/\\\"'`$<>&|;:*?%")
    assert {unicodedata.category(character)[0] for character in shown} <= {"L", "N", "P", "S", "Z"}
    assert shown.isprintable()
    assert display_name(shown, default="model") == shown


@given(name=ANY.filter(bool))
def test_disposition_is_one_header_line(name: str) -> None:
    """Whatever the name, the header is one line of printable ASCII that says it twice."""
    header = content_disposition(name)
    assert header.isascii()
    assert header.isprintable()
    start, plain, rest = header.split('"')
    assert start == "attachment; filename="
    assert not set(plain) & set("\\%/;")
    assert rest.startswith("; filename*=UTF-8''")
    assert unquote(rest.removeprefix("; filename*=UTF-8''")) == name
