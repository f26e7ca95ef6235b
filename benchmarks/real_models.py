"""Tokens per CPU-second of one real checkpoint on one thread, beside transformers' own `generate`.

    python benchmarks/real_models.py FOLDER                             its own dtype, plain weights
    python benchmarks/real_models.py FOLDER --quantizations none,int8,int4,8bit,4bit
    python benchmarks/real_models.py FOLDER --tokens 64                 shorter answers

24 questions are answered greedily, each to its end or to --tokens: by the chat template where the tokenizer
has one, otherwise as texts to go on with. `generate` decodes them six at batch 1, and all as one padded batch
of 24, which runs until its last row is done. Ours decodes the same without drafts, and as by default. CPU
time counts, so a busy machine changes little; prefill is part of it. A warm-up of eight tokens comes first.
Answers may differ where rounding does, so every contender's own tokens are counted."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tables import markdown
from proxytune.config import ModelSpec, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from proxytune.records import Example, Prompt

QUESTIONS = (
    *("What is the capital of France?", "Say yes.", "What is 12 times 12?", "Who wrote Hamlet?"),
    *("Write a short poem about the sea.", "List five fruits.", "What is the boiling point of water?"),
    *("Explain photosynthesis in three sentences.", "Give me a haiku about autumn.", "Name a prime number."),
    *("Translate 'good morning' into German.", "What does HTTP stand for?", "How many legs has a spider?"),
    *("Write a Python function that adds two numbers.", "What colour is the sky?", "Define entropy."),
    *("Tell me a joke.", "What is the largest planet?", "Summarise the story of Romeo and Juliet."),
    *(
        "What is 7 plus 8?",
        "Name three rivers in Europe.",
        "Why is the grass green?",
        "Who was Ada Lovelace?",
    ),
    "Write one sentence about friendship.",
)
ALONE = 6
"""Questions that are answered one at a time."""
BATCH = len(QUESTIONS)


def texts(tokenizer: Any) -> list[str]:
    """The questions as the model is asked them."""
    if tokenizer.chat_template is None:
        return [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]


def by_transformers(folder: str, prompts: Sequence[str], tokens: int) -> dict[int, float]:
    """Tokens per CPU-second by batch size."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ends = torch.tensor([model.generation_config.eos_token_id]).flatten()

    def said(batch: Sequence[str], most: int) -> int:
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        rows = out[:, inputs.input_ids.shape[1] :]
        return sum(int((~torch.isin(row, ends)).long().cumprod(0).sum()) for row in rows)

    found = {}
    for size, asked in ((1, prompts[:ALONE]), (BATCH, prompts)):
        said(asked[:size], 8)
        began, count = time.process_time(), 0
        for first in range(0, len(asked), size):
            count += said(asked[first : first + size], tokens)
        found[size] = count / (time.process_time() - began)
        print(f"generate, batch {size}: {found[size]:.1f} tokens/s", file=sys.stderr, flush=True)
    return found


def by_us(
    folder: str, quantization: Any, prompts: Sequence[str], tokens: int
) -> dict[tuple[int, str], float]:
    """Tokens per CPU-second by batch size and --speculate."""
    models = Models(System(base=ModelSpec(model=folder, quantization=quantization)))
    found = {}
    for size, asked in ((1, prompts[:ALONE]), (BATCH, prompts)):
        examples = [Example(str(number), Prompt(plain=text, user=text)) for number, text in enumerate(asked)]
        for speculate in ("off", "auto"):
            how = DecodeOptions(batch=size, kv_memory=2**30, speculate=speculate)
            decoder = Decoder(models, "base", how)
            list(decoder.stream(examples[:size], Sampling(max_new_tokens=8)))
            began = time.process_time()
            done = list(decoder.stream(examples, Sampling(max_new_tokens=tokens)))
            count = sum(len(c.token_ids) - (c.finish_reason == "eos") for c in done)
            speed = found[size, speculate] = count / (time.process_time() - began)
            named = f"ours, weights {quantization}, batch {size}, speculate {speculate}"
            print(f"{named}: {speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and print one table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("folder")
    arguments.add_argument("--quantizations", default="none")
    arguments.add_argument("--tokens", type=int, default=128)
    asked = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    prompts = texts(AutoTokenizer.from_pretrained(asked.folder))
    plain, lines = by_transformers(asked.folder, prompts, asked.tokens), []
    for quantization in asked.quantizations.split(","):
        ours = by_us(asked.folder, quantization, prompts, asked.tokens)
        for size in (1, BATCH):
            speeds = plain[size], ours[size, "off"], ours[size, "auto"]
            ratios = [f"{speed / plain[size]:.2f}" for speed in speeds[1:]]
            lines.append((quantization, str(size), *(f"{speed:.1f}" for speed in speeds), *ratios))
    heads = ("weights", "batch", "generate", "ours, no drafts", "ours", "no drafts x generate", "x generate")
    print(markdown(heads, lines))


if __name__ == "__main__":
    main()
