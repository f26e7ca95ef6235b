"""The system that uses a new expert at once, as a YAML file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from proxytune.config import DEMO_SCHEME, ModelSpec, load_system
from proxytune.run_files import write_atomically
from proxytune.training_record import SYSTEM
from proxytune.tuning.options import TuneOptions

HEAD = """# The expert of this folder on the model that it was tuned from; training.json says how it was made.
#   proxytune generate "..." --system {folder}/system.yaml
#   proxytune eval TASK --system {folder}/system.yaml --as all
"""


def write_system(
    antiexpert: ModelSpec,
    base: ModelSpec,
    result: Literal["weights", "adapter"],
    options: TuneOptions,
    out: Path,
) -> None:
    """Write system.yaml: the base, the model that was tuned as the antiexpert, the expert of this folder. An
    adapter sits on the antiexpert's weights, which are loaded once for both."""
    small = _spec(antiexpert)
    own: dict[str, Any] = (
        {"adapter": "./"} if result == "adapter" else {"model": "./", "dtype": small["dtype"]}
    )
    if options.chat != "none":
        own["chat"] = options.chat
    content = {
        "description": f"{out.resolve().name}: an expert made by proxytune tune",
        "base": _spec(base),
        "antiexpert": small,
        "expert": own,
        "alpha": options.alpha,
    }
    text = HEAD.format(folder=out) + yaml.safe_dump(
        content, sort_keys=False, default_flow_style=None, width=1000
    )
    write_atomically(out / SYSTEM, text.encode())
    load_system(out / SYSTEM)  # what is written is what can be read


def _spec(spec: ModelSpec) -> dict[str, Any]:
    """A model as YAML: a folder by its whole path, what is as by default left out."""
    model = str(spec.model)
    local = not model.startswith(DEMO_SCHEME) and Path(model).expanduser().exists()
    found: dict[str, Any] = {
        "model": str(Path(model).expanduser().resolve()) if local else model,
        "dtype": spec.dtype,
    }
    return found | ({"quantization": spec.quantization} if spec.quantization != "none" else {})
