"""Every bad upload of the registry is refused by the gate alone, and every good one is taken."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from common.errors import Refused
from common.formats.model import check_finite, inspect_model
from common.formats.samples import Purpose, check_labels, inspect_samples
from tests.hostile_files import Field, HostileFile, honest_files, hostile_files
from tests.service.forms import CLASSES
from tests.support.stack import REPOSITORY
from tests.support.unpickler import PLAIN_UNPICKLER

HOSTILE, HONEST = hostile_files(), honest_files()
MAX_BYTES = 64 << 20
MAX_PEAK_BYTES = 160 << 20


def pass_the_gate(path: Path, file: HostileFile) -> None:
    """Do to *path* what the service does to an upload."""
    if file.field is Field.MODEL:
        check_finite(path, inspect_model(path))
    else:
        purpose = Purpose(file.field)
        check_labels(inspect_samples(path, purpose, max_bytes=MAX_BYTES), purpose, classes=CLASSES)


def test_registry_is_what_it_says() -> None:
    """A hundred tricks and more, of distinct names and contents, against fifteen honest files."""
    nowhere = Path("/nonexistent/canary")
    contents = [file.build(nowhere) for file in HOSTILE]
    assert (
        len({(file.field, content) for file, content in zip(HOSTILE, contents, strict=True)}) >= 100
    )
    assert len({str(file) for file in HOSTILE}) == len(HOSTILE)
    assert max(map(len, contents)) < 2 << 20
    assert len(HONEST) >= 15
    assert sum(file.carries_code for file in HOSTILE) >= 40


@pytest.mark.parametrize("file", HOSTILE, ids=str)
def test_hostile_file_is_refused(tmp_path: Path, file: HostileFile) -> None:
    """The gate answers with one of the codes it should, in bounded memory, and runs nothing."""
    canary = tmp_path / "canary"
    path = tmp_path / f"upload{file.suffix}"
    path.write_bytes(file.build(canary))
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as caught:
            pass_the_gate(path, file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code in file.codes
    assert caught.value.hint
    assert caught.value.detail.encode("utf-8")
    assert peak < MAX_PEAK_BYTES
    assert not canary.exists()


@pytest.mark.parametrize("file", HONEST, ids=str)
def test_honest_file_is_taken(tmp_path: Path, file: HostileFile) -> None:
    """No control is refused."""
    path = tmp_path / f"upload{file.suffix}"
    path.write_bytes(file.build(tmp_path / "canary"))
    pass_the_gate(path, file)


def test_code_in_hostile_files_is_live(tmp_path: Path) -> None:
    """A plain unpickler creates the canary of every file that carries code: no gadget is a dud."""
    canaries = {}
    paths = []
    for number, file in enumerate(file for file in HOSTILE if file.carries_code):
        canary = tmp_path / f"canary{number}"
        path = tmp_path / f"upload{number}"
        path.write_bytes(file.build(canary))
        canaries[str(file)] = canary
        paths.append(str(path))
    subprocess.run(
        [sys.executable, "-c", PLAIN_UNPICKLER, *paths],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert [name for name, canary in canaries.items() if not canary.exists()] == []


def test_gate_needs_no_torch(tmp_path: Path) -> None:
    """The gate reads a model and samples without torch, safetensors or Pillow ever being imported."""
    paths = [tmp_path / "model.pt"]
    paths[0].write_bytes(HONEST[0].build(tmp_path))
    for suffix in (".npz", ".zip", ".safetensors"):
        honest = next(f for f in HONEST if f.suffix == suffix and f.field is not Field.MODEL)
        paths.append(tmp_path / f"clean{suffix}")
        paths[-1].write_bytes(honest.build(tmp_path))
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "from common.formats.model import check_finite, inspect_model\n"
        "from common.formats.samples import Purpose, inspect_samples\n"
        "model, *samples = map(Path, sys.argv[1:])\n"
        "check_finite(model, inspect_model(model))\n"
        "for path in samples:\n"
        "    inspect_samples(path, Purpose.SAMPLES, max_bytes=1 << 20)\n"
        "print(json.dumps(sorted({'torch', 'safetensors', 'PIL'} & set(sys.modules))))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert json.loads(found.stdout) == []
