"""
Measure AWM, with its preset, on the backdoored digits of the demo.

Per training seed: train the backdoored model, draw five clean samples per class, purify, and
measure clean accuracy and attack success rate on test images that were not drawn. ``--quick`` takes
two seeds instead of ten; ``--params`` overrides parts of the preset. With ``--out`` every seed is
appended as one JSON line, and seeds that the file already has are not measured again.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import torch

from common.catalogue.methods import METHODS, AwmParameters
from examples.digits import ARGUMENTS, draw_clean_samples, measure, train_backdoored
from worker.architectures.registry import build
from worker.purify.awm import AdversarialWeightMasking
from worker.purify.masking import fold_all

SEEDS = tuple(range(10))
QUICK_SEEDS = (0, 1)
SAMPLES_PER_CLASS = 5
TARGETS = {"asr_before_min": 0.9, "asr_after_max": 0.1, "acc_drop_max": 0.05}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Hold one seed's outcome, rates as fractions."""

    seed: int
    acc_before: float
    asr_before: float
    acc_after: float
    asr_after: float
    seconds: float

    @property
    def is_within_targets(self) -> bool:
        """Tell whether the attack worked before, is gone after, and the accuracy is kept."""
        return (
            self.asr_before >= TARGETS["asr_before_min"]
            and self.asr_after < TARGETS["asr_after_max"]
            and self.acc_before - self.acc_after < TARGETS["acc_drop_max"]
        )


def purify_once(seed: int, given: AwmParameters) -> Measurement:
    """Train, purify and measure with one seed for everything."""
    model, split = train_backdoored(seed)
    images, labels, rest = draw_clean_samples(split, SAMPLES_PER_CLASS, seed)
    method = METHODS["awm"]
    params = method.resolve(
        given,
        count=len(labels),
        classes=ARGUMENTS.classes,
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
    )
    purifier = AdversarialWeightMasking(**params.model_dump())
    started = time.perf_counter()
    masks = purifier.purify(model, images, labels, seed=seed).masks
    seconds = time.perf_counter() - started
    purified = build("small_cnn", ARGUMENTS)
    purified.load_state_dict(fold_all(model.state_dict(), masks))
    acc_before, asr_before = measure(model, rest)
    acc_after, asr_after = measure(purified.eval(), rest)
    return Measurement(
        seed=seed,
        acc_before=acc_before,
        asr_before=asr_before,
        acc_after=acc_after,
        asr_after=asr_after,
        seconds=round(seconds, 2),
    )


def machine(given: AwmParameters) -> dict[str, object]:
    """Return what the numbers depend on besides the code."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "params": given.model_dump(exclude_none=True),
    }


def measured_before(out: Path | None, given: AwmParameters) -> dict[int, Measurement]:
    """
    Return what a stopped run has left in *out*, by seed.

    Raises:
        SystemExit: The file was made with other parameters.
    """
    if out is None or not out.is_file():
        return {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    if rows and rows[0]["params"] != given.model_dump(exclude_none=True):
        raise SystemExit(f"{out} was made with other parameters; name another file")
    found = [Measurement(**row) for row in rows if "seed" in row]
    return {measurement.seed: measurement for measurement in found}


def main() -> None:
    """Measure every seed, print the table, and end with the summary as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only the seeds {QUICK_SEEDS}")
    parser.add_argument("--data", type=Path, help="not needed; the digits come with scikit-learn")
    parser.add_argument("--out", type=Path, help="file to append to and to resume from")
    parser.add_argument("--params", default="{}", help="parameters of awm, as JSON")
    arguments = parser.parse_args()
    given = AwmParameters.model_validate_json(arguments.params)
    torch.set_num_threads(1)  # The sums, and with them the rates, depend on the thread count.
    torch.use_deterministic_algorithms(True)

    seeds = QUICK_SEEDS if arguments.quick else SEEDS
    done = measured_before(arguments.out, given)
    lines = [] if done else [machine(given)]
    print("seed  acc before  asr before  acc after  asr after  seconds")
    for position, seed in enumerate(seeds, start=1):
        if seed not in done:
            print(f"seed {seed} ({position} of {len(seeds)})", file=sys.stderr, flush=True)
            done[seed] = purify_once(seed, given)
            lines.append(asdict(done[seed]))
        row = done[seed]
        print(
            f"{row.seed:4d}  {row.acc_before:10.3f}  {row.asr_before:10.3f}  {row.acc_after:9.3f}"
            f"  {row.asr_after:9.3f}  {row.seconds:7.1f}",
            flush=True,
        )
        if arguments.out:
            with arguments.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            lines.clear()

    rows = [done[seed] for seed in seeds]
    summary = {
        "benchmark": "awm_digits",
        "figures": {
            "seeds": len(rows),
            "seeds_within_targets": sum(row.is_within_targets for row in rows),
            "asr_before_min": min(row.asr_before for row in rows),
            "asr_after_mean": mean(row.asr_after for row in rows),
            "asr_after_max": max(row.asr_after for row in rows),
            "acc_drop_mean": mean(row.acc_before - row.acc_after for row in rows),
            "acc_drop_max": max(row.acc_before - row.acc_after for row in rows),
        },
        "targets": TARGETS,
        "unmeasured": [],
        "met": all(row.is_within_targets for row in rows),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
