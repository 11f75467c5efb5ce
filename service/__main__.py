"""Run the service, or manage its tokens: ``python -m service serve``, ``python -m service tokens``."""

import argparse
import re
import sys
import threading
from datetime import datetime
from types import FrameType

import uvicorn
from pydantic import ValidationError

from common.db import Database
from common.errors import Problem
from common.logs import configure_logs
from common.settings import Settings
from migrations.migrate import is_current, upgrade
from service import auth
from service.app import create_app
from service.auth import Scope
from service.connections import limited

# Idle keep-alive connections hold the stop up for no longer than this.
_SHUTDOWN_SECONDS = 3
_MAX_DAYS = 3650
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Weightwash over HTTP. Settings: WEIGHTWASH_* (see the README).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="answer requests; by default with one worker beside")
    tokens = commands.add_parser("tokens", help="manage bearer tokens")
    actions = tokens.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a token and print it, once")
    create.add_argument("name", help="what the token is for, such as the pipeline's name")
    create.add_argument("--tenant", help="whose jobs it may see; the name by default")
    create.add_argument(
        "--scope",
        action="append",
        choices=[scope.value for scope in Scope],
        metavar="SCOPE",
        help="what it may do, once for each: submit (make and cancel jobs), read (see them, download), "
        "admin (delete); submit and read by default",
    )
    create.add_argument(
        "--expires-in",
        type=_life,
        metavar="TIME",
        help=f"when it ends by itself, such as 90d or 12h, up to {_MAX_DAYS}d; never by default",
    )
    rotate = actions.add_parser(
        "rotate",
        help="make a token in the place of a live one and print it; the old one ends later",
    )
    rotate.add_argument("id", help="the old token's id, as 'list' shows it")
    rotate.add_argument(
        "--overlap",
        type=_seconds,
        default="7d",
        metavar="TIME",
        help="how long the old one goes on beside the new one, such as 12h, or 0s; 7d by default",
    )
    actions.add_parser("list", help="list tokens without their secrets: scopes, end, last use")
    revoke = actions.add_parser("revoke", help="end a token now")
    revoke.add_argument("id", help="the token's id, as 'list' shows it")
    options = parser.parse_args(arguments)

    try:
        settings = Settings()
    except ValidationError as exc:
        for error in exc.errors():
            where = "_".join(map(str, error["loc"])).upper()
            name = f"WEIGHTWASH_{where}: " if where else ""
            print(f"{name}{error['msg']}", file=sys.stderr)  # noqa: T201 - the user's terminal
        return 2
    configure_logs(settings.log_level)
    return _serve(settings) if options.command == "serve" else _tokens(settings, options)


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"a whole number and a unit (s, m, h, d, w), such as 90d, not {text!r}"
        )
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]]
    if seconds > _MAX_DAYS * 86400:
        raise argparse.ArgumentTypeError(f"at most {_MAX_DAYS}d, not {text}")
    return seconds


def _life(text: str) -> int:
    seconds = _seconds(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError(f"more than nothing, not {text}")
    return seconds


def _serve(settings: Settings) -> int:
    database = Database(settings.resolved_database_url)
    if database.is_sqlite:
        upgrade(database)  # embedded mode has nobody else to do it
    database.close()
    stopping = threading.Event()
    config = uvicorn.Config(
        create_app(settings, stopping),
        host=settings.host,
        port=settings.port,
        http=limited(settings),
        ws="none",
        reset_contextvars=True,  # or the log names a pipelined request by its predecessor's id
        timeout_keep_alive=settings.keep_alive_seconds,
        log_config=None,
        access_log=False,  # ours is the edge's, which leaves queries out
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    _Server(config, stopping).run()
    return 0


class _Server(uvicorn.Server):
    """A server that tells its waiting requests when it begins to stop."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Set the event from a thread: a signal handler may not wait for its lock."""
        threading.Thread(target=self._stopping.set).start()
        super().handle_exit(sig, frame)


def _tokens(settings: Settings, options: argparse.Namespace) -> int:
    database = Database(settings.resolved_database_url)
    if database.is_sqlite:
        upgrade(database)
    elif not is_current(database):
        print("the database has no current schema; run: alembic upgrade head", file=sys.stderr)  # noqa: T201
        return 1
    try:
        with database.write() as session:
            match options.action:
                case "create":
                    print(  # noqa: T201 - the one time it is shown
                        auth.create_token(
                            session,
                            options.name,
                            tenant=options.tenant,
                            scopes=map(Scope, options.scope)
                            if options.scope
                            else auth.DEFAULT_SCOPES,
                            expires_in_seconds=options.expires_in,
                        )
                    )
                case "rotate":
                    print(  # noqa: T201 - the one time it is shown
                        auth.rotate_token(session, options.id, overlap_seconds=options.overlap)
                    )
                case "list":
                    for token in auth.list_tokens(session):
                        _print_token(token)
                case "revoke":
                    auth.revoke_token(session, options.id)
    except (ValueError, Problem) as exc:
        print(exc, file=sys.stderr)  # noqa: T201
        return 1
    finally:
        database.close()
    return 0


def _print_token(token: auth.TokenInfo) -> None:
    state = "live" if token.is_live else "revoked" if token.revoked_at is not None else "expired"
    words = [
        f"{token.id}  {state:7}  {','.join(scope for scope in Scope if scope in token.scopes)}",
        f"expires {_moment(token.expires_at)}",
        f"used {_moment(token.last_used_at)}",
        f"tenant {token.tenant}",
        token.name,
    ]
    if token.replaced_by is not None:
        words.append(f"replaced by {token.replaced_by}")
    print("  ".join(words))  # noqa: T201


def _moment(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


if __name__ == "__main__":
    sys.exit(main())
