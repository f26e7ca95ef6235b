"""What stands between a model's products on CUDA, as few kernels: norms, rotary embeddings with the cache's
write, gated activations; and products of the same input as one."""

from __future__ import annotations

from proxytune.engine.fused.joined import joint
from proxytune.engine.fused.modules import DeviceNorm, GatedMLP, use_device_kernels
from proxytune.engine.fused.rows import Rotation, place, rotate_and_place

__all__ = ["DeviceNorm", "GatedMLP", "Rotation", "joint", "place", "rotate_and_place", "use_device_kernels"]
