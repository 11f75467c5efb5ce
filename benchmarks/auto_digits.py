"""
Measure `auto`, with its preset, on the backdoored digits of the demo, with one clean sample per class.

As ``awm_digits``, which gives five. The presets were chosen with the seeds 0 to 3 in view; 4 to 21
were unseen.
``--quick`` takes the seeds 0 and 10.
"""

import functools

from benchmarks.awm_digits import QUICK_SEEDS, SEEDS, conclude_digits, purify_once
from benchmarks.harness import measure_all, parse


def main() -> None:
    """Measure every seed and conclude."""
    options = parse(__doc__)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    measure = functools.partial(purify_once, name="auto", per_class=1)
    rows = measure_all(({"seed": seed} for seed in seeds), measure, options.out)
    conclude_digits("auto_digits", rows)


if __name__ == "__main__":
    main()
