"""A line of the log holds no secret."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.logs import without_secrets

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(secret=HEX, before=st.text(max_size=20), after=st.text(max_size=20))
def test_token_is_hidden_wherever_it_stands(secret: str, before: str, after: str) -> None:
    """The secret half of a token is never in a line; its id may be."""
    line = without_secrets(f"{before} ww_0123456789abcdef_{secret} {after}")
    assert secret not in line
    assert "ww_0123456789abcdef_[hidden]" in line


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"url": "redis://user:pass@host/0"}', '{"url": "redis://user:[hidden]@host/0"}'),
        ("postgresql+psycopg://u:p%40ss@h/db", "postgresql+psycopg://u:[hidden]@h/db"),
        ("redis://:geheim@host", "redis://:[hidden]@host"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer [hidden]"),
        ("authorization: basic dXNlcjpwYXNz", "authorization: basic [hidden]"),
        ('{"path": "/jobs/job_0", "status": 200}', '{"path": "/jobs/job_0", "status": 200}'),
        ("http://127.0.0.1:8000/jobs", "http://127.0.0.1:8000/jobs"),
        ("a bearer of news", "a bearer of news"),
    ],
)
def test_line_is_shown_as(line: str, shown: str) -> None:
    """Passwords in URLs and credentials behind their scheme go; the rest stays as it is."""
    assert without_secrets(line) == shown
