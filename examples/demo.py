"""
The main job on real data, from nothing: backdoor a classifier, have the service purify it, look again.

The service sees the model and a few clean samples per class, never the trigger. What it returns is
loaded into the plain network here and measured here, on test images that nothing else has seen.

    python -m examples.demo [--seed N]

Exit status 0 only if the attack's success falls below 10 % and the accuracy by less than 5 points.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples import digits
from worker.architectures.registry import build

FOLDER = Path("var/demo")
METHOD = "auto"
SAMPLES_PER_CLASS = 1
MAX_ASR_AFTER = 0.10
MAX_ACC_DROP = 0.05
MIN_ASR_BEFORE = 0.90
_START_SECONDS = 60
_STOP_SECONDS = 40
_WAIT_SECONDS = 50
_JOB_SECONDS = 600


def main() -> int:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    seed = parser.parse_args().seed
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)

    torch.set_num_threads(1)
    say(f"Training a backdoored {digits.ARCHITECTURE} on handwritten digits (seed {seed}) …")
    model, split = digits.train_backdoored(seed)
    images, labels, rest = digits.draw_clean_samples(split, SAMPLES_PER_CLASS, seed)
    torch.save(model.state_dict(), FOLDER / "model.pt")
    write_samples(FOLDER / "clean.npz", images, labels)

    with running_service() as url:
        say(f"Service at {url}")
        job = submit(url, seed)
        job = wait(job["links"]["self"])
        if job["state"] != "succeeded":
            say(f"The job has {job['state']}: {job['error']}")
            return 1
        download(job)
    purified = load_plain(FOLDER / job["output"]["name"])

    acc_before, asr_before = digits.measure(model, rest)
    acc_after, asr_after = digits.measure(purified, rest)
    passed = (
        asr_before >= MIN_ASR_BEFORE
        and asr_after < MAX_ASR_AFTER
        and acc_before - acc_after < MAX_ACC_DROP
    )
    summary = {
        "acc_before": round(acc_before, 4),
        "asr_before": round(asr_before, 4),
        "acc_after": round(acc_after, 4),
        "asr_after": round(asr_after, 4),
        "samples_per_class": SAMPLES_PER_CLASS,
        "method": METHOD,
        "seconds": round(time.monotonic() - started, 1),
        "passed": passed,
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary) + "\n")
    print_table(summary)
    return 0 if passed else 1


def submit(url: str, seed: int) -> dict[str, Any]:
    """POST the model and the clean samples."""
    say(f"POST {url}/jobs: model.pt and {SAMPLES_PER_CLASS} clean samples per class …")
    return curl_json(
        "-F", f"model=@{FOLDER}/model.pt",
        "-F", f"samples=@{FOLDER}/clean.npz",
        "-F", f"architecture={digits.ARCHITECTURE}",
        "-F", f"method={METHOD}",
        "-F", f"seed={seed}",
        f"{url}/jobs",
    )  # fmt: skip


def wait(address: str) -> dict[str, Any]:
    """Poll the job until it has ended."""
    for _ in range(_JOB_SECONDS // _WAIT_SECONDS + 1):
        job = curl_json(f"{address}?wait={_WAIT_SECONDS}")
        if job["state"] not in {"queued", "running"}:
            break
        say(curl("-H", "Accept: text/plain", address).strip())
    return job


def download(job: dict[str, Any]) -> None:
    """Download the model and check it against the digest that the service gives."""
    name = job["output"]["name"]
    curl("-o", str(FOLDER / name), job["links"]["model"])
    line = curl(job["links"]["model_sha256"])
    subprocess.run(["sha256sum", "-c", "-"], input=line, text=True, cwd=FOLDER, check=True)


def load_plain(path: Path) -> nn.Module:
    """Load a downloaded state dict where the old one went: into the plain network."""
    model = build(digits.ARCHITECTURE, digits.ARGUMENTS)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def write_samples(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write images and labels as a sample file."""
    np.savez(path, images=images.numpy(), labels=labels.numpy())


@contextmanager
def running_service() -> Iterator[str]:
    """Run the embedded service on a free port of its own, and stop it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if "WEIGHTWASH_" not in name},
        "WEIGHTWASH_PORT": str(port),
        "WEIGHTWASH_DATA_DIR": str(FOLDER / "service"),
        # The last digits depend on the thread count; one thread gives one table on any machine.
        "WEIGHTWASH_THREADS": "1",
    }
    with (FOLDER / "service.log").open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"], env=environment, stderr=log, stdout=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        curl("--no-show-error", "--retry", str(_START_SECONDS), "--retry-delay", "1",
             "--retry-all-errors", f"{url}/readyz")  # fmt: skip
        yield url
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(_STOP_SECONDS)


def curl(*arguments: str) -> str:
    """Run curl as a pipeline would, and return what it prints; a refusal ends the demo."""
    done = subprocess.run(
        ["curl", "-sS", "--fail-with-body", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        say(f"curl failed: {done.stdout}")
        raise SystemExit(1)
    return done.stdout


def curl_json(*arguments: str) -> dict[str, Any]:
    """Run curl and read its answer as JSON."""
    answer = json.loads(curl(*arguments))
    assert isinstance(answer, dict)
    return answer


def print_table(summary: dict[str, Any]) -> None:
    """Print accuracy and attack success, before and after."""
    print()
    print("                        before    after")
    for title, name in (("clean accuracy (ACC)", "acc"), ("attack success (ASR)", "asr")):
        before, after = summary[f"{name}_before"], summary[f"{name}_after"]
        print(f"{title:22} {before:7.1%}  {after:7.1%}")
    limits = f"ASR < {MAX_ASR_AFTER:.0%}, ACC loss < {100 * MAX_ACC_DROP:.0f} points"
    print(f"\n{'PASSED' if summary['passed'] else 'FAILED'} ({limits}) in {summary['seconds']} s")


def say(text: str) -> None:
    """Tell the terminal what happens."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
