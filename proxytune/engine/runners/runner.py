"""One model behind two operations: run a packed forward over ragged rows, and move those rows about.

`ModelRunner` feeds several rows in one forward through our attention and cache. `ReferenceRunner` feeds one
row at a time through the model's own cache: slow, exact, and right for every causal language model, so it
serves the families that do not go through our attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from proxytune.engine.attention.attention import Packed, Part
from proxytune.engine.kernels.linear import rounded
from proxytune.engine.kv.cache import KVCache, Placement, Rows, integers
from proxytune.engine.logits import widen
from proxytune.engine.runners.lora import SharedLora

Forward = Callable[..., Any]
"""A causal language model's forward: keyword arguments as in Hugging Face, an object with `.logits`."""


class Segment(NamedTuple):
    """New tokens of one row; they continue at the row's length."""

    row: int
    ids: tuple[int, ...]


class Work(NamedTuple):
    """What one model is fed in one forward: segments of distinct rows, ascending.

    `keep` are ascending indices into the tokens of all segments in a row: after which of them logits are
    wanted."""

    segments: Sequence[Segment]
    keep: Sequence[int]


@dataclass(frozen=True)
class Alignment:
    """How one model's vocabulary maps to the base's, by token identity."""

    size: int
    """Size V of the base's vocabulary without padding rows."""
    columns: Tensor | None = None
    """[V] this model's id of every base token (0 where it has none); None where the ids agree."""
    shared: Tensor | None = None
    """[V] bool: tokens that this model knows; None means all."""
    spelled: tuple[tuple[int, ...], ...] | None = None
    """For every base token the ids that say the same here: one where shared, its text's encoding
    elsewhere."""

    def align(self, logits: Tensor) -> Tensor:
        """[K, V of this model] -> [K, V of the base]."""
        if self.columns is None:
            return logits[:, : self.size]
        return logits[:, self.columns.to(logits.device)]

    def on(self, device: torch.device) -> Alignment:
        """The same with its tensors on a device: copies within a step would wait for it."""
        columns, shared = (None if t is None else t.to(device) for t in (self.columns, self.shared))
        return replace(self, columns=columns, shared=shared)

    @cached_property
    def longest(self) -> int:
        """Most ids that one base token takes here."""
        return 1 if self.spelled is None else max(map(len, self.spelled))

    def spelt_by(self, token: int) -> list[int]:
        """The base tokens that are fed as this one id."""
        if self.columns is None or self.shared is None:
            return [token]
        found: list[int] = ((self.columns == token) & self.shared).nonzero().flatten().tolist()
        return found

    def spell(self, token: int) -> tuple[int, ...]:
        """The ids to feed this model after base token `token`."""
        return (token,) if self.spelled is None else self.spelled[token]


class Runner(Protocol):
    """What the engine needs of a model."""

    alignment: Alignment
    window: int
    """Most tokens that the model takes."""

    @property
    def rows(self) -> Rows:
        """The ragged rows, to admit, rewind, swap and drop."""
        ...

    @property
    def weights(self) -> object:
        """What the model stands on: models with the same weights can share a forward."""
        ...

    def forward(self, work: Work) -> Tensor:
        """Feed the segments -> logits [len(keep), V] of the base's vocabulary."""
        ...


class ModelRunner:
    """A model whose attention is ours: all rows in one forward."""

    def __init__(
        self,
        model: Forward,
        cache: KVCache,
        alignment: Alignment,
        window: int,
        device: torch.device,
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        lora: SharedLora | None = None,
        adapter: str | None = None,
    ) -> None:
        """`embed` turns ids [1, T] into embeddings where a soft prompt adds virtual tokens to the vocabulary
        (of this model or of one on the same weights). `lora` are the adapters that lie in the model's
        layers, `adapter` the one that this model runs with."""
        self.model, self.cache, self.alignment, self.window = model, cache, alignment.on(device), window
        self.device, self.embed, self.lora, self.adapter = device, embed, lora, adapter

    @property
    def rows(self) -> Rows:
        return self.cache

    @property
    def weights(self) -> object:
        return self.model

    def forward(self, work: Work) -> Tensor:
        return run_together([(self, work)])[0]


@torch.inference_mode()
def run_together(parts: Sequence[tuple[ModelRunner, Work]]) -> list[Tensor]:
    """One forward for several models on the same weights, each with its own cache and adapter: the weights
    are read once. -> logits [len(keep), V] per part."""
    first = parts[0][0]
    packed, ids, keep, spans = [], list[int](), list[int](), dict[str, slice]()
    for runner, (segments, wanted) in parts:
        start, lengths = len(ids), runner.cache.lengths
        starts = [lengths[s.row] for s in segments]
        counts = [len(s.ids) for s in segments]
        at = Placement.of([s.row for s in segments], starts, counts, first.device)
        ids += [i for s in segments for i in s.ids]
        keep += [start + index for index in wanted]
        tokens = slice(start, len(ids))
        packed.append(Part(runner.cache, at, tokens))
        if runner.adapter is not None:
            spans[runner.adapter] = tokens
    positions = [part.at.positions for part in packed]
    if first.device.type == "cpu" and (missing := rounded(len(ids)) - len(ids)):
        ids += ids[-1:] * missing  # tokens that no row owns
        positions.append(positions[-1].new_zeros(missing))
    if first.lora is not None:
        first.lora.place(spans, len(ids))
    tokens_in = integers([ids]).to(first.device)  # [1, T]
    out = first.model(
        **{"input_ids": tokens_in}
        if first.embed is None
        else {"inputs_embeds": _embedded(parts, tokens_in, packed)},
        position_ids=(positions[0] if len(positions) == 1 else torch.cat(positions))[None],
        use_cache=False,
        logits_to_keep=integers(keep).to(first.device),
        packed=Packed(packed),
    )
    logits = widen(out.logits[0])
    results, done = [], 0
    for runner, work in parts:
        for segment in work.segments:
            runner.cache.commit(segment.row, len(segment.ids))
        results.append(runner.alignment.align(logits[done : done + len(work.keep)]))
        done += len(work.keep)
    return results


def _embedded(parts: Sequence[tuple[ModelRunner, Work]], ids: Tensor, packed: Sequence[Part]) -> Tensor:
    """Embeddings [1, T, d], every part's by its own table: virtual ids mean each model's own soft prompt."""
    pieces, last = [], len(packed) - 1
    for index, ((runner, _), part) in enumerate(zip(parts, packed, strict=True)):
        assert runner.embed is not None
        tokens = part.tokens if index < last else slice(part.tokens.start, None)
        pieces.append(runner.embed(ids[:, tokens]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def forward_all(runners: Mapping[str, Runner], work: Mapping[str, Work]) -> dict[str, Tensor]:
    """Feed several models: name -> logits. Those on the same weights go through them together."""
    together: dict[int, list[str]] = {}
    for name, (segments, _) in work.items():
        if segments:
            together.setdefault(id(runners[name].weights), []).append(name)
    logits: dict[str, Tensor] = {}
    for names in together.values():
        if len(names) == 1:
            logits[names[0]] = runners[names[0]].forward(work[names[0]])
            continue
        parts = []
        for name in names:
            runner = runners[name]
            assert isinstance(runner, ModelRunner)
            parts.append((runner, work[name]))
        logits |= zip(names, run_together(parts), strict=True)
    return logits


class ReferenceRows:
    """Rows of a ReferenceRunner: ids fed so far, and the model's own cache of each row."""

    rewinds = False

    def __init__(self, tokens: int) -> None:
        self.lengths: list[int] = []
        self.ids: list[list[int]] = []
        self.caches: list[Any] = []
        self.capacity = tokens

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(lengths) <= self.capacity

    def reserve(self, lengths: Sequence[int]) -> None:
        """Nothing to lay out: every row's cache grows by itself."""

    def admit(self, source: int | None = None, length: int = 0) -> None:
        self.ids.append([])
        self.caches.append(None)
        self.lengths.append(0)
        if source is not None:
            self.ids[-1] = self.ids[source][:length]
            if length == len(self.ids[source]):
                self.caches[-1] = copy.deepcopy(self.caches[source])
            self.lengths[-1] = length

    def rewind(self, row: int, length: int) -> None:
        """State-space caches cannot go back, so the row is computed anew when it is fed next."""
        if length != self.lengths[row]:
            self.ids[row] = self.ids[row][:length]
            self.caches[row] = None
            self.lengths[row] = length

    def swap(self, one: int, other: int) -> None:
        columns: tuple[list[Any], ...] = (self.lengths, self.ids, self.caches)
        for rows in columns:
            rows[one], rows[other] = rows[other], rows[one]

    def drop(self, row: int) -> None:
        self.swap(row, len(self.lengths) - 1)
        columns: tuple[list[Any], ...] = (self.lengths, self.ids, self.caches)
        for rows in columns:
            rows.pop()

    @property
    def peak_bytes(self) -> int:
        """Unknown: the model's own cache is opaque to us."""
        return 0


class ReferenceRunner:
    """A model with its own cache, one row per forward; or with none, every forward from the start of the
    row."""

    def __init__(
        self,
        model: Forward,
        alignment: Alignment,
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
