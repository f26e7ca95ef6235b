"""The same evaluation over many processes: data-parallel workers on Ray, each with an engine of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.scale.ray_pool import RayPool, ray_decoder

__all__ = ["RayPool", "ray_decoder"]

__getattr__ = door(__name__, {"RayPool": "ray_pool", "ray_decoder": "ray_pool"})
