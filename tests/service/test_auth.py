"""A token proves its tenant, or nobody."""

import hashlib
from datetime import timedelta
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.db import Database, Token, now
from common.errors import InsufficientScope, NotFound, Unauthorised
from service.auth import (
    DEFAULT_SCOPES,
    EVERY_SCOPE,
    Principal,
    Scope,
    authenticate,
    create_token,
    list_tokens,
    record_use,
    revoke_token,
    rotate_token,
)


def made(database: Database, name: str = "ci", **options: Any) -> str:
    """Return a new token."""
    with database.write() as session:
        return create_token(session, name, **options)


def rotated(database: Database, token: str, *, overlap_seconds: float = 3600) -> str:
    """Return the token that takes another one's place."""
    with database.write() as session:
        return rotate_token(session, id_of(token), overlap_seconds=overlap_seconds)


def proved(database: Database, token: str) -> Principal | None:
    """Return whom a token proves, if anybody."""
    with database.read() as session:
        try:
            return authenticate(session, f"Bearer {token}")
        except Unauthorised:
            return None


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


# Scopes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scopes", [frozenset(c) for n in (1, 2, 3) for c in combinations(Scope, n)], ids=sorted
)
def test_token_has_the_scopes_it_was_made_with(
    database: Database, scopes: frozenset[Scope]
) -> None:
    """What is stored is what is proved and what is listed, and it refuses exactly the rest."""
    principal = proved(database, made(database, scopes=scopes))
    assert principal is not None
    assert principal.scopes == scopes
    with database.read() as session:
        assert [info.scopes for info in list_tokens(session)] == [scopes]
    for scope in Scope:
        if scope in scopes:
            principal.require(scope)
        else:
            with pytest.raises(InsufficientScope, match=f"'{scope}'"):
                principal.require(scope)


def test_new_token_submits_and_reads_and_does_not_delete(database: Database) -> None:
    """Without a word about scopes a token may do what a pipeline does."""
    principal = proved(database, made(database))
    assert principal is not None
    assert principal.scopes == DEFAULT_SCOPES == EVERY_SCOPE - {Scope.ADMIN}


def test_token_without_a_scope_is_not_made(database: Database) -> None:
    """A token that could do nothing is a mistake."""
    with pytest.raises(ValueError, match="can do nothing"):
        made(database, scopes=[])


# Rotation ------------------------------------------------------------------------------------------


def test_both_tokens_of_a_rotation_live_until_the_overlap_ends(database: Database) -> None:
    """The new one is the same caller with a secret of its own; the old one ends by itself."""
    old = made(database, "ci", tenant="acme", scopes=[Scope.READ])
    new = rotated(database, old)
    assert new != old
    before, after = proved(database, old), proved(database, new)
    assert before is not None
    assert after is not None
    assert (before.tenant, before.scopes, before.family) == (
        after.tenant,
        after.scopes,
        after.family,
    )
    assert (before.token, after.token) == (id_of(old), id_of(new))
    with database.write() as session:  # what time alone would bring about
        session.execute(update(Token).where(Token.id == id_of(old)).values(expires_at=now(-1)))
    assert proved(database, old) is None
    assert proved(database, new) is not None


def test_rotation_without_an_overlap_ends_the_old_token_at_once(database: Database) -> None:
    """An overlap of nothing is a change of secret in one step."""
    old = made(database)
    new = rotated(database, old, overlap_seconds=0)
    assert proved(database, old) is None
    assert proved(database, new) is not None


def test_rotation_never_lengthens_a_life(database: Database) -> None:
    """A token that ends before the overlap does ends when it would have."""
    old = made(database, expires_in_seconds=600)
    with database.read() as session:
        (before,) = list_tokens(session)
    rotated(database, old, overlap_seconds=86400)
    with database.read() as session:
        after, new = list_tokens(session)
    assert after.expires_at == before.expires_at
    assert after.replaced_by == new.id
    # The new one lives as long as the old one was made for; a token without an end has one without.
    assert new.expires_at is not None
    assert new.expires_at - new.created_at >= timedelta(seconds=600)
    assert new.expires_at - new.created_at < timedelta(seconds=660)
    rotated(database, made(database, "endless"))
    with database.read() as session:
        ends = [info.expires_at for info in list_tokens(session) if info.name == "endless"]
    assert ends[0] is not None
    assert ends[1] is None


def test_token_is_rotated_once(database: Database) -> None:
    """There are never more than two live tokens of one: the new one is rotated, not the old one."""
    old = made(database)
    new = rotated(database, old)
    with pytest.raises(NotFound, match="not rotated before"):
        rotated(database, old)
    newest = rotated(database, new)
    families = [proved(database, token) for token in (old, new, newest)]
    assert {found.family for found in families if found is not None} == {id_of(old)}


def test_token_that_is_not_live_is_not_rotated(database: Database) -> None:
    """What has ended comes to no new life."""
    revoked, expired = made(database), made(database, "expired")
    with database.write() as session:
        revoke_token(session, id_of(revoked))
        session.execute(update(Token).where(Token.name == "expired").values(expires_at=now(-1)))
    for token in (revoked, expired, f"ww_{'0' * 16}_{'0' * 64}"):
        with pytest.raises(NotFound):
            rotated(database, token)
    with database.read() as session:
        assert len(list_tokens(session)) == 2


def test_either_token_of_a_rotation_is_revoked_alone(database: Database) -> None:
    """A leaked one ends at once and leaves the other."""
    for which in (0, 1):
        pair = [made(database)]
        pair.append(rotated(database, pair[0]))
        with database.write() as session:
            revoke_token(session, id_of(pair[which]))
        assert proved(database, pair[which]) is None
        assert proved(database, pair[1 - which]) is not None


# Last use ------------------------------------------------------------------------------------------


def test_last_use_is_written_at_most_once_a_minute(database: Database) -> None:
    """A use that was noted within the minute is known as such and not written again."""
    token = made(database)
    principal = proved(database, token)
    assert principal is not None
    assert not principal.is_use_recorded
    with database.write() as session:
        record_use(session, id_of(token))
        session.execute(update(Token).values(last_used_at=now(3600)))  # younger than a minute
    with database.read() as session:
        (first,) = list_tokens(session)
    principal = proved(database, token)
    assert principal is not None
    assert principal.is_use_recorded
    with database.write() as session:
        record_use(session, id_of(token))
    with database.read() as session:
        (second,) = list_tokens(session)
    assert first.last_used_at == second.last_used_at is not None
