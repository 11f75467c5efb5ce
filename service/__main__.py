"""Run the service, or manage its tokens: ``python -m service serve``, ``python -m service tokens``."""

import argparse
import sys
import threading
from datetime import UTC, datetime
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

# Idle keep-alive connections hold the stop up for no longer than this.
_SHUTDOWN_SECONDS = 3
_MAX_DAYS = 3650


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
        "--expires-days", type=_days, help=f"days until it ends by itself, up to {_MAX_DAYS}"
    )
    actions.add_parser("list", help="list tokens without their secrets")
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


def _days(text: str) -> float:
    days = float(text)
    if not 0 < days <= _MAX_DAYS:  # NaN fails too
        raise argparse.ArgumentTypeError(f"more than 0 and at most {_MAX_DAYS}, not {text}")
    return days


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
        log_config=None,
        access_log=False,
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
                    days = options.expires_days
                    print(  # noqa: T201 - the one time it is shown
                        auth.create_token(
                            session,
                            options.name,
                            tenant=options.tenant,
                            expires_in_seconds=None if days is None else days * 86400,
                        )
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
    ends = "never" if token.expires_at is None else f"{token.expires_at:%Y-%m-%d %H:%M}"
    expired = token.expires_at is not None and token.expires_at <= datetime.now(UTC)
    state = "revoked" if token.revoked_at is not None else "expired" if expired else "live"
    print(f"{token.id}  {state:7}  expires {ends}  tenant {token.tenant}  {token.name}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
