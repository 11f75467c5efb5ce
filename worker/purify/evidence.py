"""
Judge by recovered triggers whether a model has a backdoor.

A backdoor makes one class much easier to reach than the others: the smallest patch that sends any image
there is an outlier. The index is Neural Cleanse's: deviations from the median over the classes, in
units of the median absolute deviation (MAD), which outliers do not move; here of the logarithms.
"""

from collections.abc import Sequence
from enum import StrEnum
from math import log
from statistics import median

from worker.purify.trigger import Trigger

# 1.4826 MADs are one standard deviation where values are normally distributed.
CONSISTENCY = 1.4826

# Classes that all need the same differ by chance; less than ten percent is no difference.
LEAST_DEVIATION = log(1.1)

# docs/decisions/0005-auto.md has the reason for both cuts.
BACKDOORED_FROM = 3.0
CLEAN_BELOW = 1.0

# An index says nothing where there is hardly anybody to stand out from.
MIN_CLASSES = 4

MAX_SUSPECTS = 3


class Verdict(StrEnum):
    """What the evidence says of a model."""

    CLEAN = "clean"  # no class is easier to reach than the others
    BACKDOORED = "backdoored"  # one class stands out
    INCONCLUSIVE = "inconclusive"  # neither can be said


def anomaly_indices(norms: Sequence[float]) -> list[float]:
    """
    Return for each class how many deviations its smallest trigger lies below the median.

    Norms are compared by their logarithms: they are sizes, whose spread grows with them.
    """
    sizes = [log(norm) for norm in norms]
    middle = median(sizes)
    deviation = CONSISTENCY * median(abs(size - middle) for size in sizes)
    return [(middle - size) / max(deviation, LEAST_DEVIATION) for size in sizes]


def judge(triggers: Sequence[Trigger]) -> Verdict:
    """Return what the smallest triggers of all classes say."""
    successful = [trigger for trigger in triggers if trigger.success > 0]
    if len(triggers) < MIN_CLASSES or not successful:
        return Verdict.INCONCLUSIVE
    highest = max(anomaly_indices([trigger.norm for trigger in triggers]))
    if highest >= BACKDOORED_FROM:
        return Verdict.BACKDOORED
    return Verdict.CLEAN if highest < CLEAN_BELOW else Verdict.INCONCLUSIVE


def suspects(triggers: Sequence[Trigger]) -> list[Trigger]:
    """
    Return the triggers to unlearn, the most suspicious first.

    The first is the one that stands out most, whatever the verdict; up to two more must stand out by
    themselves and nearly as far. To unlearn the patch of an innocent class costs accuracy, since such
    a patch is made of what the class looks like, and weakens what is done about the guilty one.
    """
    indices = anomaly_indices([trigger.norm for trigger in triggers])
    ranked = sorted(zip(indices, triggers, strict=True), key=lambda pair: -pair[0])
    least = max(BACKDOORED_FROM, ranked[0][0] / 2)
    return [ranked[0][1]] + [trigger for index, trigger in ranked[1:MAX_SUSPECTS] if index >= least]
