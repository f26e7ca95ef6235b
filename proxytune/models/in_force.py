"""Whether an adapter is in force: it changes what its model says, and nothing of what others say."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxytune.engine.attention import Forward
from proxytune.engine.kv import CacheSpec, SlotCache
from proxytune.engine.runners import ModelRunner, ReferenceRunner, SharedLora, VocabMap, feed
from proxytune.errors import UserError
from proxytune.models.adapter_files import AdapterFiles, rows_in
from proxytune.models.support import Family, probe_ids

ROUNDING = 0.02
"""By how much logits may differ, in standard deviations of them, when nothing has changed: kernels on a GPU
do not add up in the same order twice."""


def logits_by(
    forward: Forward,
    family: Family,
    device: torch.device,
    ids: list[int],
    lora: SharedLora | None = None,
    adapter: str | None = None,
) -> Tensor:
    """Logits [V] after a text, on the path that a model takes and with the adapter that it runs with."""
    everything = VocabMap(1 << 40)  # cuts nothing
    if family.path == "reference":
        plain = ReferenceRunner(forward, everything, family.window, device, len(ids), cached=False)
        plain.rows.admit()
        return feed(plain, {0: ids})[0]
    cache = SlotCache(CacheSpec(family.layers, 2 * len(ids), family.dtype, family.devices))
    runner = ModelRunner(forward, cache, everything, family.window, device, lora=lora, adapter=adapter)
    cache.admit()
    cache.reserve([len(ids)])
    return feed(runner, {0: ids})[0]


def probe_text(module: PreTrainedModel, files: AdapterFiles) -> list[int]:
    """Ids on which an adapter must show: with the tokens that it trains by name."""
    return [*probe_ids(module)[0], *(token for token in files.special_ids if token < rows_in(module))]


def require_untouched(files: AdapterFiles, host: str, before: Tensor, now: Tensor) -> None:
    """UserError if an adapter has changed the model called `host`, on whose weights it sits."""
    if float((now - before).abs().max()) > ROUNDING * float(before.std()):
        raise UserError(
            f"adapter '{files.location}' changes the {host}, whose weights it shares: give the expert its "
            "own `model`"
        )


def require_effect(files: AdapterFiles, without: Tensor, with_it: Tensor) -> None:
    """UserError unless an adapter changes a logit of a text."""
    width = min(without.shape[-1], with_it.shape[-1])
    if not bool(with_it.isfinite().all()) and bool(without.isfinite().all()):
        raise UserError(
            f"adapter '{files.location}' makes logits that are no numbers: its weights are damaged"
        )
    if torch.equal(without[..., :width], with_it[..., :width]):
        why = ": its B weights are all zero, as before the first step of training" if files.zero else ""
        raise UserError(f"adapter '{files.location}' changes no logit of the model{why}")
