"""The fuzz targets hold the laws that they state, and notice when one is broken."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

import fuzz.targets
from common.errors import DamagedFile
from common.formats.model import inspect_model
from fuzz.__main__ import read_log
from fuzz.targets import TARGETS
from tests.support.stack import REPOSITORY
from worker import checkpoints


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_keeps_the_laws_and_both_answers_occur(name: str) -> None:
    """A target starts from inputs that are accepted, and so reach the loader, and from others."""
    answers = {TARGETS[name].check(seed) for seed in TARGETS[name].seeds()}
    assert answers == {True, False}


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("torch_zip", "inspect_model"),
        ("pickle_walk", "inspect_model"),
        ("safetensors", "check_finite"),
        ("safetensors_header", "inspect_model"),
        ("samples", "inspect_samples"),
        ("samples_header", "inspect_samples"),
        ("npy", "inspect_samples"),
    ],
)
def test_another_exception_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, name: str, parser: str
) -> None:
    """What is no ``Problem`` is not swallowed."""

    def broken(*_: Any, **__: Any) -> NoReturn:
        raise ValueError("a bug")

    monkeypatch.setattr(fuzz.targets, parser, broken)
    with pytest.raises(ValueError, match="a bug"):
        TARGETS[name].check(TARGETS[name].seeds()[0])


@pytest.mark.parametrize("name", ["torch_zip", "safetensors"])
def test_a_gate_that_accepts_more_than_the_loader_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What the loader calls damaged must not have passed the gate."""

    def refuse(*_: Any) -> NoReturn:
        raise DamagedFile

    monkeypatch.setattr(checkpoints, "load", refuse)
    with pytest.raises(AssertionError, match="the gate accepts"):
        TARGETS[name].check(TARGETS[name].seeds()[0])


def test_a_gate_that_sees_other_shapes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and loader must read the same tensors."""
    check, seeds = TARGETS["torch_zip"].check, TARGETS["torch_zip"].seeds()
    other = fuzz.targets._written(seeds[1])
    loaded = checkpoints.load(other, inspect_model(other).format)
    monkeypatch.setattr(checkpoints, "load", lambda *_: loaded)
    with pytest.raises(AssertionError, match="other tensors"):
        check(fuzz.targets._torch_saves({"another": loaded.tensors["0.weight"]}))


def test_log_is_read() -> None:
    """Executions and coverage are the last that libFuzzer prints; nothing is made up without them."""
    log = (
        "#11\tINITED cov: 302 ft: 684 corp: 8/15324b exec/s: 0 rss: 259Mb\n"
        "#30\tNEW    cov: 309 ft: 881 corp: 15/23Kb lim: 3345 exec/s: 0 rss: 259Mb\n"
        "stat::number_of_executed_units: 31\n"
    )
    assert read_log(log) == {"executions": 31, "coverage_edges": 309, "features": 881}
    assert read_log("") == {"executions": None, "coverage_edges": None, "features": None}


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs the extra 'fuzz' (make fuzz)"
)
def test_a_run_is_recorded(tmp_path: Path) -> None:
    """The command fuzzes a target and appends what came of it."""
    out = tmp_path / "fuzz.jsonl"
    command = [sys.executable, "-m", "fuzz", "--seconds", "2", "--jobs", "1", "--out", str(out)]
    subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "fields"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    row = json.loads(out.read_text())
    assert row["target"] == "fields"
    assert row["executions"] > len(TARGETS["fields"].seeds())
    assert row["coverage_edges"] > 0
    assert row["findings"] == []
