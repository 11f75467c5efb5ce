"""
Logs: one JSON object per line on stderr, with the job's and the request's id where there is one.

Nothing logs a header, a query or a body. As a last resort a line is searched for what looks like one of
our tokens or like a password in a URL, because exceptions and paths quote what they were given.
"""

import logging
import re
import sys
from typing import Any

import structlog

_SECRETS = (
    # The id may be known, it is in the list of tokens; what follows it may not.
    (re.compile(r"\bww_([0-9a-fA-F]{1,16})_[0-9a-fA-F]+"), r"ww_\1_[hidden]"),
    (re.compile(r"(://[^\s:/@\"]*):[^\s@\"]+@"), r"\1:[hidden]@"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20)[\w.~+/=-]{8,}"), r"\1 [hidden]"),
)


def without_secrets(line: str) -> str:
    """Return *line* without what looks like a secret."""
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line


def _render(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
    rendered = structlog.processors.JSONRenderer()(logger, name, event)
    return without_secrets(str(rendered))


def configure_logs(level: str) -> None:
    """Send every log event of this process, our own and the libraries', to stderr as JSON."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("alembic", "kombu", "amqp"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
