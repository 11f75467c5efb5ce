"""Bound what a value costs whoever walks it, prints it or writes it again."""

from collections.abc import Iterable
from typing import Any

from common.errors import UnsupportedFormat

MAX_DEPTH = 64
"""Dicts, lists and tuples in one another: whoever walks or writes the value recurses as deep. An
optimiser's state has five."""

MAX_VALUES = 5_000_000
"""Values, where one that is held twice counts twice: a billion laughs is a few dozen lists for a pickle,
and a billion for whoever walks or prints them."""

_CONTAINERS = (dict, list, tuple)


class AttributedDict(dict[Any, Any]):
    """An ``OrderedDict``, which torch may give the attribute ``_metadata``."""

    metadata: object = None


def check_nesting(value: object) -> None:
    """
    Walk a value of dicts, lists and tuples once, each container as often as it is there.

    Raises:
        UnsupportedFormat: It is nested too deep, holds too much, or holds itself.
    """
    done: dict[int, tuple[int, int]] = {}  # depth and values of each container, by its id
    path: list[int] = []
    is_open: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting[-1]
        if id(current) in done or not isinstance(current, _CONTAINERS):
            waiting.pop()
            continue
        inside = [each for each in _values(current) if isinstance(each, _CONTAINERS)]
        if path and path[-1] == id(current):
            depths, counts = zip(*((done[id(each)]) for each in inside), strict=True)
            done[id(current)] = 1 + max(depths), len(current) + sum(counts)
            is_open.remove(path.pop())
        elif not inside:
            done[id(current)] = 1, len(current)
        else:
            path.append(id(current))
            is_open.add(id(current))
            if any(id(each) in is_open for each in inside):
                raise UnsupportedFormat("The file holds a value that holds itself.")
            waiting += [each for each in inside if id(each) not in done]
        depth, values = done.get(id(current), (0, 0))
        if max(depth, len(path)) > MAX_DEPTH or values > MAX_VALUES:
            raise UnsupportedFormat("The file's values are nested too deep, or too many.")


def _values(container: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    if isinstance(container, AttributedDict):
        return [*container.values(), container.metadata]
    return container.values() if isinstance(container, dict) else container
