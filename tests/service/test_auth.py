"""A token proves its tenant, or nobody."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.db import Database, Token, now
from common.errors import NotFound, Unauthorised
from service.auth import authenticate, create_token, list_tokens, revoke_token


def made(database: Database, name: str = "ci", **options: float | str) -> str:
    """Return a new token."""
    with database.write() as session:
        return create_token(session, name, **options)  # type: ignore[arg-type]


def id_of(token: str) -> str:
    """Return the token's id."""
    return token.split("_")[1]


def is_refused(session: Session, header: str | None) -> bool:
    """Return whether nobody is proved."""
    try:
        authenticate(session, header)
    except Unauthorised:
        return True
    return False


def test_token_proves_its_tenant(database: Database) -> None:
    """A live token is its tenant; the scheme's case does not matter."""
    token = made(database, "ci", tenant="acme")
    with database.read() as session:
        for header in (f"Bearer {token}", f"bearer {token}", f"BEARER   {token} "):
            principal = authenticate(session, header)
            assert principal.tenant == "acme"
            assert principal.token == id_of(token)


def test_tenant_is_the_name_by_default(database: Database) -> None:
    """A token without a tenant has one of its own."""
    token = made(database, "ci")
    with database.read() as session:
        assert authenticate(session, f"Bearer {token}").tenant == "ci"


def test_secret_is_not_stored(database: Database) -> None:
    """The table holds the hash of the secret and nothing that gives it back."""
    token = made(database)
    secret = token.split("_")[2]
    assert len(secret) * 4 == 256
    with database.read() as session:
        row = session.scalars(select(Token)).one()
        assert row.secret_sha256 == hashlib.sha256(secret.encode()).digest()
        assert secret not in repr(vars(row))


def test_no_two_tokens_are_alike(database: Database) -> None:
    """One name may have many tokens."""
    assert len({made(database) for _ in range(5)}) == 5


def test_anything_else_proves_nobody(database: Database) -> None:
    """A header that differs from the token's in any way is refused."""
    token = made(database)
    other = made(database)
    prefix, token_id, secret = token.split("_")
    wrong = "0" if secret[0] != "0" else "1"
    headers = [
        None, "", "Bearer", "Bearer ", token, f"Basic {token}", f"Bearer {token}x",
        f"Bearer {token[:-1]}", f"Bearer {token.upper()}", f"Bearer {prefix}_{token_id}_",
        f"Bearer {prefix}_{token_id}_{wrong}{secret[1:]}",
        f"Bearer {prefix}_{'0' * 16}_{secret}", f"Bearer {prefix}_{id_of(other)}_{secret}",
        f"Bearer {token} {token}", f"Bearer {token}\n", f"Bearer {'ü' * 80}", "Bearer \0",
        f"Bearer {prefix}_{token_id}_{'0' * 64}",
    ]  # fmt: skip
    with database.read() as session:
        accepted = [header for header in headers if not is_refused(session, header)]
    assert accepted == [f"Bearer {token}\n"]  # trailing white space is no part of it


def test_revoked_token_proves_nobody(database: Database) -> None:
    """A revoked token ends at once and for good; others of its name go on."""
    token, other = made(database), made(database)
    with database.write() as session:
        revoke_token(session, id_of(token))
    with database.read() as session:
        assert is_refused(session, f"Bearer {token}")
        assert not is_refused(session, f"Bearer {other}")
    with pytest.raises(NotFound), database.write() as session:
        revoke_token(session, id_of(token))


def test_expired_token_proves_nobody(database: Database) -> None:
    """A token ends when its time is over, by the database's clock."""
    token = made(database, expires_in_seconds=600)
    with database.read() as session:
        assert not is_refused(session, f"Bearer {token}")
    with database.write() as session:
        session.execute(update(Token).values(expires_at=now(-1)))
    with database.read() as session:
        assert is_refused(session, f"Bearer {token}")


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a/b", "../a", "ü", "a\n", "x" * 65, "a'b"])
def test_name_is_a_plain_word(database: Database, name: str) -> None:
    """A tenant becomes part of a path, so it is a plain word."""
    for own, tenant in ((name, None), ("ci", name)):
        with pytest.raises(ValueError, match="is not a name"), database.write() as session:
            create_token(session, own, tenant=tenant)
    with database.read() as session:
        assert list_tokens(session) == []


def test_list_is_in_order_and_without_secrets(database: Database) -> None:
    """The list tells tokens apart and gives nothing away."""
    tokens = [made(database, name) for name in ("a", "b", "c")]
    with database.read() as session:
        listed = list_tokens(session)
    assert {info.id: info.name for info in listed} == {
        id_of(token): name for token, name in zip(tokens, "abc", strict=True)
    }
    assert listed == sorted(listed, key=lambda info: (info.created_at, info.id))
    assert not any(token.split("_")[2] in repr(listed) for token in tokens)


@given(header=st.text())
def test_no_text_crashes(header: str) -> None:
    """Any header that is no token is refused before the database is asked."""
    with pytest.raises(Unauthorised):
        authenticate(None, header)  # type: ignore[arg-type]
