"""A model that is fed one row at a time through its own cache: slow, exact, and right for every causal
language model, so it serves the families that do not go through our attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.engine.attention.attention import Forward
from proxytune.engine.kv.cache import Rows
from proxytune.engine.kv.reference_rows import ReferenceRows
from proxytune.engine.logits import widen
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners.vocab_map import VocabMap


class ReferenceRunner:
    """A model with its own cache, one row per forward; or with none, every forward from the start of the
    row."""

    def __init__(
        self,
        model: Forward,
        alignment: VocabMap,
        window: int,
        device: torch.device,
        tokens: int,
        *,
        cached: bool,
    ) -> None:
        self.model, self.alignment, self.window, self.device = model, alignment, window, device
        self.cached = cached
        self._rows = ReferenceRows(tokens)

    @property
    def rows(self) -> Rows:
        return self._rows

    @property
    def weights(self) -> object:
        return self

    @torch.inference_mode()
    def forward(self, work: Work) -> Tensor:
        kept, start = [], 0
        for segment in work.segments:
            end = start + len(segment.ids)
            kept.append(self._feed(segment, [at - start for at in work.keep if start <= at < end]))
            start = end
        return torch.cat(kept)

    def _feed(self, segment: Segment, keep: Sequence[int]) -> Tensor:
        """Append the segment to its row; logits [len(keep), V] after these of its tokens."""
        rows, row = self._rows, segment.row
        known = (
            rows.ids[row] if rows.caches[row] is None else []
        )  # no cache, or lost by a rewind: feed it again
        ids = torch.tensor([[*known, *segment.ids]], device=self.device)
        rows.ids[row] = [*rows.ids[row], *segment.ids]
        rows.lengths[row] += len(segment.ids)
        if not self.cached:
            if not keep:
                return torch.empty(0, self.alignment.size, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        else:
            out = self.model(input_ids=ids, past_key_values=rows.caches[row], use_cache=True)
            rows.caches[row], logits = out.past_key_values, out.logits
        first = logits.shape[1] - len(segment.ids)
        return self.alignment.align(widen(logits[0, [first + at for at in keep]]))
