"""
Judge by recovered triggers whether a model has a backdoor.

A backdoor makes one class much easier to reach than the others, as Neural Cleanse found: the smallest
patch that sends any image there is an outlier. Its index counts deviations from the median in units of
the median absolute deviation. Ours counts how often an ordinary class's norm must be halved to get
there: among ten classes the deviation is itself a matter of chance, and a model with two small classes
and eight that happen to be alike had a higher index than one with a backdoor
(docs/decisions/0005-auto.md).
"""

from enum import StrEnum
from math import log2

from worker.purify.trigger import Field, Trigger

# Set on models trained for it: benchmarks/auto_verdicts.py, docs/decisions/0005-auto.md.
BACKDOORED_FROM = 1.0
CLEAN_BELOW = 0.65

# An index says nothing where there is hardly anybody to stand out from.
MIN_CLASSES = 4

MAX_SUSPECTS = 3
NEARLY = 0.3  # below the first's index; a fifth more in norm


class Verdict(StrEnum):
    """What the evidence says of a model."""

    CLEAN = "clean"  # no class is easier to reach than the others
    BACKDOORED = "backdoored"  # one class stands out
    INCONCLUSIVE = "inconclusive"  # neither can be said


def anomaly_index(trigger: Trigger, field: Field) -> float:
    """Return how often the norm of an ordinary class must be halved to come to the trigger's."""
    return log2(field.ordinary / trigger.norm)


def judge(field: Field) -> Verdict:
    """Return what the smallest triggers of all classes say."""
    successful = [trigger for trigger in field.triggers if trigger.success > 0]
    if len(field.triggers) < MIN_CLASSES or not successful:
        return Verdict.INCONCLUSIVE
    highest = max(anomaly_index(trigger, field) for trigger in field.triggers)
    if highest >= BACKDOORED_FROM:
        return Verdict.BACKDOORED
    return Verdict.CLEAN if highest < CLEAN_BELOW else Verdict.INCONCLUSIVE


def suspects(field: Field) -> list[Trigger]:
    """
    Return the triggers to unlearn, the most suspicious first.

    The first is the one that stands out most, whatever the verdict; up to two more must stand out by
    themselves and nearly as far. To unlearn the patch of an innocent class costs accuracy, since such
    a patch is made of what the class looks like, and weakens what is done about the guilty one.
    """
    ranked = sorted(field.triggers, key=lambda trigger: trigger.norm)
    least = max(BACKDOORED_FROM, anomaly_index(ranked[0], field) - NEARLY)
    others = [each for each in ranked[1:MAX_SUSPECTS] if anomaly_index(each, field) >= least]
    return [ranked[0], *others]
