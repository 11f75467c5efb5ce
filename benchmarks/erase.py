"""
Measure what each method erases and what it costs: methods x checkpoints x samples per class x seeds.

Every method runs with its preset, as a job would, on the same draws. One image per class: all
checkpoints, three seeds; 5 and 50 per class: one seed (a class gives at most half of its images).
ACC, ASR and RA are measured on all images that were not drawn. No method sees a trigger or a target.

Spread is the standard deviation between the seeds of one checkpoint, averaged over the checkpoints. A
method whose runs are not all there yet is marked: its means are over other checkpoints than the rest's.

--quick: one image per class, one seed, the checkpoint CIFAR-10 BadNets.
--table: print the Markdown tables of what --out holds, and measure nothing.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Row, conclude, measure_all, parser
from benchmarks.subjects import SUBJECTS, compare, draw, load_model
from common.catalogue.methods import METHODS as CATALOGUE
from worker.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "erase.jsonl"
PER_CLASS = {1: (0, 1, 2), 5: (0,), 50: (0,)}
COLUMNS = ("auto", "awm", "ibau", "anp", "fine_tuning", "clp")


def measure(case: Row, *, data: Path, device: str) -> Row:
    """Purify once, and measure before and after."""
    subject = SUBJECTS[case["checkpoint"]]
    samples = draw(subject, data, per_class=case["per_class"], seed=case["seed"])
    model = load_model(subject, data).to(device)
    method = CATALOGUE[case["method"]]
    channels, height, width = samples.images.shape[1:]
    params = method.resolve(
        method.parameters(),
        count=len(samples.images),
        classes=subject.classes,
        image_shape=(channels, height, width),
    )
    started = time.perf_counter()
    purified = METHODS[case["method"]](**params.model_dump()).purify(
        model, samples.images, samples.labels, seed=case["seed"]
    )
    seconds = time.perf_counter() - started
    after = load_model(subject, data).to(device)
    after.load_state_dict(purified.apply(model.state_dict()))

    row = compare(subject, samples, model, after)
    return {**row, "seconds": round(seconds, 2), "device": device}


def tables(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: a summary, then every checkpoint; unmeasured stays empty."""
    parts = []
    for per_class, seeds in PER_CLASS.items():
        chosen = [row for row in rows if row["per_class"] == per_class]
        images = "image" if per_class == 1 else "images"
        title = f"**{per_class} {images} per class**, {len(seeds)} seed{'s'[: len(seeds) - 1]}"
        parts.append(
            f"{title}\n\n{_summary(chosen, runs=len(SUBJECTS) * len(seeds))}\n\n{_by_checkpoint(chosen)}"
        )
    return "\n\n".join(parts) + "\n"


def _summary(rows: Sequence[Row], *, runs: int) -> str:
    head = (
        "method",
        "fidelity",
        "ASR after, mean / worst / spread %",
        "ACC lost, mean / worst / spread points",
        "RA after, mean %",
        "seconds, median",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in COLUMNS:
        own = [row for row in rows if row["method"] == method]
        attacked = [row for row in own if row["asr_before"] is not None]
        cells = [""] * (len(head) - 1)
        if attacked:
            cells = [
                f"{statistics.mean(row['fidelity'] for row in attacked):.3f}",
                _spread(attacked, lambda row: 100 * row["asr_after"]),
                _spread(own, lambda row: 100 * (row["acc_before"] - row["acc_after"])),
                f"{100 * statistics.mean(row['ra_after'] for row in attacked):.1f}",
                f"{statistics.median(row['seconds'] for row in own):.1f}",
            ]
        missing = f" ({len(own)} of {runs} runs)" if 0 < len(own) < runs else ""
        lines.append(f"| `{method}`{missing} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(rows: Sequence[Row], figure: Callable[[Row], float]) -> str:
    """Return mean, worst, and how far the seeds of one checkpoint lie apart on average."""
    by_checkpoint = [
        [figure(row) for row in rows if row["checkpoint"] == name] for name in SUBJECTS
    ]
    deviations = [statistics.stdev(found) for found in by_checkpoint if len(found) > 1]
    spread = f"{statistics.mean(deviations):.1f}" if deviations else "–"
    found = [value for values in by_checkpoint for value in values]
    return f"{statistics.mean(found):.1f} / {max(found):.1f} / {spread}"


def _by_checkpoint(rows: Sequence[Row]) -> str:
    lines = [
        "| ACC / ASR % | before | " + " | ".join(f"`{method}`" for method in COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name in SUBJECTS:
        own = [row for row in rows if row["checkpoint"] == name]
        cells = [_cell([row for row in own if row["method"] == m], "after") for m in COLUMNS]
        lines.append(f"| {name} | {_cell(own, 'before')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], moment: str) -> str:
    if not rows:
        return ""
    acc = f"{100 * statistics.mean(row[f'acc_{moment}'] for row in rows):.1f}"
    if rows[0]["asr_before"] is None:
        return f"{acc} / –"
    return f"{acc} / {100 * statistics.mean(row[f'asr_{moment}'] for row in rows):.1f}"


def main() -> None:
    """Measure every case and conclude."""
    options = parser(__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    options.add_argument("--methods", nargs="+", default=COLUMNS, choices=COLUMNS)
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if chosen.table:
        lines = (chosen.out or RESULTS).read_text().splitlines()
        print(tables([row for row in map(json.loads, lines) if "method" in row]), end="")
        return
    cases = [
        {"method": method, "checkpoint": checkpoint, "per_class": per_class, "seed": seed}
        for per_class, seeds in ({1: (0,)} if chosen.quick else PER_CLASS).items()
        for seed in seeds
        for method in chosen.methods
        for checkpoint in (list(SUBJECTS)[:1] if chosen.quick else SUBJECTS)
    ]
    rows = measure_all(
        cases,
        functools.partial(measure, data=chosen.data, device=chosen.device),
        chosen.out,
        jobs=chosen.jobs,
    )
    one_shot = [row for row in rows if row["per_class"] == 1 and row["asr_before"] is not None]
    conclude(
        "erase",
        figures={
            f"{method}_fidelity_mean": round(
                statistics.mean(row["fidelity"] for row in one_shot if row["method"] == method), 4
            )
            for method in chosen.methods
        },
        targets={},  # it compares; the targets are those of the method that is to beat these
        met=True,
    )


if __name__ == "__main__":
    main()
