"""
Fuzz every target and record what came of it.

    python -m fuzz --seconds 600 --jobs 2 --out benchmarks/results/fuzz.jsonl [TARGET…]

Corpora, logs and the inputs of findings are kept under --work and used again by the next run. Each
target's row is written when it ends. The exit status is 1 if there was a finding.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fuzz.targets import TARGETS

REPOSITORY = Path(__file__).parents[1]
RSS_LIMIT_MB = 2048
"""Memory of the process, of which torch takes a few hundred."""

MALLOC_LIMIT_MB = 256
"""One allocation: inputs have some kilobytes, and none may ask for more than a thousand times that."""

TIMEOUT_SECONDS = 10
"""Time for one input."""

MAX_INPUT_BYTES = 8192

Row = dict[str, Any]


def main() -> int:
    """Fuzz; return the exit status."""
    options = _options()
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        names = options.targets or list(TARGETS)
        waiting = [pool.submit(fuzz, name, options.work, options.seconds) for name in names]
        for done in waiting:
            row = done.result()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 1 if any(row["findings"] for row in rows) else 0


def fuzz(name: str, work: Path, seconds: int) -> Row:
    """Fuzz one target for *seconds*, in a process of its own; return what is recorded of it."""
    folder = work / name
    corpus, findings = folder / "corpus", folder / "findings"
    shutil.rmtree(findings, ignore_errors=True)
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    (folder / "tokens").write_text("".join(map(_quoted, TARGETS[name].tokens)))
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        status = subprocess.run(
            [
                sys.executable, "-m", "fuzz.one", name,
                f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}",
                f"-rss_limit_mb={RSS_LIMIT_MB}", f"-malloc_limit_mb={MALLOC_LIMIT_MB}",
                f"-timeout={TIMEOUT_SECONDS}", "-print_final_stats=1", "-seed=1",
                f"-dict={folder / 'tokens'}", f"-artifact_prefix={findings}/", str(corpus),
            ],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode  # fmt: skip
    found = sorted(path.name for path in findings.iterdir())
    if status and not found:
        found = [f"exit status {status}, see {folder / 'log'}"]
    return {
        "target": name,
        "seconds": round(time.monotonic() - started, 1),
        **read_log((folder / "log").read_text(errors="replace")),
        "corpus": sum(1 for _ in corpus.iterdir()),
        "findings": found,
        **environment(),
    }


def read_log(log: str) -> Row:
    """Return executions and coverage as libFuzzer last printed them; None where it did not."""
    executed = re.findall(r"stat::number_of_executed_units:\s+(\d+)", log)
    steps = re.findall(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+)", log, re.MULTILINE)
    last = steps[-1] if steps else (None, None, None)
    executions, edges, features = (None if n is None else int(n) for n in last)
    return {
        "executions": int(executed[-1]) if executed else executions,
        "coverage_edges": edges,
        "features": features,
    }


def environment() -> Row:
    """Return what the numbers depend on besides the code."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    libraries = ("atheris", "numpy", "safetensors", "torch")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _quoted(token: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n'


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=600, help="time of each target")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--work", type=Path, default=Path("var/fuzz"), help="folder of the corpora")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    options.work = options.work.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
