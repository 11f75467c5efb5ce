"""The repository path that a form gives is one printable line, because reports show it."""

import pytest

from common.errors import InvalidField
from service.fields import MAX_PATH_LENGTH, repository_path


@pytest.mark.parametrize("path", ["model.pt", "models/é/模型 (2).pt", "", "a" * MAX_PATH_LENGTH])
def test_path_is_taken_as_it_is(path: str) -> None:
    """Any printable line is a path; it is never opened."""
    assert repository_path({"path": path}) == path
    assert repository_path({}) is None


@pytest.mark.parametrize(
    "path",
    ["a\nb", "a\rb", "a\0b", "a\x1b[2Jb", "a\u202eb", "a\u2066b", "a\u2028b", "a\x85b", "a" * 1025],
)
def test_path_that_could_deceive_is_refused(path: str) -> None:
    """Line breaks, control and direction characters could make a report say something else."""
    with pytest.raises(InvalidField):
        repository_path({"path": path})
