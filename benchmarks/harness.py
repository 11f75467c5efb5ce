"""What every benchmark needs: its options, the machine it ran on, rows that survive a stop."""

import argparse
import json
import operator
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from worker.purify.precision import autocast_type

Row = dict[str, Any]
RELATIONS: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark takes."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="measure the stated subset only")
    options.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of the checkpoints"
    )
    options.add_argument("--out", type=Path, help="JSON lines to append to and to resume from")
    return options


def parse(description: str | None) -> argparse.Namespace:
    """Parse the options that every benchmark takes."""
    return parser(description).parse_args()


def machine() -> Row:
    """Return what the numbers depend on besides the code."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        # Processors of one name differ in their units, and several times in speed.
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": autocast_type("auto", torch.empty(0)) is not None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def measure_all(
    cases: Iterable[Row],
    measure: Callable[[Row], Mapping[str, Any]],
    out: Path | None,
    *,
    jobs: int = 1,
) -> list[Row]:
    """
    Measure each case that *out* does not have yet, and return all rows in the order of the cases.

    A row is the case with what was measured; it is written as soon as it is there. With more than
    one job, as many processes measure at once; *measure* must then be picklable.
    """
    cases = list(cases)
    known = _read(out)
    here = machine()
    rows = {
        position: row
        for position, case in enumerate(cases)
        if (row := next((row for row in known if case.items() <= row.items()), None))
    }
    missing = [position for position in range(len(cases)) if position not in rows]
    # The rows of a file may come from several machines; each stands below its own.
    if out is not None and missing and here != _last_machine(known):
        _append(out, here)
    bar = _Bar(len(cases), done=len(rows))
    for position, row in _measured(cases, missing, measure, jobs):
        rows[position] = row
        if out is not None:
            _append(out, row)
        print("  ".join(f"{name}={_shown(value)}" for name, value in row.items()), flush=True)
        bar.advance()
    return [rows[position] for position in range(len(cases))]


def _measured(
    cases: list[Row], missing: list[int], measure: Callable[[Row], Mapping[str, Any]], jobs: int
) -> Iterator[tuple[int, Row]]:
    """Yield the position and the row of each missing case, as they come."""
    if jobs == 1:
        _prepare()
        for position in missing:
            yield position, {**cases[position], **measure(cases[position])}
        return
    # Spawned: a forked process cannot use a GPU, nor torch's threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare) as pool:
        waiting = {pool.submit(measure, cases[position]): position for position in missing}
        for done in as_completed(waiting):
            position = waiting[done]
            yield position, {**cases[position], **done.result()}


def _prepare() -> None:
    """Make the sums, and with them the rates, independent of the thread count."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


class _Bar:
    """A bar on stderr that says how much is done and how long the rest will take."""

    _WIDTH = 30

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._skipped = total, done, done
        self._started = time.monotonic()
        self._show()

    def advance(self) -> None:
        self._done += 1
        self._show()

    def _show(self) -> None:
        filled = self._WIDTH * self._done // max(self._total, 1)
        bar = "#" * filled + "." * (self._WIDTH - filled)
        eta = ""
        if measured := self._done - self._skipped:
            seconds = (time.monotonic() - self._started) / measured * (self._total - self._done)
            eta = f", {seconds / 60:.1f} min to go"
        print(f"[{bar}] {self._done} of {self._total}{eta}", file=sys.stderr, flush=True)


def recorded(out: Path | None) -> list[Row]:
    """Return what was measured so far."""
    return [row for row in _read(out) if "cpu" not in row]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def or_none(aggregate: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    """Return the aggregate; None of nothing."""
    return aggregate(values) if values else None


def conclude(
    benchmark: str, *, figures: Row, targets: Row, met: bool, unmeasured: Iterable[str] = ()
) -> None:
    """Print the summary as the last line."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "figures": figures,
                "targets": targets,
                "unmeasured": list(unmeasured),
                "met": met,
            }
        )
    )


def conclude_by(
    benchmark: str, *, figures: Mapping[str, float | None], targets: Mapping[str, str]
) -> None:
    """
    Print the summary as the last line; every target that was measured decides whether it is met.

    Args:
        figures: None for what was not measured.
        targets: A relation and a limit such as ``">= 0.95"``, each by the name of its figure.
    """
    measured = {name: value for name in targets if (value := figures[name]) is not None}
    conclude(
        benchmark,
        figures=dict(figures),
        targets=dict(targets),
        met=all(is_met(value, targets[name]) for name, value in measured.items()),
        unmeasured=[name for name in targets if name not in measured],
    )


def is_met(figure: float, target: str) -> bool:
    """Return whether a figure is within a target such as ``"<= 0.1"``."""
    relation, limit = target.split()
    return RELATIONS[relation](figure, float(limit))


def _read(out: Path | None) -> list[Row]:
    if out is None or not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()]


def _last_machine(known: list[Row]) -> Row | None:
    return next((row for row in reversed(known) if "cpu" in row), None)


def _append(out: Path, row: Row) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
