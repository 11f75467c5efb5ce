"""
Measure what each method erases and what it costs: methods x checkpoints x samples per class x seeds.

Every method runs with its preset, as a job would, on the same draws. The public checkpoints: one image
per class, three seeds, and five for `auto` and `awm`; 5 and 50 per class: one seed (a class gives at
most half of its images). Those two also run on models of `benchmarks.zoo` that had no part in setting
any threshold. ACC, ASR and RA are measured on all images that were not drawn (and not trained on, for
the zoo's). No method sees a trigger or a target.

Spread is the standard deviation between the seeds of one checkpoint, averaged over the checkpoints. A
method whose runs are not all there yet is marked: its means are over other checkpoints than the rest's.

--quick: one image per class, one seed, the checkpoint CIFAR-10 BadNets.
--table: print the Markdown tables of what --out holds, and measure nothing.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import zoo
from benchmarks.harness import Row, conclude_by, markdown, measure_all, or_none, parser, recorded
from benchmarks.subjects import SUBJECTS, Subject, compare, draw, load_model
from benchmarks.trials import purify
from worker.purify.detection.verdict import Verdict

RESULTS = Path(__file__).parent / "results" / "erase.jsonl"
PER_CLASS = {1: (0, 1, 2), 5: (0,), 50: (0,)}
COLUMNS = ("auto", "awm", "ibau", "anp", "fine_tuning", "clp")
THOROUGHLY = ("auto", "awm")  # what a user chooses between: more seeds, more models
TARGETS = {  # of `auto` alone, over all its runs with one image per class
    "auto_fidelity_mean": ">= 0.95",
    "auto_asr_after_max": "<= 0.1",
    "auto_acc_lost_mean": "<= 0.02",
    "auto_clean_acc_lost_max": "<= 0.005",
    "auto_clean_called_backdoored": "<= 0",
    "auto_backdoored_called_clean_share": "<= 0.1",
}


def seeds(method: str, per_class: int) -> Sequence[int]:
    """Return the seeds that a method is measured with."""
    return range(5) if per_class == 1 and method in THOROUGHLY else PER_CLASS[per_class]


def subject(checkpoint: str, data: Path) -> Subject:
    """Return a public checkpoint, or a model of the zoo, trained if it is missing."""
    return SUBJECTS.get(checkpoint) or zoo.provide(checkpoint, data)


def measure(case: Row, *, data: Path, device: str) -> Row:
    """Purify once, and measure before and after."""
    attacked = subject(case["checkpoint"], data)
    samples = draw(attacked, data, per_class=case["per_class"], seed=case["seed"])
    model = load_model(attacked, data).to(device)
    purified, seconds = purify(
        case["method"],
        model,
        samples.images,
        samples.labels,
        classes=attacked.classes,
        seed=case["seed"],
    )
    after = load_model(attacked, data).to(device)
    after.load_state_dict(purified.apply(model.state_dict()))

    row = compare(attacked, samples, model, after)
    verdict = {} if purified.verdict is None else {"verdict": str(purified.verdict)}
    return {**row, **verdict, "seconds": round(seconds, 2), "device": device}


def tables(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: a summary, then every checkpoint; unmeasured stays empty."""
    parts = []
    for models, names, methods in (
        ("public checkpoints", list(SUBJECTS), COLUMNS),
        ("models trained for it", list(zoo.TEST), THOROUGHLY),
    ):
        for per_class in PER_CLASS:
            chosen = [
                row for row in rows if row["per_class"] == per_class and row["checkpoint"] in names
            ]
            images = "image" if per_class == 1 else "images"
            parts += [
                f"**{per_class} {images} per class**, {models}",
                _summary(chosen, names, methods, per_class),
                _by_checkpoint(chosen, names, methods),
            ]
    return "\n\n".join(parts) + "\n"


def _summary(
    rows: Sequence[Row], names: Sequence[str], methods: Sequence[str], per_class: int
) -> str:
    head = (
        "method",
        "seeds",
        "fidelity",
        "ASR after, mean / worst / spread %",
        "ACC lost, mean / worst / spread points",
        "RA after, mean %",
        "seconds, median, and where",
    )
    lines = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        attacked = _attacked(own)
        count = len(seeds(method, per_class))
        cells = [str(count), *[""] * (len(head) - 2)]
        if attacked:
            cells[1:] = [
                f"{statistics.mean(row['fidelity'] for row in attacked):.3f}",
                _spread(attacked, names, lambda row: 100 * row["asr_after"]),
                _spread(own, names, lambda row: 100 * _lost(row)),
                f"{100 * statistics.mean(row['ra_after'] for row in attacked):.1f}",
                f"{statistics.median(row['seconds'] for row in own):.1f} ({_devices(own)})",
            ]
        runs = len(names) * count
        missing = f" ({len(own)} of {runs} runs)" if 0 < len(own) < runs else ""
        lines.append([f"`{method}`{missing}", *cells])
    return markdown(head, lines)


def _devices(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row["device"] for row in rows}))


def _spread(rows: Sequence[Row], names: Sequence[str], figure: Callable[[Row], float]) -> str:
    """Return mean, worst, and how far the seeds of one checkpoint lie apart on average."""
    by_checkpoint = [[figure(row) for row in rows if row["checkpoint"] == name] for name in names]
    deviations = [statistics.stdev(found) for found in by_checkpoint if len(found) > 1]
    spread = f"{statistics.mean(deviations):.1f}" if deviations else "–"
    found = [value for values in by_checkpoint for value in values]
    return f"{statistics.mean(found):.1f} / {max(found):.1f} / {spread}"


def _by_checkpoint(rows: Sequence[Row], names: Sequence[str], methods: Sequence[str]) -> str:
    lines = []
    for name in names:
        own = [row for row in rows if row["checkpoint"] == name]
        cells = [_after([row for row in own if row["method"] == method]) for method in methods]
        lines.append([name, _cell(own, "before"), *cells])
    return markdown(["ACC / ASR %", "before", *(f"`{method}`" for method in methods)], lines)


def _after(rows: Sequence[Row]) -> str:
    """Return what is left, with the verdicts where a method gives any: ``3 backdoored``."""
    verdicts = Counter(row["verdict"] for row in rows if "verdict" in row)
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return _cell(rows, "after") + (f" ({said})" if said else "")


def _cell(rows: Sequence[Row], moment: str) -> str:
    if not rows:
        return ""
    acc = f"{100 * statistics.mean(row[f'acc_{moment}'] for row in rows):.1f}"
    if rows[0]["asr_before"] is None:
        return f"{acc} / –"
    return f"{acc} / {100 * statistics.mean(row[f'asr_{moment}'] for row in rows):.1f}"


def figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """
    Return the mean fidelity of every method with one image per class, and what `auto` is to reach.

    None stands for what no row measured. Verdicts are counted over the rows that have one.
    """
    one_shot = [row for row in rows if row["per_class"] == 1]
    auto = [row for row in one_shot if row["method"] == "auto"]
    attacked, clean = _attacked(auto), [row for row in auto if row["asr_before"] is None]
    called_backdoored = [row["verdict"] == Verdict.BACKDOORED for row in clean if "verdict" in row]
    called_clean = [row["verdict"] == Verdict.CLEAN for row in attacked if "verdict" in row]
    return {
        **{
            f"{method}_fidelity_mean": or_none(
                statistics.mean,
                [row["fidelity"] for row in _attacked(one_shot) if row["method"] == method],
            )
            for method in COLUMNS
        },
        "auto_asr_after_max": or_none(max, [row["asr_after"] for row in attacked]),
        "auto_acc_lost_mean": or_none(statistics.mean, [_lost(row) for row in auto]),
        "auto_clean_acc_lost_max": or_none(max, [_lost(row) for row in clean]),
        "auto_clean_called_backdoored": or_none(sum, called_backdoored),
        "auto_backdoored_called_clean_share": or_none(statistics.mean, called_clean),
    }


def _attacked(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["asr_before"] is not None]


def _lost(row: Row) -> float:
    lost: float = row["acc_before"] - row["acc_after"]
    return lost


def main() -> None:
    """Measure every case and conclude."""
    options = parser(__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    options.add_argument("--methods", nargs="+", default=COLUMNS, choices=COLUMNS)
    everything = [*SUBJECTS, *zoo.TEST]
    options.add_argument("--checkpoints", nargs="+", default=everything, choices=everything)
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if chosen.table:
        print(tables(recorded(chosen.out or RESULTS)), end="")
        return
    cases = [
        {"method": method, "checkpoint": checkpoint, "per_class": per_class, "seed": seed}
        for per_class in PER_CLASS
        for method in chosen.methods
        for seed in seeds(method, per_class)
        for checkpoint in (*SUBJECTS, *(zoo.TEST if method in THOROUGHLY else ()))
        if checkpoint in chosen.checkpoints
    ]
    if chosen.quick:
        cases = [case for case in cases if case["per_class"] == 1 and case["seed"] == 0]
        cases = [case for case in cases if case["checkpoint"] == next(iter(SUBJECTS))]
    rows = measure_all(
        cases,
        functools.partial(measure, data=chosen.data, device=chosen.device),
        chosen.out,
        jobs=chosen.jobs,
    )
    conclude_by("erase", figures=figures(rows), targets=TARGETS)


if __name__ == "__main__":
    main()
