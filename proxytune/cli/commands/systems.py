"""`proxytune systems`: the systems that ship with proxytune."""

from __future__ import annotations

from pathlib import Path

from proxytune.api_spec import ApiSpec
from proxytune.cli import console
from proxytune.cli.options import Json
from proxytune.config import ModelSpec, System, load_system, system_names


def systems(json: Json = False) -> None:
    """The systems that ship with proxytune: their models and alpha.

    Example: proxytune systems --json
    """
    found = [load_system(name) for name in system_names()]
    if json:
        shown = {system.name: system.model_dump(mode="json", exclude_none=True) for system in found}
        console.print_json({"systems": shown})
        return
    rows = [
        (
            system.name,
            model_name(system.base),
            _experts(system),
            model_name(system.antiexpert),
            model_name(system.tuned),
        )
        for system in found
    ]
    console.print_table(("system", "base", "expert", "antiexpert", "tuned"), rows)


def _experts(system: System) -> str:
    """The experts of a system, with weights where there are several."""
    specs = system.expert_specs
    if len(specs) == 1:
        return model_name(specs[0])
    return " + ".join(f"{spec.weight:g} * {model_name(spec)}" for spec in specs)


def model_name(spec: ModelSpec | ApiSpec | None) -> str:
    """How a table names a model; folders under the user's current one as the user would write them."""
    if spec is None:
        return ""
    if isinstance(spec, ApiSpec):
        return str(spec)
    name = spec.model or f"adapter {spec.adapter}"
    return name.replace(f"{Path.cwd()}/", "./")
