"""Weights that are no numbers are named when a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from proxytune.config import ExpertSpec, System
from proxytune.errors import UserError
from proxytune.models.finite import PIECE, refuse_broken_weights, whole
from proxytune.models.loading import Models
from tests.support import tiny
from tests.support.tiny import spec

PLACE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_checkpoint(tmp_path: Path, number: float) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_parameter(PLACE)[3, 5] = number
    folder = tiny.save(tmp_path / "damaged", model)
    with pytest.raises(UserError, match=f"'{folder}' has NaN or infinite numbers in its weight {PLACE}"):
        Models(System(base=spec(folder))).get("base")


@pytest.mark.parametrize("quantization", ["int8"])
def test_a_damaged_checkpoint_that_is_quantised(tmp_path: Path, quantization: str) -> None:
    """The integers cannot show it, the scales do."""
    model = tiny.build("llama").float()
    with torch.no_grad():
        model.get_parameter(PLACE)[3, 5] = float("nan")
    folder = tiny.save(tmp_path / "damaged", model)
    damaged = spec(folder).model_copy(update={"quantization": quantization, "dtype": "float32"})
    with pytest.raises(UserError, match=r"up_proj\.weight_scale"):
        Models(System(base=damaged)).get("base")


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_parameter(PLACE)[3, 5] = 1e5
    folder = tiny.save(tmp_path / "wide", model)
    narrow = spec(folder).model_copy(update={"dtype": "float16"})
    with pytest.raises(UserError, match="float16 ends at 65504"):
        Models(System(base=narrow)).get("base")


def test_a_damaged_adapter(tmp_path: Path) -> None:
    """Of two on one model, the one that is damaged is named."""
    from peft import LoraConfig, get_peft_model

    folder, name = tiny.save(tmp_path / "host", tiny.build("llama")), "damaged"
    made = get_peft_model(tiny.build("llama"), LoraConfig(target_modules=["q_proj"], r=2))  # type: ignore[arg-type]
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.1 if "layers.0" in key else float("nan"))
    made.save_pretrained(tmp_path / name)
    adapter = ExpertSpec(adapter=str(tmp_path / name), dtype="float64")
    models = Models(System(base=spec(folder), expert=adapter, antiexpert=spec(folder)))
    models.get("antiexpert")
    with pytest.raises(UserError, match=f"{name}' has NaN.*layers[.]1[.].*lora_B"):
        models.get("expert")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3)
    assert whole(tensor.to(dtype)) and whole(tensor.to(dtype)[:0])
    tensor[1, 2] = float("inf")
    assert not whole(tensor.to(dtype))


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PIECE > 7
    monkeypatch.setattr("proxytune.models.finite.PIECE", 7)
    tensor = torch.ones(20)
    tensor[19] = float("nan")
    assert not whole(tensor.to(torch.float8_e4m3fn)) and whole(tensor[:19].to(torch.float8_e4m3fn))


def test_what_has_no_numbers_is_not_looked_at() -> None:
    with torch.device("meta"):
        refuse_broken_weights(nn.Linear(3, 3).named_parameters(), "offloaded")
    refuse_broken_weights([("packed", torch.ones(3, dtype=torch.uint8))], "quantised")
