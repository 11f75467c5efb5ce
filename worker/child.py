"""
A job's own process: started by exec, for one job, and gone with it.

It reads one JSON line on standard input (the job's folder and its specification), writes its progress as
JSON lines on standard output, and leaves ``result.json`` and the model in the folder. It is started
before there is a job, since importing torch takes longer than many jobs do.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from worker import sandbox

RESULT = "result.json"
OUTPUT = "output"


def main(parent: int) -> None:
    """Confine this process, wait for a job, do it."""
    sandbox.enter(parent)
    # Ctrl-C and a stop of the whole group are the supervisor's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not be taken for progress.
    progress_pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch  # noqa: PLC0415 - after the process is confined

    from worker import pipeline  # noqa: PLC0415

    line = sys.stdin.readline()
    if not line:
        return  # the supervisor went away, or did not need this child
    order = json.loads(line)

    def report(phase: str, step: int, total: int, fraction: float) -> None:
        message = {"phase": phase, "step": step, "total": total, "fraction": round(fraction, 4)}
        progress_pipe.write(json.dumps(message) + "\n")

    folder = Path(order["folder"])
    result = _run(torch, pipeline, order, report)
    temporary = folder / f"{RESULT}.part"
    temporary.write_text(json.dumps(result))
    temporary.rename(folder / RESULT)


def _run(torch: Any, pipeline: Any, order: dict[str, Any], report: Any) -> dict[str, Any]:
    """Return what the job came to, or the problem it met."""
    from common.errors import OutOfMemory, Problem  # noqa: PLC0415
    from common.spec import JobSpec  # noqa: PLC0415

    folder = Path(order["folder"])
    spec = JobSpec.model_validate(order["spec"])
    try:
        device = _device(torch, order["device"])
        if order["threads"]:
            torch.set_num_threads(order["threads"])
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        torch.backends.cudnn.benchmark = False
        roles = spec.roles
        files = pipeline.Files(
            model=folder / "model",
            samples=folder / "samples",
            evaluation=folder / "evaluation" if "evaluation" in roles else None,
            triggered=folder / "triggered" if "triggered" in roles else None,
            output=folder / OUTPUT,
        )
        done = pipeline.sanitise(files, spec, device=device, progress=report)
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
    return {
        "verdict": done.verdict,
        "remediation": done.remediation,
        "report": done.report,
    }


def _device(torch: Any, wanted: str) -> Any:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]))
