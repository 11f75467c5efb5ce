"""
Who is calling: bearer tokens, and the tenant that each stands for.

A token is ``ww_<id>_<secret>``: the id finds the row, the secret of 256 bits is kept as its SHA-256 and
compared in constant time. Without tokens, on loopback, everybody is the tenant ``local``.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.db import Token, now
from common.errors import NotFound, Unauthorised

LOCAL_TENANT = "local"
_TOKEN = re.compile(r"ww_([0-9a-f]{16})_([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Principal:
    """A caller."""

    tenant: str
    token: str  # the token's id; "-" without tokens


LOCAL = Principal(tenant=LOCAL_TENANT, token="-")  # noqa: S106 - an id, not a secret


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What may be shown of a token."""

    id: str
    name: str
    tenant: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def create_token(
    session: Session,
    name: str,
    *,
    tenant: str | None = None,
    expires_in_seconds: float | None = None,
) -> str:
    """
    Make a token and return it; its secret cannot be shown again.

    Raises:
        ValueError: Name or tenant is not a plain word.
    """
    tenant = name if tenant is None else tenant
    for word in (name, tenant):
        if not _NAME.fullmatch(word):
            raise ValueError(
                f"{word!r} is not a name: use up to 64 letters, digits, dots, dashes and underscores"
            )
    token_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    session.add(
        Token(
            id=token_id,
            name=name,
            tenant=tenant,
            secret_sha256=_hash(secret),
            created_at=now(),
            expires_at=None if expires_in_seconds is None else now(expires_in_seconds),
        )
    )
    return f"ww_{token_id}_{secret}"


def list_tokens(session: Session) -> list[TokenInfo]:
    """Return every token, the oldest first, without its secret."""
    return [
        TokenInfo(
            id=row.id,
            name=row.name,
            tenant=row.tenant,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
        )
        for row in session.scalars(select(Token).order_by(Token.created_at, Token.id))
    ]


def revoke_token(session: Session, token_id: str) -> None:
    """
    End a token now.

    Raises:
        NotFound: There is no token with this id that is not revoked already.
    """
    revoked = session.execute(
        update(Token)
        .where(Token.id == token_id, Token.revoked_at.is_(None))
        .values(revoked_at=now())
        .returning(Token.id)
    ).first()
    if revoked is None:
        raise NotFound(f"There is no live token {token_id!r}.")


def authenticate(session: Session, authorization: str | None) -> Principal:
    """
    Return the caller that an ``Authorization`` header proves.

    Raises:
        Unauthorised: It proves nobody; the answer does not say why.
    """
    scheme, _, credentials = (authorization or "").partition(" ")
    found = _TOKEN.fullmatch(credentials.strip())
    if scheme.lower() != "bearer" or found is None:
        raise Unauthorised
    token_id, secret = found.groups()
    row = session.scalar(
        select(Token).where(
            Token.id == token_id,
            Token.revoked_at.is_(None),
            (Token.expires_at.is_(None)) | (Token.expires_at > now()),
        )
    )
    # An unknown id is compared too, so that it takes as long as a wrong secret.
    expected = row.secret_sha256 if row is not None else bytes(32)
    if not secrets.compare_digest(_hash(secret), expected) or row is None:
        raise Unauthorised
    return Principal(tenant=row.tenant, token=row.id)


def _hash(secret: str) -> bytes:
    # A random secret of 256 bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).digest()
