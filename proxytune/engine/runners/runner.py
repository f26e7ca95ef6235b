"""One model behind two operations: run a packed forward over ragged rows, and move those rows about.

`ModelRunner` feeds several rows in one forward through our attention and cache. `ReferenceRunner` feeds one
row at a time through the model's own cache: slow, exact, and right for every causal language model, so it
serves the families that do not go through our attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from proxytune.engine.attention.attention import Forward
from proxytune.engine.attention.packed import Packed, PackedPart
from proxytune.engine.kernels.linear import rounded
from proxytune.engine.kv.cache import KVCache, Placement, Rows, integers
from proxytune.engine.logits import widen
from proxytune.engine.request import Segment
from proxytune.engine.request import Work as Work
from proxytune.engine.runners.lora import SharedLora
from proxytune.engine.runners.vocab_map import VocabMap


class Runner(Protocol):
    """What the engine needs of a model."""

    alignment: VocabMap
    window: int
    """Most tokens that the model takes."""
    device: torch.device
    """Where ids go in."""

    @property
    def rows(self) -> Rows:
        """The ragged rows, to admit, rewind, swap and drop."""
        ...

    @property
    def weights(self) -> object:
        """The weights of the model: models with the same weights can share a forward."""
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
        alignment: VocabMap,
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
        self.devices = frozenset({device, *cache.spec.devices, *_devices(model)})
        """All that a device map spreads it over."""

    @property
    def rows(self) -> Rows:
        return self.cache

    @property
    def weights(self) -> object:
        return self.model

    def forward(self, work: Work) -> Tensor:
        return run_together([(self, work)])[0]


def _devices(model: Forward) -> set[torch.device]:
    inner = getattr(model, "forward", None) if not isinstance(model, nn.Module) else model
    return {p.device for p in inner.parameters()} if isinstance(inner, nn.Module) else set()


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
        packed.append(PackedPart(runner.cache, at, tokens))
        if runner.adapter is not None:
            spans[runner.adapter] = tokens
    positions = [part.at.positions for part in packed]
    if first.device.type == "cpu" and (missing := rounded(len(ids)) - len(ids)):
        ids += ids[-1:] * missing  # tokens that no row owns
        positions.append(positions[-1].new_zeros(missing))
    if first.lora is not None:
        first.lora.place(spans, len(ids))
    tokens_in = integers([ids], first.device)  # [1, T]
    out = first.model(
        **{"input_ids": tokens_in}
        if first.embed is None
        else {"inputs_embeds": _embedded(parts, tokens_in, packed)},
        position_ids=(positions[0] if len(positions) == 1 else torch.cat(positions))[None],
        use_cache=False,
        # of several devices, the last layer's may be another: it takes an index from the CPU
        logits_to_keep=integers(keep) if len(first.devices) > 1 else integers(keep, first.device),
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


def _embedded(parts: Sequence[tuple[ModelRunner, Work]], ids: Tensor, packed: Sequence[PackedPart]) -> Tensor:
    """Embeddings [1, T, d], every part's by its own table: virtual ids mean each model's own soft prompt."""
    pieces, last = [], len(packed) - 1
    for index, ((runner, _), part) in enumerate(zip(parts, packed, strict=True)):
        assert runner.embed is not None
        tokens = part.tokens if index < last else slice(part.tokens.start, None)
        pieces.append(runner.embed(ids[:, tokens]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def feed(runner: Runner, rows: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Feed these tokens of some rows, in ascending order. -> row: logits [V] after the last of its tokens."""
    segments = [Segment(row, tuple(ids)) for row, ids in rows.items()]
    ends = list(accumulate(len(segment.ids) for segment in segments))
    logits = runner.forward(Work(segments, [end - 1 for end in ends]))
    return dict(zip(rows, logits, strict=True))


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
