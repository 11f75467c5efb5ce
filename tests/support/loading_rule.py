"""
The lint rule on loaders: every file is read by a call that cannot run code, spelled out where it is made.

    python -m tests.support.loading_rule [PATH…]     prints each violation, exit 1 if there is one

ruff's ``banned-api`` forbids the loaders that always run code (``pyproject.toml``). It sees names and not
arguments; this rule sees the arguments of those that may be called:

- ``torch.load`` needs a literal ``weights_only=True``, ``numpy.load`` and ``read_array`` a literal
  ``allow_pickle=False``;
- neither keyword has any other value in any call or dict;
- a loader is called where it is named: not kept under another name, passed on, or looked up by a text.

What neither sees is a name put together at run time; the sandbox is for that.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("benchmarks", "common", "examples", "fuzz", "migrations", "service", "tests", "worker")

SAFE_VALUES: Mapping[str, bool] = {"weights_only": True, "allow_pickle": False}
"""The one value that each keyword may have."""

LOADERS: Mapping[str, str] = {
    "torch.load": "weights_only",
    "torch.serialization.load": "weights_only",
    "numpy.load": "allow_pickle",
    "numpy.lib.npyio.load": "allow_pickle",
    "numpy.lib.format.read_array": "allow_pickle",
}
"""The loaders that may be called, by the keyword that they must be given."""

UNPICKLERS = frozenset(
    {
        "_pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "jsonpickle",
        "marshal",
        "pickle",
        "shelve",
    }
)
"""Modules that may not be imported by a text, which ruff does not read."""


def violations(source: str, name: str = "<source>") -> list[str]:
    """Return ``name:line: what is wrong`` for each violation in a module's source."""
    return [f"{name}:{line}: {wrong}" for line, wrong in _Module(ast.parse(source)).violations()]


def main(paths: list[Path]) -> int:
    """Check files and folders; print what is found."""
    found = []
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found += violations(file.read_text(), str(file))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


class _Module:
    """A module with the meaning of the names that it imports."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._names: dict[str, str] = {}
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        bound = alias.asname or alias.name.split(".")[0]
                        self._names[bound] = alias.name if alias.asname else bound
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    for alias in names:
                        self._names[alias.asname or alias.name] = f"{module}.{alias.name}"
                case _:
                    pass

    def violations(self) -> Iterator[tuple[int, str]]:
        called = {id(node.func) for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        for node in ast.walk(self._tree):
            match node:
                case ast.Call():
                    for wrong in self._wrong_in(node):
                        yield node.lineno, wrong
                case ast.Dict(keys=keys, values=values):
                    for key, value in zip(keys, values, strict=True):
                        if isinstance(key, ast.Constant) and _is_unsafe(key.value, value):
                            yield node.lineno, f"{key.value!r} with another value than the safe one"
                case ast.Attribute() | ast.Name() if id(node) not in called:
                    if (meant := self._meaning(node)) in LOADERS:
                        yield node.lineno, f"{meant} is not called where it is named"
                case _:
                    pass

    def _wrong_in(self, call: ast.Call) -> Iterator[str]:
        for keyword in call.keywords:
            if _is_unsafe(keyword.arg, keyword.value):
                yield f"{keyword.arg}= has another value than the literal safe one"
        meant = self._meaning(call.func)
        given = {keyword.arg for keyword in call.keywords}
        needed = LOADERS.get(meant or "")
        if needed is not None and needed not in given:
            yield f"{meant} needs a literal {needed}={SAFE_VALUES[needed]}"
        if meant in LOADERS and "pickle_module" in given:
            yield f"{meant} is given a pickle module"
        constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str)]
        if meant in {"getattr", "builtins.getattr", "operator.attrgetter"}:
            of = self._meaning(call.args[0]) if call.args else None
            if any(f"{of}.{text}" in LOADERS for text in texts):
                yield "a loader is looked up by a text"
        if meant in {"__import__", "builtins.__import__", "importlib.import_module"}:
            for text in texts:
                if text.split(".")[0] in UNPICKLERS:
                    yield f"{text} is imported by a text"

    def _meaning(self, node: ast.expr) -> str | None:
        """Return the full name of what *node* names, or None where it is no name."""
        match node:
            case ast.Name(id=name):
                return self._names.get(name, name)
            case ast.Attribute(value=value, attr=attribute):
                inner = self._meaning(value)
                return None if inner is None else f"{inner}.{attribute}"
            case _:
                return None


def _is_unsafe(keyword: object, value: ast.expr) -> bool:
    if not isinstance(keyword, str) or keyword not in SAFE_VALUES:
        return False
    return not (isinstance(value, ast.Constant) and value.value is SAFE_VALUES[keyword])


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    sys.exit(main(given or [REPOSITORY / package for package in PACKAGES]))
