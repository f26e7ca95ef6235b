"""Looks at a system before anything is decoded: what each role is, what fits, what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.checks.findings import Finding, RoleCheck, SystemCheck
    from proxytune.checks.system import check_system

__all__ = ["Finding", "RoleCheck", "SystemCheck", "check_system"]

__getattr__ = door(
    __name__,
    {"Finding": "findings", "RoleCheck": "findings", "SystemCheck": "findings", "check_system": "system"},
)
