"""
Who is calling: bearer tokens, the tenant that each stands for, and what it may do.

A token is ``ww_<id>_<secret>``: the id finds the row, the secret of 256 bits is kept as its SHA-256 and
compared in constant time. Without tokens, on loopback, everybody is the tenant ``local`` and may do all.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from common.db import Token, now
from common.errors import InsufficientScope, NotFound, Unauthorised

LOCAL_TENANT = "local"
_TOKEN = re.compile(r"ww_([0-9a-f]{16})_([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


_USE_SECONDS = 60.0  # how old the recorded last use may be: a write per request would be too dear


class Scope(StrEnum):
    """What a token may do with its tenant's jobs; none of them implies another."""

    SUBMIT = "submit"  # make jobs and cancel them
    READ = "read"  # see jobs and download what they leave
    ADMIN = "admin"  # delete what others of the tenant may still need


EVERY_SCOPE = frozenset(Scope)
DEFAULT_SCOPES = frozenset({Scope.SUBMIT, Scope.READ})
"""What a pipeline needs: to send a model, and to fetch it."""


@dataclass(frozen=True, kw_only=True)
class Principal:
    """A caller."""

    tenant: str
    token: str  # the token's id; "-" without tokens
    family: str = "-"  # the token that it was first rotated from: to whom idempotency keys belong
    scopes: frozenset[Scope] = EVERY_SCOPE
    is_use_recorded: bool = True  # within the last minute

    def require(self, scope: Scope) -> None:
        """
        Refuse a caller without *scope*.

        Raises:
            InsufficientScope: It lacks it.
        """
        if scope not in self.scopes:
            raise InsufficientScope(f"This needs a token with the scope '{scope}'.", scope=scope)


LOCAL = Principal(tenant=LOCAL_TENANT, token="-")  # noqa: S106 - an id, not a secret


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What may be shown of a token."""

    id: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None  # to the minute
    replaced_by: str | None
    is_live: bool


def create_token(
    session: Session,
    name: str,
    *,
    tenant: str | None = None,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
    expires_in_seconds: float | None = None,
) -> str:
    """
    Make a token and return it; its secret cannot be shown again.

    Raises:
        ValueError: Name or tenant is not a plain word, or there is no scope.
    """
    tenant = name if tenant is None else tenant
    for word in (name, tenant):
        if not _NAME.fullmatch(word):
            raise ValueError(
                f"{word!r} is not a name: use up to 64 letters, digits, dots, dashes and underscores"
            )
    if not (scopes := frozenset(scopes)):
        raise ValueError("a token without a scope can do nothing")
    expires_at = None if expires_in_seconds is None else now(expires_in_seconds)
    return _insert(session, name, tenant=tenant, scopes=_written(scopes), expires_at=expires_at)


def rotate_token(session: Session, token_id: str, *, overlap_seconds: float) -> str:
    """
    Make a token in the place of a live one, which ends after *overlap_seconds*; return the new one.

    Both are the same caller until then: one tenant, the same scopes, and a repeated request under an
    ``Idempotency-Key`` is known by both. The new one lives for as long as the old one was made for.

    Raises:
        NotFound: There is no live token with this id, or it was rotated before: two live tokens are
            enough to change over, and with three nobody knows which one is in use.
    """
    old = session.scalar(
        select(Token)
        .where(Token.id == token_id, _is_live(), Token.replaced_by.is_(None))
        .with_for_update()
    )
    if old is None:
        raise NotFound(f"There is no live token {token_id!r} that was not rotated before.")
    life = None if old.expires_at is None else old.expires_at - old.created_at
    token = _insert(
        session,
        old.name,
        tenant=old.tenant,
        scopes=old.scopes,
        family=old.family,
        expires_at=None if life is None else now(life.total_seconds()),
    )
    session.flush()  # the new one is there before the old one names it
    ends = session.scalar(select(now(overlap_seconds)))
    assert ends is not None
    old.replaced_by = token.split("_")[1]
    old.expires_at = ends if old.expires_at is None else min(old.expires_at, ends)
    return token


def list_tokens(session: Session) -> list[TokenInfo]:
    """Return every token, the oldest first, without its secret."""
    return [
        TokenInfo(
            id=row.id,
            name=row.name,
            tenant=row.tenant,
            scopes=_read(row.scopes),
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
            last_used_at=row.last_used_at,
            replaced_by=row.replaced_by,
            is_live=is_live,
        )
        for row, is_live in session.execute(
            select(Token, _is_live()).order_by(Token.created_at, Token.id)
        )
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
    is_recorded = func.coalesce(Token.last_used_at > now(-_USE_SECONDS), False)
    row = session.execute(
        select(Token, is_recorded).where(Token.id == token_id, _is_live())
    ).first()
    # An unknown id is compared too, so that it takes as long as a wrong secret.
    expected = row[0].secret_sha256 if row is not None else bytes(32)
    if not secrets.compare_digest(_hash(secret), expected) or row is None:
        raise Unauthorised
    token, is_use_recorded = row
    return Principal(
        tenant=token.tenant,
        token=token.id,
        family=token.family,
        scopes=_read(token.scopes),
        is_use_recorded=bool(is_use_recorded),
    )


def record_use(session: Session, token_id: str) -> None:
    """Write down that a token is in use, unless somebody has done so within the last minute."""
    session.execute(
        update(Token)
        .where(
            Token.id == token_id,
            or_(Token.last_used_at.is_(None), Token.last_used_at <= now(-_USE_SECONDS)),
        )
        .values(last_used_at=now())
        .execution_options(synchronize_session=False)
    )


def _insert(
    session: Session,
    name: str,
    *,
    tenant: str,
    scopes: str,
    expires_at: ColumnElement[datetime] | None,
    family: str | None = None,
) -> str:
    token_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    session.add(
        Token(
            id=token_id,
            name=name,
            tenant=tenant,
            secret_sha256=_hash(secret),
            scopes=scopes,
            family=family or token_id,
            created_at=now(),
            expires_at=expires_at,
        )
    )
    return f"ww_{token_id}_{secret}"


def _is_live() -> ColumnElement[bool]:
    return and_(
        Token.revoked_at.is_(None), or_(Token.expires_at.is_(None), Token.expires_at > now())
    )


def _written(scopes: frozenset[Scope]) -> str:
    return " ".join(scope for scope in Scope if scope in scopes)


def _read(scopes: str) -> frozenset[Scope]:
    return frozenset(Scope(word) for word in scopes.split())


def _hash(secret: str) -> bytes:
    # A random secret of 256 bits needs no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode()).digest()
