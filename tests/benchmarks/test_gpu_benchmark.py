"""The benchmark of the kernels needs a GPU; its attention, and what it says without one, do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_kernels import NAME, PAGE, Pages, attend
from proxytune.engine.kernels.paged_attention import token_slots
from proxytune.models.support import examine
from tests.support import tiny
from tests.support.checkout import ROOT
from tests.support.tiers import slow

pytestmark = pytest.mark.gpu
FAMILIES = {
    "llama": {},
    "mistral": {},
    "gemma2": {},
    "gpt-oss": {},
    "deepseek-v3": {},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("family", ["llama", *map(slow, list(FAMILIES)[1:])])
def test_hf_models_decode_through_the_kernel(family: str, kernels: torch.device) -> None:
    """Chunks of 3, 16, 5 and 1 tokens per row, over pages, give what one plain forward gives."""
    model = tiny.build(family, 1, **FAMILIES[family]).float().to(kernels)
    ids = torch.randint(3, 250, (2, 25), generator=torch.Generator().manual_seed(0)).to(kernels)
    with torch.inference_mode():
        want = [model(input_ids=row[None], use_cache=False).logits[0] for row in ids]
        pages = pages_of(model, kernels)
        model.set_attn_implementation(NAME)
        start = 0
        for new in (3, 16, 5, 1):
            pages.lengths += new
            pages.slots = token_slots(pages.table, pages.lengths, new, PAGE, spare=0)
            logits = model(
                input_ids=ids[:, start : start + new].reshape(1, -1),
                position_ids=torch.arange(start, start + new, device=kernels).repeat(2)[None],
                use_cache=False,
                pages=pages,
            ).logits[0]
            for row, got in enumerate(logits.unflatten(0, (2, new))):
                torch.testing.assert_close(got, want[row][start : start + new], atol=2e-3, rtol=1e-3)
            start += new


def pages_of(model: torch.nn.Module, device: torch.device) -> Pages:
    """Empty pools for two rows of up to three pages each, in no order."""
    pools = [
        tuple(torch.zeros(7, PAGE, layer.heads, size, device=device) for size in (layer.key, layer.value))
        for layer in examine(model).layers  # type: ignore[arg-type]
    ]
    table = torch.tensor([[5, 1, 3], [2, 6, 4]], device=device)
    lengths = torch.zeros(2, dtype=torch.long, device=device)
    return Pages(pools, table, lengths, lengths)  # type: ignore[arg-type]


def test_attention_without_pages_is_a_mistake() -> None:
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(AssertionError):
        attend(torch.nn.Identity(), q, q, q, None)


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    script = ROOT / "benchmarks" / "gpu_kernels.py"
    done = subprocess.run([sys.executable, script, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "--device cpu: this measures kernels that run on a GPU only" in done.stderr
    assert len(done.stderr.splitlines()) == 1
