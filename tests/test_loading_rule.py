"""No file is read by a call that could run code: the rule holds, and it sees what is planted."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loading_rule import PACKAGES, violations
from tests.support.stack import REPOSITORY

# Each is caught by ruff's banned-api, by its full name whatever it is called here.
BANNED = {
    "pickle.load": "import pickle\npickle.load(f)\n",
    "pickle.loads": "from pickle import loads as read\nread(b)\n",
    "pickle.Unpickler": "import pickle as p\np.Unpickler(f).load()\n",
    "a subclass of Unpickler": "import pickle\nclass Own(pickle.Unpickler): pass\n",
    "_pickle": "import _pickle\n_pickle.loads(b)\n",
    "cPickle": "import cPickle\ncPickle.load(f)\n",
    "cloudpickle": "import cloudpickle\ncloudpickle.load(f)\n",
    "dill": "from dill import load\nload(f)\n",
    "joblib": "import joblib\njoblib.load(p)\n",
    "marshal": "import marshal\nmarshal.loads(b)\n",
    "shelve": "import shelve\nshelve.open(p)\n",
    "torch.jit.load": "import torch\ntorch.jit.load(p)\n",
    "torch.jit.load as another": "from torch import jit as j\nj.load(p)\n",
    "torch.export.load": "import torch\ntorch.export.load(p)\n",
    "torch.package": "from torch.package import PackageImporter\nPackageImporter(p)\n",
    "torch.hub": "import torch\ntorch.hub.load(r, m)\n",
    "add_safe_globals": "import torch\ntorch.serialization.add_safe_globals([C])\n",
    "safe_globals": "from torch.serialization import safe_globals\nwith safe_globals([C]): pass\n",
    "pandas": "import pandas as pd\npd.read_pickle(p)\n",
}

# Each is caught by the rule that reads arguments.
PLANTED = {
    "torch.load alone": "import torch\ntorch.load(p)",
    "weights_only=False": "import torch\ntorch.load(p, weights_only=False)",
    "weights_only=None": "import torch\ntorch.load(p, weights_only=None)",
    "weights_only by a variable": "import torch\ntorch.load(p, weights_only=safe)",
    "weights_only=1": "import torch\ntorch.load(p, weights_only=1)",
    "another module's name": "import torch as t\nt.load(p)",
    "another name": "from torch import load as l\nl(p)",
    "inside a function": "def f():\n    from torch import load\n    return load(p)",
    "where it is defined": "from torch.serialization import load\nload(p)",
    "kept under a name": "import torch\nread = torch.load\nread(p)",
    "passed on": "import functools, torch\nfunctools.partial(torch.load, p)",
    "looked up by a text": "import torch\ngetattr(torch, 'load')(p)",
    "a pickle module of one's own":
        "import torch\ntorch.load(p, weights_only=True, pickle_module=m)",
    "arguments from a dict": "import torch\ntorch.load(p, **{'weights_only': False})",
    "a dict for later": "options = {'allow_pickle': True}",
    "another function": "model.restore(p, weights_only=False)",
    "np.load alone": "import numpy as np\nnp.load(p)",
    "allow_pickle=True": "import numpy as np\nnp.load(p, allow_pickle=True)",
    "allow_pickle by position": "import numpy as np\nnp.load(p, None, True)",
    "read_array": "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
    "read_array alone": "from numpy.lib import format\nformat.read_array(f, True)",
    "NpzFile": "from numpy.lib.npyio import NpzFile\nNpzFile(f, allow_pickle=True)",
    "pickle by a text": "import importlib\nimportlib.import_module('pickle').loads(b)",
    "pickle by __import__": "__import__('pickle').loads(b)",
}  # fmt: skip

ALLOWED = {
    "torch.load": "import torch\ntorch.load(p, map_location='cpu', weights_only=True)",
    "np.load": "import numpy as np\nwith np.load(p, allow_pickle=False) as archive: pass",
    "another load": "import json\njson.load(f)\nmodule.load(p)",
    "safetensors": "import safetensors.torch\nsafetensors.torch.load_file(p)",
    "a text": "'weights_only=False'",
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_caught(name: str) -> None:
    """An unsafe call is seen under every spelling."""
    assert violations(PLANTED[name])


@pytest.mark.parametrize("name", ALLOWED)
def test_safe_call_is_allowed(name: str) -> None:
    """What cannot run code is let alone."""
    assert not violations(ALLOWED[name])


def test_every_banned_loader_is_caught_by_ruff(tmp_path: Path) -> None:
    """The loaders that always run code are banned by name, in the packages and in the tests."""
    for position, source in enumerate(BANNED.values()):
        (tmp_path / f"planted_{position}.py").write_text(source)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=TID251"]
    found = subprocess.run(
        [
            *command,
            f"--config={REPOSITORY / 'pyproject.toml'}",
            "--output-format=concise",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    missed = [
        name for position, name in enumerate(BANNED) if f"planted_{position}.py" not in found.stdout
    ]
    assert not missed


def test_planted_violation_fails_the_command(tmp_path: Path) -> None:
    """The command that ``make lint`` runs names file and line, and fails."""
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED["weights_only=False"])
    command = [sys.executable, "-m", "tests.support.loading_rule", str(planted)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"{planted}:2: " in found.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_rule_holds(package: str) -> None:
    """No module of the project breaks the rule."""
    files = list((REPOSITORY / package).rglob("*.py"))
    assert files
    assert not [found for file in files for found in violations(file.read_text(), str(file))]


def test_make_lint_obeys_the_rule() -> None:
    """``make lint``, and so ``make check``, runs both."""
    lint = (REPOSITORY / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert "ruff check ." in lint
    assert "tests.support.loading_rule" in lint
