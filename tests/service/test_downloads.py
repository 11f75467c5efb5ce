"""Which bytes a ``Range`` header asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RangeNotSatisfiable
from service.downloads import ByteRange, etag_matches, requested_range

SIZE = 100


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("bytes=0-", ByteRange(0, 99)),
        ("bytes=0-0", ByteRange(0, 0)),
        ("bytes=99-99", ByteRange(99, 99)),
        ("bytes=50-1000", ByteRange(50, 99)),
        ("bytes=-1", ByteRange(99, 99)),
        ("bytes=-1000", ByteRange(0, 99)),
        (" bytes=0-1 ", ByteRange(0, 1)),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=200-100", None),
        ("bytes=0-1,2-3", None),
        ("bytes=0 - 1", None),
        ("bytes=+1-2", None),
        ("bytes=0x1-2", None),
        ("bytes=1.5-2", None),
        ("bytes=٣-4", None),
        ("lines=0-1", None),
        ("bytes 0-1", None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_header_asks_for(header: str | None, expected: ByteRange | None) -> None:
    """One range that can be read is that range; everything else is the whole file."""
    assert requested_range(header, SIZE) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=-00"])
def test_range_behind_the_end_cannot_be_met(header: str) -> None:
    """A range with no byte of the file in it is refused."""
    with pytest.raises(RangeNotSatisfiable):
        requested_range(header, SIZE)


numbers = st.one_of(st.just(""), st.integers(0, 12).map(str))


@given(first=numbers, last=numbers, size=st.integers(1, 10))
def test_range_is_what_counting_finds(first: str, last: str, size: int) -> None:
    """The range is the bytes of the file that one gets by going through them one by one."""
    if first:
        asked = [n for n in range(size) if int(first) <= n and (not last or n <= int(last))]
        readable = not last or int(first) <= int(last)
    else:
        asked = list(range(size))[-int(last) :] if last and int(last) else []
        readable = bool(last)
    try:
        found = requested_range(f"bytes={first}-{last}", size)
    except RangeNotSatisfiable:
        assert readable
        assert not asked
        return
    if found is None:
        assert not readable
    else:
        assert list(range(found.first, found.last + 1)) == asked


@given(header=st.text(max_size=30), size=st.integers(0, 10))
def test_any_header_is_answered(header: str, size: int) -> None:
    """No text makes anything but a range within the file, the whole file, or a refusal."""
    try:
        found = requested_range(header, size)
    except RangeNotSatisfiable:
        return
    assert found is None or 0 <= found.first <= found.last < size


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        (None, False),
        ("", False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b", "a"', True),
        ("*", True),
        ("a", False),
        ('"A"', False),
        ('"ab"', False),
    ],
)
def test_etag_is_compared_weakly(header: str | None, matches: bool) -> None:
    """``If-None-Match`` is met by any tag in its list, strong or weak."""
    assert etag_matches(header, '"a"') is matches
