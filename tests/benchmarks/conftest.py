"""What the tests of benchmarks on the zoo stand on: files so small that training takes a second."""

from pathlib import Path

import pytest

from benchmarks import zoo
from tests.support.zoo_images import held_out, write_images


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of small files, of which models are trained for an epoch, and kept in no other."""
    for name, classes in zoo.CLASSES.items():
        monkeypatch.setitem(zoo.HELD_OUT, name, held_out(classes))
        monkeypatch.setitem(zoo.EPOCHS, name, 1)
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    write_images(tmp_path / "data")
    return tmp_path / "data"
