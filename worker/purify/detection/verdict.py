"""Name what can be said of a model."""

from enum import StrEnum


class Verdict(StrEnum):
    """What the evidence says of a model."""

    CLEAN = "clean"  # no class is easier to reach than the others
    BACKDOORED = "backdoored"  # one class stands out
    INCONCLUSIVE = "inconclusive"  # neither can be said
