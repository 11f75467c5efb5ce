"""
The walls behind the gate, each by itself, against the files that the gate exists to refuse.

``tests/common/formats/test_hostile_files.py`` holds the gate to the same files, with nothing behind it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.formats.model import ModelFormat
from common.spec import JobSpec
from tests.hostile_files import Field, HostileFile, honest_files, hostile_files
from tests.service.forms import CHANNELS, CLASSES, SIDE, parts
from tests.support.inputs import SPEC
from tests.support.jail import LIMITS, needs
from tests.support.unpickler import PLAIN_UNPICKLER
from worker import sandbox
from worker.process import Child
from worker.sandbox import LAYERS, Jail, Layer, Stage

HOSTILE = hostile_files()
ANSWER_SECONDS = 10
MAX_GROWTH_BYTES = 512 << 20

TAKEN = frozenset(
    {
        # More than the gate cares to walk through, and cheap enough for a loader of C++.
        "half a million dicts", "a memo of a third of a million", "keys that collide", "nine dimensions",
        # torch's loader stops at the end of the pickle, and knows no type of a storage.
        "a value after the end", "a second pickle after the first", "a storage of two types",
        # Two readers would see two things; here there is one.
        "one name twice", "another name where it lies", "members that overlap", "a hidden member",
        "encrypted before the member alone", "another size before the member",
        "another checksum before the member", "another method before the member",
        "a zip between members and directory", "bytes after the end", "a second zip after the end",
        "a comment that is not there", "a zip64 end elsewhere", "names of two cases", "a link",
        "a device", "a path upwards", "a name with an escape", "a very long name",
        "a folder that is a file", "a storage by a name", "an array shorter than its member",
        "four gigabytes declared",
        # torch's reader checks no checksum, and leaves out what is marked as a folder.
        "a wrong checksum in both", "a file marked as a folder",
        # Other than what we promise to take, and not harmful.
        "compressed", "compressed with lzma", "big endian", "TorchScript", "an exported program",
        "an exported program of the first kind", "a package",
    }
)  # fmt: skip
"""The tricks that a loader reads as plain tensors, whatever the gate has against them."""


class Converter:
    """
    The process that reads uploads, with chosen walls, and no gate before it.

    It takes one file after the other, as long as it lives; a new one is started when it has died.
    """

    def __init__(self, folder: Path, layers: frozenset[Layer]) -> None:
        self._folder, self._layers = folder, layers
        self._child = Child.start(folder, Stage.CONVERT, layers=layers)
        self._honest = {part.name: part.content for part in parts() if part.filename is not None}

    def read(self, field: str, content: bytes, *, model_format: ModelFormat) -> str | None:
        """Return the code of the problem with a file, ``None`` for none, or how the process died."""
        for role, each in (self._honest | {field: content}).items():
            (self._child.inbox / role).write_bytes(each)
        spec = _spec(model_format, with_evaluation=field == Field.EVALUATION)
        self._child.give(
            {"step": "convert", "spec": spec.model_dump(mode="json"), "limits": LIMITS}
        )
        assert self._child.wait(ANSWER_SECONDS), "no answer"
        result = self._child.result()
        if result is None:
            self._child.stop()
            died = f"died with {self._child.exit_status}: {self._child.last_words}"
            self.close()
            self._child = Child.start(self._folder, Stage.CONVERT, layers=self._layers)
            return died
        return None if result.problem is None else str(result.problem["code"])

    @property
    def resident_bytes(self) -> int:
        """What the process holds in memory."""
        return int(psutil.Process(self._child._process.pid).memory_info().rss)

    def close(self) -> None:
        """End the process."""
        self._child.kill()


def _spec(model_format: ModelFormat, *, with_evaluation: bool) -> JobSpec:
    shape = (CHANNELS, SIDE, SIDE)
    samples = SPEC.samples.model_copy(update={"classes": CLASSES, "image_shape": shape})
    return SPEC.model_copy(
        update={
            "model": SPEC.model.model_copy(update={"format": model_format}),
            "samples": samples,
            "evaluation": samples if with_evaluation else None,
            "classes": CLASSES,
        }
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[frozenset[Layer]], Converter]]:
    """Return what starts a converter, which ends with the test."""
    started = []

    def begin(layers: frozenset[Layer]) -> Converter:
        started.append(Converter(tmp_path, layers))
        return started[-1]

    yield begin
    for each in started:
        each.close()


def read_all(converter: Converter, files: Iterable[HostileFile], canary: Path) -> dict[str, str]:
    """Let *converter* read *files*, and an honest one after all; return what came of each."""
    honest = parts()[0].content
    assert converter.read("model", honest, model_format=ModelFormat.TORCH) is None
    before = converter.resident_bytes
    found = {}
    for file in files:
        is_safetensors = file.field is Field.MODEL and file.suffix == ".safetensors"
        model_format = ModelFormat.SAFETENSORS if is_safetensors else ModelFormat.TORCH
        answer = converter.read(file.field, file.build(canary), model_format=model_format)
        found[str(file)] = "taken" if answer is None else answer
        assert not canary.exists(), file
    assert converter.resident_bytes - before < MAX_GROWTH_BYTES
    assert converter.read("model", honest, model_format=ModelFormat.TORCH) is None
    return found


def surprises(found: Mapping[str, str]) -> list[str]:
    """Return what a loader took that it must not, and what it died of."""
    taken = {str(file) for file in HOSTILE if file.name in TAKEN}
    return [
        f"{name}: {answer}"
        for name, answer in found.items()
        if answer.startswith("died") or (answer == "taken" and name not in taken)
    ]


def test_nothing_gets_past_the_loaders_in_the_jail(
    tmp_path: Path, start: Callable[[frozenset[Layer]], Converter]
) -> None:
    """Without a gate every hostile file is refused, or is plain tensors; honest ones still work."""
    found = read_all(start(LAYERS), HOSTILE, tmp_path / "canary")
    assert surprises(found) == []
    code = [str(file) for file in HOSTILE if file.carries_code]
    assert {name for name in code if found[name] == "taken"} == set()


def test_honest_files_are_read_in_the_jail(
    tmp_path: Path, start: Callable[[frozenset[Layer]], Converter]
) -> None:
    """No wall keeps a loader from what it is there for."""
    found = read_all(start(LAYERS), honest_files(), tmp_path / "canary")
    assert {name for name, answer in found.items() if answer != "taken"} == set()


def test_nothing_gets_past_the_loaders_alone(
    tmp_path: Path, start: Callable[[frozenset[Layer]], Converter]
) -> None:
    """With neither gate nor jail, the files that carry no code do no more harm."""
    harmless = [file for file in HOSTILE if not file.carries_code]
    assert len(harmless) >= 100
    found = read_all(start(frozenset()), harmless, tmp_path / "canary")
    assert surprises(found) == []


_PRISONER = f"""
import os, sys
from worker import sandbox
from worker.sandbox import Jail
parent, jail, *paths = sys.argv[1:]
jail = Jail.from_json(jail)
sandbox.enter(int(parent), jail)
sandbox.limit(jail, file_bytes=1 << 20, memory_bytes=1 << 30, cpu_seconds=60)
sys.argv[1:] = paths
{PLAIN_UNPICKLER}
print("still here")
"""


def unpickle_behind(walls: frozenset[Layer], folder: Path) -> list[str]:
    """Let a loader that runs code read all files that carry some; return whose canary was made."""
    home, outside = folder / "home", folder / "outside"
    home.mkdir()
    outside.mkdir()
    canaries = {}
    files: list[Any] = []
    for number, file in enumerate(file for file in HOSTILE if file.carries_code):
        canary, path = outside / str(number), home / str(number)
        path.write_bytes(file.build(canary))
        canaries[str(file)] = canary
        files.append(path)
    jail = Jail(home=home, stage=Stage.CONVERT, gpu=False, layers=walls)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PRISONER, str(os.getpid()), jail.to_json(), *files],
        env=sandbox.child_environment(jail),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "still here" in done.stdout, done.stderr
    return [name for name, canary in canaries.items() if canary.exists()]


@needs(Layer.LANDLOCK)
@needs(Layer.SECCOMP)
def test_jail_alone_holds_code_that_runs(tmp_path: Path) -> None:
    """Neither gate nor loader: every gadget runs, and reaches nothing outside."""
    for name, walls in (("open", frozenset[Layer]()), ("closed", LAYERS)):
        (tmp_path / name).mkdir()
        reached = unpickle_behind(walls, tmp_path / name)
        expected = [str(file) for file in HOSTILE if file.carries_code] if not walls else []
        assert reached == expected, json.dumps(reached)
