"""
Fuzz one target in this process: ``python -m fuzz.one NAME [libFuzzer's options] [corpus folders]``.

``fuzz.__main__`` starts one of these per target. It ends with an error at the first finding.
"""

import sys

import atheris

INSTRUMENTED = ["common", "service", "worker", "zipfile", "pickletools", "json"]
"""Packages whose branches guide the fuzzer: ours, and the libraries that ours stand on."""


def main() -> None:
    """Fuzz until libFuzzer's limits are reached."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz.targets import TARGETS  # noqa: PLC0415 - imported where it is instrumented
    check = TARGETS[name].check

    def run(content: bytes) -> None:
        check(content)

    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
