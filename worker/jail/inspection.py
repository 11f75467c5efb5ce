"""Put a prisoner of our own into each stage's jail, and hear what got through."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from worker import sandbox
from worker.jail import landlock
from worker.jail.hostile import LAST, PROBES, Bait
from worker.jail.verdict import Verdict, all_probes, judge
from worker.sandbox import LAYERS, Jail, Layer, Stage

_WORSE = (False, True, None)
_LONGEST_SECONDS = 120.0
_MAX_ANSWER_BYTES = 64 << 10


def inspect(folder: Path, *, gpu: bool, layers: frozenset[Layer] = LAYERS) -> Verdict:
    """
    Try the jail of every stage below *folder*; return how its walls held.

    Args:
        gpu: Whether the second stage's jail leaves a way to a GPU.
        layers: The walls to put up, where the platform has them.
    """
    answers: dict[str, bool | None] = {}
    for stage in Stage:
        found = imprison(folder, stage, gpu=gpu and stage is Stage.PURIFY, layers=layers)
        for probe, through in found.items():
            answers[probe] = max(answers.get(probe, False), through, key=_WORSE.index)
    return judge(answers, sandbox.missing(), landlock_abi=landlock.abi())


def imprison(
    folder: Path, stage: Stage, *, gpu: bool = False, layers: frozenset[Layer] = LAYERS
) -> dict[str, bool | None]:
    """Return of each attempt whether it got through, or ``None`` where the prisoner never said."""
    home = Path(tempfile.mkdtemp(prefix="inspection-", dir=folder)).resolve()
    prison = home / "prison"
    prison.mkdir(mode=0o700)
    (home / "secret").write_text("of another job")
    jail = Jail(home=prison, stage=stage, gpu=gpu, layers=layers)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            bait = Bait(
                keeper=os.getpid(),
                port=server.getsockname()[1],
                secret=str(home / "secret"),
                outside=str(home),
            )
            text = _hear(jail, bait)
        found = _read(text)
        # It may also lie.
        if (home / "canary").exists():
            found["write-outside"] = True
    finally:
        shutil.rmtree(home, ignore_errors=True)
    promised = (name for name in all_probes() if name != "memory" or stage is Stage.CONVERT)
    return {probe: found.get(probe) for probe in promised}


def _hear(jail: Jail, bait: Bait) -> bytes:
    with tempfile.TemporaryFile() as answers, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [
                sys.executable,
                *("-P", "-s", "-m", "worker.jail.hostile"),
                *(str(os.getpid()), jail.to_json(), bait.to_json()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=answers,
            cwd=jail.home,
            env=sandbox.child_environment(jail),
            start_new_session=True,
            timeout=_LONGEST_SECONDS,
            check=False,
        )
        answers.seek(0)
        return answers.read(_MAX_ANSWER_BYTES)
    return b""


def _read(text: bytes) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for line in text.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            said = json.loads(line)
            if said["probe"] in {*PROBES, LAST}:
                found[said["probe"]] = bool(said["through"])
    return found
