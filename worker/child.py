"""
A job's own process, in its jail: started by exec, for one job, and gone with it.

A job has two: one that converts what a client sent and packs the result, and one that purifies and sees
only what was converted. Each reads orders as JSON lines on standard input, writes its progress as JSON
lines on standard output, and answers an order with ``result.json`` beside the files it made, and a line
that says so. It is started before there is a job, since importing torch takes longer than many jobs do.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from worker import sandbox
from worker.sandbox import Jail, Stage

RESULT = "result.json"
OUTPUT = "output"
INBOX, OUTBOX = "in", "out"
"""In a child's home: what it is given, and what it leaves."""
ANSWERED = {"answered": True}

Progress = Callable[[str, int, int, float], None]
Work = Callable[[dict[str, Any], Any, Progress], dict[str, Any]]


def main(parent: int, jail: Jail) -> None:
    """Confine this process, wait for orders, do them."""
    sandbox.enter(parent, jail)
    # Ctrl-C and a stop of the whole group are the supervisor's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not be taken for progress.
    progress_pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch  # noqa: PLC0415 - after the process is confined

    # Each stage takes what it needs: an import is what a child spends most of its time on.
    if jail.stage is Stage.CONVERT:
        from worker import conversion, packing  # noqa: PLC0415

        work = _converter(conversion, packing, jail)
    else:
        from worker import pipeline  # noqa: PLC0415

        work = _purifier(torch, pipeline, jail)

    def report(phase: str, step: int, total: int, fraction: float) -> None:
        message = {"phase": phase, "step": step, "total": total, "fraction": round(fraction, 4)}
        progress_pipe.write(json.dumps(message) + "\n")

    # Until the supervisor went away, or has no more for this child.
    while line := sys.stdin.readline():
        order = json.loads(line)
        sandbox.limit(jail, **order["limits"])
        outbox = jail.home / OUTBOX
        result = _run(torch, work, order, report)
        temporary = outbox / f"{RESULT}.part"
        temporary.write_text(json.dumps(result))
        temporary.rename(outbox / RESULT)
        progress_pipe.write(json.dumps(ANSWERED) + "\n")


def _run(torch: Any, work: Work, order: dict[str, Any], report: Progress) -> dict[str, Any]:
    """Return what the order came to, or the problem it met."""
    from common.errors import OutOfMemory, Problem  # noqa: PLC0415
    from common.spec import JobSpec  # noqa: PLC0415

    try:
        return work(order, JobSpec.model_validate(order["spec"]), report)
    except Problem as exc:
        return {"problem": exc.as_dict()}
    except (MemoryError, torch.OutOfMemoryError) as exc:
        gc.collect()
        return {"problem": OutOfMemory(str(exc)[:300] or None).as_dict()}
    except RuntimeError as exc:
        # The CPU allocator has no exception of its own.
        if "can't allocate memory" not in str(exc):
            raise
        return {"problem": OutOfMemory(str(exc).splitlines()[0][:300]).as_dict()}


def _converter(conversion: Any, packing: Any, jail: Jail) -> Work:
    """Return what the child does that reads what a client sent."""
    inbox, outbox = jail.home / INBOX, jail.home / OUTBOX

    def work(order: dict[str, Any], spec: Any, report: Progress) -> dict[str, Any]:
        if order["step"] == "convert":
            report("load", 0, 1, 0.0)
            files = {role: inbox / role for role in spec.roles}
            uploads = conversion.Uploads(
                model=files["model"],
                samples=files["samples"],
                evaluation=files.get("evaluation"),
                triggered=files.get("triggered"),
            )
            conversion.convert(uploads, spec, outbox)
            return {}
        report("save", 0, 1, 0.99)
        written = packing.pack(inbox / "model", spec.model.format, inbox, outbox / OUTPUT)
        report("save", 1, 1, 1.0)
        return {"files": written}

    return work


def _purifier(torch: Any, pipeline: Any, jail: Jail) -> Work:
    """Return what the child does that sees no uploaded byte."""

    def work(order: dict[str, Any], spec: Any, report: Progress) -> dict[str, Any]:
        report("load", 0, 1, 0.0)
        device = _device(torch, order["device"])
        if order["threads"]:
            torch.set_num_threads(order["threads"])
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        torch.backends.cudnn.benchmark = False
        done = pipeline.purify(
            jail.home / INBOX, spec, jail.home / OUTBOX, device=device, progress=report
        )
        return {
            "verdict": done.verdict,
            "remediation": done.remediation,
            "report": done.report,
        }

    return work


def _device(torch: Any, wanted: str) -> Any:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]), Jail.from_json(sys.argv[2]))
