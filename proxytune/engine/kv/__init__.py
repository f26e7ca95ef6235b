"""The KV cache: ragged rows, contiguous (CPU) or paged (CUDA)."""

from __future__ import annotations

from proxytune.engine.kv.cache import CacheSpec, KVCache, LayerShape, Rows
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.kv.reference_rows import ReferenceRows
from proxytune.engine.kv.slots import SlotCache

__all__ = ["CacheSpec", "KVCache", "LayerShape", "PagedCache", "ReferenceRows", "Rows", "SlotCache"]
