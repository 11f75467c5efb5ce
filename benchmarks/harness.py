"""What every benchmark needs: its options, the machine it ran on, rows that survive a stop."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def parse(description: str | None) -> argparse.Namespace:
    """Parse the options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="measure the stated subset only")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of the checkpoints"
    )
    parser.add_argument("--out", type=Path, help="JSON lines to append to and to resume from")
    return parser.parse_args()


def machine() -> Row:
    """Return what the numbers depend on besides the code."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measure_all(
    cases: Iterable[Row], measure: Callable[[Row], Mapping[str, Any]], out: Path | None
) -> list[Row]:
    """
    Measure each case that *out* does not have yet, and return all rows in the order of the cases.

    A row is the case with what was measured; it is written as soon as it is there.
    """
    # The sums, and with them the rates, depend on the thread count.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    cases = list(cases)
    known = _read(out)
    if out is not None and not known:
        _append(out, machine())
    rows = []
    for position, case in enumerate(cases, start=1):
        found = next((row for row in known if case.items() <= row.items()), None)
        if found is None:
            print(f"{position} of {len(cases)}: {case}", file=sys.stderr, flush=True)
            found = {**case, **measure(case)}
            if out is not None:
                _append(out, found)
        rows.append(found)
        print("  ".join(f"{name}={_shown(value)}" for name, value in found.items()), flush=True)
    return rows


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


def _read(out: Path | None) -> list[Row]:
    if out is None or not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()]


def _append(out: Path, row: Row) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
