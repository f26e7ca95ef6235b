"""Programs that others wrote, against a server of tiny random models: lm-eval's `local-completions`, and
schemathesis with our OpenAPI page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune.config import System
from proxytune.models.roles import Models
from proxytune.options import ServeOptions
from tests.support import lm_eval_tasks
from tests.support.require import require_or_skip

try:
    import datasets
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from proxytune.integrations.lm_eval import ProxyTunedLM
    from tests.support import lm_eval_oracle as oracle
except ImportError:
    require_or_skip("lm-eval", "lm-eval is not installed")
try:
    from tests.support.servers import Served, served
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")


LEFT_OUT = "unsupported_method,positive_data_acceptance"
"""A valid body can name a model that is not there, or a token."""


@pytest.fixture(scope="module")
def here(trio: System) -> Iterator[Served]:
    options = ServeOptions(port=0, max_choices=8)
    with served(Models(trio), options) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.every(2)
def test_lm_eval_gets_what_it_gets_in_process(
    here: Served, trio: System, tmp_path: Path, tokens: bool
) -> None:
    """Every log-probability, choice and response, in float64; with token and with text prompts."""
    tasks = [
        lm_eval_tasks.write(tmp_path / "choose", "choose", lm_eval_tasks.CHOOSE, lm_eval_tasks.choices(4)),
        lm_eval_tasks.write(tmp_path / "sums", "sums", lm_eval_tasks.GENERATE, lm_eval_tasks.sums(3)),
        lm_eval_tasks.write(tmp_path / "read", "read", lm_eval_tasks.READ, lm_eval_tasks.texts(2)),
    ]
    remote = LocalCompletionsAPI(
        model=trio.name,
        base_url=f"{here.url}/v1/completions",
        tokenizer=trio.base.model if tokens else None,
        tokenizer_backend="huggingface" if tokens else "remote",
        tokenized_requests=tokens,
        add_bos_token=tokens,
        max_length=255,
        batch_size=4 if tokens else 1,
        eos_string="</s>",
    )
    kinds = tasks if tokens else tasks[1:2]  # texts: lm-eval's remote tokenizer puts no <s> first, we do
    theirs, ours = oracle.evaluated(remote, kinds), oracle.evaluated(ProxyTunedLM(trio), kinds)
    assert oracle.answers(theirs, "sums") == oracle.answers(ours, "sums")
    for task in ("choose", "read") if tokens else ():
        found = oracle.logprobs(theirs, task)
        assert found == pytest.approx(oracle.logprobs(ours, task), abs=1e-9) and found
        assert oracle.figures(theirs, task) == pytest.approx(oracle.figures(ours, task))
    here.wait_idle()


@pytest.mark.slow
def test_schemathesis_finds_nothing(here: Served, tmp_path: Path) -> None:
    """Requests made of our OpenAPI page, right and wrong ones: the page describes every answer."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        require_or_skip("schemathesis", "schemathesis is not installed")
    done = subprocess.run(
        [program, "run", f"{here.url}/openapi.json", "--max-examples", "40", "--seed", "1",
         "--checks", "all", "--exclude-checks", LEFT_OUT,
         "--generation-database", "none", "--no-color", "--request-timeout", "120"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    here.wait_idle()
