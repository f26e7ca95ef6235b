"""CPU-seconds of lm-eval's requests through our model, beside lm-eval's own `hf` at its best batch size.

    python benchmarks/lm_eval_speed.py FOLDER                     one checkpoint, in its own dtype
    python benchmarks/lm_eval_speed.py FOLDER --tokens 64         longer responses
    python benchmarks/lm_eval_speed.py FOLDER --questions 12 --batches 8,24

Three kinds of requests: likelihoods of four choices to each of 24 questions, without and with six examples
before the question, and a response to each of them after these examples, as gsm8k and its like ask. One
thread, CPU time, after a warm-up. `base` is one model. `proxy` is three on the same checkpoint, so its time
is divided by three: what a model's forwards take. The last column is how far log-probabilities are apart at
most, or how many of the responses are equal."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_models import QUESTIONS
from benchmarks.tables import markdown
from proxytune.config import ModelSpec, System
from proxytune.integrations import ProxyTunedLM
from proxytune.models import Models
from proxytune.options import DecodeOptions

CHOICES = (" yes", " no, not that we know of", " Paris", " It depends on the case, and nobody can say.")
ANSWERS = (
    "Paris, the capital.",
    "Yes.",
    "It is 144.",
    "William Shakespeare wrote it.",
    "Blue.",
    "Eight legs.",
)
SHOTS = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in zip(QUESTIONS, ANSWERS, strict=False))
KINDS = ("likelihood, 0 examples", "likelihood, 6 examples", "responses, 6 examples")


def requests(questions: int, tokens: int) -> dict[str, list[Instance]]:
    """What is asked, by kind."""
    plain = [f"Question: {question}\nAnswer:" for question in QUESTIONS[:questions]]
    shots = [SHOTS + text for text in plain]
    settings = {"until": ["Question:", "\n\n"], "max_gen_toks": tokens, "do_sample": False}
    zero, few = (
        [
            Instance("loglikelihood", {}, (text, choice), at)
            for text in texts
            for at, choice in enumerate(CHOICES)
        ]
        for texts in (plain, shots)
    )
    asked = [
        Instance("generate_until", {}, (text, dict(settings)), 0, ("t", at, 1))
        for at, text in enumerate(shots)
    ]
    return dict(zip(KINDS, (zero, few, asked), strict=True))


def measured(model: Any, asked: Sequence[Instance]) -> tuple[float, list[Any]]:
    """CPU-seconds of some requests, and the answers to them."""
    answer: Callable[..., list[Any]] = getattr(model, asked[0].request_type)
    answer(list(asked[:4]), disable_tqdm=True)
    began = time.process_time()
    answers = answer(list(asked), disable_tqdm=True)
    return time.process_time() - began, answers


def by_hf(
    folder: str, asked: dict[str, list[Instance]], batches: Sequence[int]
) -> dict[str, tuple[float, int, Any]]:
    """CPU-seconds of lm-eval's own model at its best batch size, that size, and the answers, by kind."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    words = AutoTokenizer.from_pretrained(folder)
    found: dict[str, tuple[float, int, Any]] = {}
    for kind, own in asked.items():
        for size in batches:
            model = HFLM(pretrained=module, tokenizer=words, batch_size=size, device="cpu")
            seconds, answers = measured(model, own)
            print(f"{kind}: hf at batch {size}: {seconds:.2f} s", file=sys.stderr)
            if kind not in found or seconds < found[kind][0]:
                found[kind] = seconds, size, answers
    return found


def by_us(folder: str, asked: dict[str, list[Instance]], role: str) -> dict[str, tuple[float, Any]]:
    """CPU-seconds per model of ours, and the answers, by kind."""
    one = ModelSpec(model=folder)
    system = System(base=one, expert=one, antiexpert=one)
    model = ProxyTunedLM(system, role, decode=DecodeOptions(kv_memory=2**30), models=Models(system))
    found = {}
    for kind, own in asked.items():
        seconds, answers = measured(model, own)
        found[kind] = seconds / len(model.names), answers
        print(f"{kind}: ours as {role}: {seconds:.2f} s", file=sys.stderr)
    return found


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """How far two lists of answers are apart."""
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} equal"
    return f"{max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)):.1e}"


def main() -> None:
    """Measure and print one table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("folder")
    arguments.add_argument("--questions", type=int, default=len(QUESTIONS))
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--batches", default="1,4,8,24")
    given = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    asked = requests(given.questions, given.tokens)
    theirs = by_hf(given.folder, asked, [int(size) for size in given.batches.split(",")])
    lines = []
    for role in ("base", "proxy"):
        ours = by_us(given.folder, asked, role)
        for kind in KINDS:
            (hf, size, want), (own, found) = theirs[kind], ours[kind]
            row = (kind, str(len(want)), role, f"{hf:.2f}", str(size), f"{own:.2f}", f"{hf / own:.2f}")
            lines.append((*row, agreement(found, want)))
    heads = ("requests", "n", "ours as", "hf, s", "at batch", "ours, s per model", "hf / ours", "answers")
    print(markdown(heads, lines))


if __name__ == "__main__":
    main()
