"""What the tests share: where the reference data is, and when a missing thing is a failure."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import tiny
import torch

from proxytune.config import System, load_system
from proxytune.errors import UserError
from proxytune.sandbox import Sandbox
from tests import tiny_system

if not torch.cuda.is_available():  # before anything imports triton: its kernels run on CPU tensors then
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("PROXYTUNE_REFERENCE_DATA") or ROOT.parent / "shared")


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are of the CPU, on a machine with a GPU too, unless they are marked."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def require_or_skip(kind: str, reason: str) -> None:
    """Skip the test, or fail it where the comma list PROXYTUNE_REQUIRE names the kind.

    Kinds: golden (reference data), gpu, tune (bitsandbytes, peft), wheel (a build), demo (its weights),
    sandbox (its backends), judges (openai), browser (playwright and a Chromium), triton (its interpreter runs
    the CUDA kernels), compiler (of C++, for the CPU's kernels)."""
    if kind in os.environ.get("PROXYTUNE_REQUIRE", "").split(","):
        pytest.fail(f"PROXYTUNE_REQUIRE names '{kind}', but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with the golden predictions and the public data sets."""
    if not (REFERENCE / "golden" / "manifest.json").exists():
        require_or_skip("golden", f"no reference data in '{REFERENCE}': set PROXYTUNE_REFERENCE_DATA")
    return REFERENCE


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Three random Llamas of different sizes and seeds, saved to disk, in float64."""
    return tiny.save_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny system's file."""
    return tiny_system.write(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def system(yaml: Path) -> System:
    """The tiny system."""
    return load_system(yaml)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    """A sandbox that isolates."""
    try:
        return Sandbox.open("auto")
    except UserError as error:
        require_or_skip("sandbox", str(error))
        raise


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device on which Triton kernels run here: the GPU, or the CPU through Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        require_or_skip("triton", "triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    for module in ("paged_attention", "int8"):
        monkeypatch.setattr(f"proxytune.core.{module}.runs_triton", lambda tensor: True)
    return torch.device("cpu")
