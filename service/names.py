"""
File names that strangers chose: for display, and never for a path of ours.

A name that passes here goes into a header, a ``sha256sum -c`` line, a report and a terminal, so it holds
nothing that any of these acts on: no path, no quote, no control or direction character.
"""

import re
import unicodedata
from urllib.parse import quote

MAX_NAME_CHARACTERS = 120
# File systems end at 255 bytes; what we append to a name ("-clean-candidate12") must still fit.
MAX_NAME_BYTES = 200


def display_name(given: str | None, *, default: str) -> str:
    """Return a client's file name without anything that a shell, a terminal or a header could act on."""
    name = re.split(r"[/\\]", given or "")[-1]
    name = unicodedata.normalize("NFC", name)
    name = re.sub(r"[^\w.()+ -]", "_", name).strip(" .")[-MAX_NAME_CHARACTERS:]
    # The end is kept, because the suffix is there; a character that was cut in half goes.
    name = name.encode()[-MAX_NAME_BYTES:].decode(errors="ignore")
    return name.lstrip("-. ") or default


def content_disposition(name: str, *, kind: str = "attachment") -> str:
    """
    Return a header that names the download for old and new clients alike (RFC 6266, RFC 8187).

    The plain form holds no character that has a meaning in a quoted string, and no per cent sign,
    which some browsers decode there.
    """
    plain = re.sub(r"[^\w.()+ -]", "_", name, flags=re.ASCII)
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
