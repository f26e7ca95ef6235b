"""The fixtures that tests of several packages use."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run on CPU tensors then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from proxytune import cpu_load
from proxytune.config import System, load_system
from proxytune.errors import UserError
from proxytune.sandbox.sandbox import Sandbox
from tests.support import tiny, tiny_system
from tests.support.endpoint import KEY, Endpoint, serving
from tests.support.require import REFERENCE, require_or_skip
from tests.support.tiers import every_nth, on_the_diagonal

if TYPE_CHECKING:
    from proxytune.models.roles import Models


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is read here lives until the end of the run: to look for garbage among it, again and again, is
    a tenth of the time that all tests take."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before tests are chosen by their marks: every way of drafting is tried in every cache and with every
    sampler, but not in all combinations at every commit."""
    on_the_diagonal(items)
    every_nth(items)


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are of the CPU, on a machine with a GPU too, unless they are marked."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _on_an_idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs beside the tests is not noted in what commands print."""
    idle = cpu_load.CpuLoad(cores=1024, waiting=0.0, runnable=0.0, machine_cores=1024)
    monkeypatch.setattr(cpu_load, "read", lambda: idle)


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
    monkeypatch.setattr("proxytune.engine.kernels.paged_attention.runs_triton", lambda tensor: True)
    monkeypatch.setattr("proxytune.engine.kernels.int8.runs_triton", lambda tensor: True)
    monkeypatch.setattr("proxytune.engine.fused.rows.runs_triton", lambda tensor: True)
    monkeypatch.setattr("proxytune.engine.cuda.sampling.runs_triton", lambda tensor: True)
    for place in ("kernels.paged_attention", "kernels.int8", "fused.rows", "cuda.sampling"):
        # a trial takes the interpreter longer than what is tested
        monkeypatch.setattr(f"proxytune.engine.{place}.trusted", lambda *_: True)
    return torch.device("cpu")


@pytest.fixture
def gpu() -> None:
    """For a machine with a CUDA device."""
    if not torch.cuda.is_available():
        require_or_skip("gpu", "no CUDA device")


@pytest.fixture
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(system: System) -> Models:
    """The models of the tiny system, loaded once."""
    from proxytune.models.roles import Models

    return Models(system)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, anti, and LoRA, DoRA, prompt-tuning and P-tuning checkpoints on anti."""
    from tests.support import adapters

    return adapters.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=["slots", "slots by torch", "pages"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's layout with its kernel and, as where there is no compiler, without; pages are what CUDA
    uses."""
    if request.param == "pages":
        from tests.support.decoders import use_pages

        use_pages(monkeypatch)
    if request.param == "slots by torch":
        monkeypatch.setattr("proxytune.engine.attention.attention.takes", lambda query, stored: False)
    return str(request.param)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Endpoint]:
    """A server on this machine that speaks chat completions; the environment points to it."""
    try:
        import httpx2  # noqa: F401
    except ImportError:
        require_or_skip("judges", "httpx2 is not installed: pip install 'proxytune[judges]'")
    with serving() as state:
        monkeypatch.setenv("OPENAI_BASE_URL", state.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "cache"))
        yield state
