"""
Measure how often the verdict of `auto` is right, with its preset and one clean image per class.

In two parts. On the models of the calibration part thresholds may be set; those of the test part had no
part in that. Each has models of `benchmarks.zoo`, for which samples are drawn twice, and backdoored and
clean digits, each with a seed of its own for training and samples. No step sees what is measured here.

--quick: four cases, a backdoored and a clean model of digits of each part.
--table: print the Markdown tables of what --out holds, and measure nothing.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks import zoo
from benchmarks.harness import Row, conclude_by, markdown, measure_all, or_none, parser, recorded
from benchmarks.subjects import CIFAR, GTSRB
from benchmarks.trials import DIGITS, run, trial, truth
from worker.purify.detection.verdict import Verdict

RESULTS = Path(__file__).parent / "results" / "auto_verdicts.jsonl"
DRAWS = (0, 1)
DIGITS_SEEDS = {"calibration": range(30, 52), "test": range(60, 72)}
MODELS = {"calibration": zoo.CALIBRATION, "test": zoo.TEST}
DATA = {None: "digits", CIFAR: "CIFAR", GTSRB: "GTSRB"}
INDEX = {
    "patch": "anomaly_index",
    "margin": "margin_index",
    "warp": "warp_index",
    "square": "square_index",
}
TARGETS = {
    "test_clean_called_backdoored": "<= 0",
    "test_backdoored_called_clean_share": "<= 0.1",
}


def cases(part: str) -> list[Row]:
    """Return what is to be measured of one part; digits first, since they take seconds."""
    digits = [(model, seed) for seed in DIGITS_SEEDS[part] for model in DIGITS]
    trained = [(model, seed) for model in MODELS[part] for seed in DRAWS]
    return [{"part": part, "model": model, "seed": seed} for model, seed in (*digits, *trained)]


def data_of(model: str) -> str:
    """Return what a model classifies."""
    return DATA[None if model in DIGITS else zoo.RECIPES[model].images]


def measure(case: Row, *, data: Path, device: str = "cpu", **given: object) -> Row:
    """
    Purify once; say what was found, and what it did.

    Args:
        device: Of a model of the zoo.
        given: Parameters of `auto` to set otherwise than the preset.
    """
    tried = trial(case["model"], case["seed"], data, device)
    purified, row = run(tried, "auto", seed=case["seed"], **given)
    suspects = purified.findings.get("suspects", [])
    return {
        "truth": str(truth(case["model"])),
        "suspects": suspects,
        # An attack that sends every class to the next one has no one target to be found.
        "suspects_are_target": None if tried.target is None else suspects == [tried.target],
        "nearest_to_cut": round(nearest_to_cut(purified.findings), 3),
        **row,
    }


def nearest_to_cut(findings: Mapping[str, object]) -> float:
    """
    Return the highest evidence of all signs and classes, as a share of what speaks for a backdoor.

    From 1 on a model is called `backdoored`; it may be for less, by a patch that is carried over.
    """
    cuts = cast("Mapping[str, Mapping[str, float]]", findings["cuts"])
    classes = cast("list[Mapping[str, Any]]", findings["classes"])
    scattering = cast("Mapping[str, float]", findings["scattering"])
    shares: list[float] = [
        entry[INDEX[sign]] / cut["backdoored_from"]
        for entry in classes
        for sign, cut in cuts.items()
        if entry[INDEX[sign]] is not None
    ]
    if scattering["one_to_one"] >= scattering["one_to_one_from"]:
        shares.append(scattering["classes"] / scattering["backdoored_from"])
    return max(shares)


def tables(rows: Sequence[Row]) -> str:
    """Return the confusion matrices as Markdown; what was not measured stays empty."""
    return "\n\n".join(f"**{part} part**\n\n{_matrix(rows, part)}" for part in MODELS) + "\n"


def _matrix(rows: Sequence[Row], part: str) -> str:
    lines = []
    for data in DATA.values():
        for verdict in (Verdict.CLEAN, Verdict.BACKDOORED):
            wanted = [
                case
                for case in cases(part)
                if data_of(case["model"]) == data and truth(case["model"]) is verdict
            ]
            own = [row for row in rows if any(case.items() <= row.items() for case in wanted)]
            if wanted:
                runs = f"{len(own)} of {len(wanted)}"
                lines.append([data, str(verdict), runs, *_counted(own)])
    head = (
        "data",
        "truth",
        "runs",
        *(f"called {verdict}" for verdict in Verdict),
        "the target is the only suspect",
        "highest evidence (1: backdoored), least / median / most",
    )
    return markdown(head, lines)


def _counted(rows: Sequence[Row]) -> list[str]:
    """Return the cells of one line: verdicts, targets that were found, evidence."""
    if not rows:
        return [""] * (len(Verdict) + 2)
    named = [row["suspects_are_target"] for row in rows if row["suspects_are_target"] is not None]
    nearest = [row["nearest_to_cut"] for row in rows]
    spread = (min(nearest), statistics.median(nearest), max(nearest))
    return [
        *(str(sum(row["verdict"] == verdict for row in rows)) for verdict in Verdict),
        f"{sum(named)} of {len(named)}" if named else "–",
        " / ".join(f"{value:.2f}" for value in spread),
    ]


def figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the errors of each part; None stands for what no row measured."""
    found: dict[str, float | None] = {}
    for part in MODELS:
        own = [row for row in rows if row["part"] == part]
        clean = [row for row in own if row["truth"] == Verdict.CLEAN]
        guilty = [row for row in own if row["truth"] == Verdict.BACKDOORED]
        found |= {
            f"{part}_clean_called_backdoored": or_none(
                sum, [row["verdict"] == Verdict.BACKDOORED for row in clean]
            ),
            f"{part}_backdoored_called_clean_share": or_none(
                statistics.mean, [row["verdict"] == Verdict.CLEAN for row in guilty]
            ),
            f"{part}_inconclusive_share": or_none(
                statistics.mean, [row["verdict"] == Verdict.INCONCLUSIVE for row in own]
            ),
        }
    return found


def main() -> None:
    """Measure every case and conclude."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    options.add_argument("--parts", nargs="+", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--device", default="cpu", help="of the zoo's models")
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if chosen.table:
        print(tables(recorded(chosen.out or RESULTS)), end="")
        return
    wanted = [
        case
        for part in chosen.parts
        for case in (cases(part)[: len(DIGITS)] if chosen.quick else cases(part))
    ]
    rows = measure_all(
        wanted,
        functools.partial(measure, data=chosen.data, device=chosen.device),
        chosen.out,
        jobs=chosen.jobs,
    )
    conclude_by("auto_verdicts", figures=figures(rows), targets=TARGETS)


if __name__ == "__main__":
    main()
