"""
Print what this worker can build beside the built-in architectures, one JSON object per line.

It is a process of its own: importing the libraries takes seconds and a gigabyte, an operator's package
may do anything when it is imported, and the worker itself never imports torch.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator

from common.catalogue.architectures.foreign import MAX_DESCRIPTION_LENGTH
from common.logs import configure_logs
from worker import sandbox

_NICENESS = 10  # a job is never slower for it


def main(parent: int) -> None:
    """Print the list; a source that is broken is logged and left out."""
    sandbox.settle(parent)
    os.nice(_NICENESS)
    # What a library prints must not be taken for a name.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    configure_logs("info")
    with lines:
        for name, description in found():
            lines.write(json.dumps({"name": name, "description": description}) + "\n")


def found() -> Iterator[tuple[str, str]]:
    """Yield every name with its description."""
    from worker.architectures import (  # noqa: PLC0415 - after the process is confined
        operators,
        timm_models,
        torchvision_models,
    )

    for library in (torchvision_models, timm_models):
        if library.is_installed():
            title = library.PREFIX.rstrip("/")
            yield from (
                (name, f"{name.removeprefix(library.PREFIX)} of {title}.")
                for name in _or_nothing(library.names, title)
            )
    for name, entry in operators.registered().items():
        if (build := operators.load(entry)) is not None:
            described = (inspect.getdoc(build) or f"Registered as {entry.value}.").splitlines()[0]
            yield name, described[:MAX_DESCRIPTION_LENGTH]


def _or_nothing(names: Callable[[], list[str]], library: str) -> list[str]:
    import structlog  # noqa: PLC0415 - after the process is confined

    try:
        return names()
    except Exception as exc:  # an installation that does not fit torch, for one
        structlog.get_logger(__name__).warning(
            "library-left-out", library=library, problem=f"{type(exc).__name__}: {exc}"[:500]
        )
        return []


if __name__ == "__main__":
    main(int(sys.argv[1]))
