"""The language in which clients are told what went wrong."""

import inspect
import json
import re

import pytest

from common import errors
from common.errors import PROBLEMS, Fault, NotYet, PickledModule, Problem, Refused

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Problem)
]
REEXPORT = 'torch.save(model.state_dict(), "model.pt")'


@pytest.mark.parametrize("problem", CLASSES)
def test_problem_is_complete(problem: type[Problem]) -> None:
    """Each problem has a kebab-case code, a title and a sentence of its own."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", problem.code)
    assert problem.__dict__.get("code") == problem.code
    assert problem.__dict__.get("title") == problem.title
    assert problem.title
    assert problem.__doc__
    assert problem().detail.endswith(".")


@pytest.mark.parametrize("problem", CLASSES)
def test_problem_is_of_one_kind(problem: type[Problem]) -> None:
    """Your file, not yet, or our fault: exactly one, and only the root is none."""
    kinds = sum(issubclass(problem, kind) for kind in (Refused, NotYet, Fault))
    assert kinds == (0 if problem is Problem else 1)


@pytest.mark.parametrize("problem", [found for found in CLASSES if found is not Problem])
def test_problem_names_the_fix(problem: type[Problem]) -> None:
    """Whoever is told of a problem is told what to do, in a sentence."""
    assert problem.default_hint


def test_codes_are_unique() -> None:
    """No two problems share a code, and the table holds each of them."""
    assert len({problem.code for problem in CLASSES}) == len(CLASSES)
    assert set(PROBLEMS.values()) == set(CLASSES)


@pytest.mark.parametrize("problem", CLASSES)
def test_problem_crosses_a_process(problem: type[Problem]) -> None:
    """``PROBLEMS[code](detail)`` is the problem that was written down."""
    sent = problem("This went wrong.")
    stored = json.loads(json.dumps(sent.as_dict()))
    back = PROBLEMS[stored["code"]](stored["detail"])
    assert type(back) is problem
    assert back.as_dict() == sent.as_dict() == stored


def test_hint_can_be_given_or_left_out() -> None:
    """A hint of one's own replaces the default; an empty one stays empty."""
    assert Refused("x", hint="Do y.").hint == "Do y."
    assert PickledModule("x", hint="").hint == ""
    assert PickledModule("x").hint == PickledModule.default_hint


def test_reexport_line_is_in_the_hints_and_nobody_is_told_to_load_unsafely() -> None:
    """Whoever sent a pickle reads the line that exports weights; no hint suggests unsafe loading."""
    for problem in (errors.PickledModule, errors.UnsafePickle, errors.UnsupportedFormat):
        assert REEXPORT in problem.default_hint
    everything = " ".join(f"{found.__doc__} {found.default_hint}" for found in CLASSES)
    assert "weights_only=False" not in everything
    assert "allow_pickle=True" not in everything
