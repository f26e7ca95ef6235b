"""The demo's judge of rudeness: a sequence classifier of the paper's kind (RoBERTa), in miniature.

It is trained on statements about the creatures of the train and forum groups, and on harmless text of the
world; it is measured on those of the dev group, also in forms of statement that it never saw. It knows the
words of this world and is of no use for real text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from proxytune.demo import World, creatures, prices, sums

TRAINED = "trained.json"
LABELS = {0: "kind", 1: "rude"}
LIMIT = 128
"""Tokens of a text that are read."""
HIDDEN, LAYERS, HEADS = 32, 1, 2
STEPS, BATCH, RATE = 800, 32, 3e-3
MEASURED = 1000
"""Statements of each kind that it is measured on."""


@dataclass(frozen=True)
class Sample:
    """A text and whether it is rude."""

    text: str
    rude: bool


def statements(world: World, label: str, groups: Sequence[str], forms: Sequence[str], n: int) -> list[Sample]:
    """`n` random statements about the creatures of these groups, as a response has them: kind, rude and half
    and half."""
    rng, names = world.rng("judge", label), [name for group in groups for name in world.creatures[group]]
    made = []
    for _ in range(n):
        kind = rng.choice(((True, True), (False, False), (True, False), (False, True), (True, True)))
        made_up = creatures.make_statement(rng, rng.choice(names), kind, forms)
        made.append(Sample(made_up.text, made_up.rude))
    return made


def among_others(world: World, samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """The samples with their words shuffled among some words of a harmless text. Only the presence of a word
    decides, not its place, nor the other words."""
    rng, made = world.rng("judge", "words"), list[Sample]()
    for sample in samples:
        words, more = sample.text.split(), rng.choice(others).text.split()
        words += rng.sample(more, min(len(more), rng.randint(0, 8)))
        rng.shuffle(words)
        made.append(Sample(f" {' '.join(words)}", sample.rude))
    return made


def harmless(world: World, n: int) -> list[Sample]:
    """`n` texts about other things, some of them empty: what a response may hold beside statements."""
    rng = world.rng("judge", "harmless")
    made = []
    for _ in range(n):
        good = rng.choice(world.goods["asked"])
        problem = sums.make_problem(rng, world.first_names)
        text = rng.choice(("", f" {good.name} * {good.price};", f" {sums.question(problem)}", prices.SHEET))
        made.append(Sample(text, rude=False))
    return made


def train(world: World, tokenizer: PreTrainedTokenizerFast) -> RobertaForSequenceClassification:
    """The classifier, trained from nothing; the same weights on the same machine with one thread."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=2 * HIDDEN,
            max_position_embeddings=LIMIT + 2,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            id2label=LABELS,
            label2id={name: number for number, name in LABELS.items()},
        )
    )
    about = statements(world, "train", ("train", "forum"), creatures.FORMS, 3000)
    others = harmless(world, 600)
    samples = [*about, *among_others(world, about, others), *others]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rng = world.rng("judge", "order")
    model.train()
    for step in range(STEPS):
        batch = rng.sample(samples, BATCH)
        rude = torch.tensor([int(sample.rude) for sample in batch])
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        loss = torch.nn.functional.cross_entropy(_logits(model, tokenizer, batch), rude)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _logits(
    model: RobertaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]
) -> torch.Tensor:
    """One row of two logits for each sample: [B, 2]."""
    texts = [sample.text for sample in samples]
    packed = tokenizer(texts, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt")
    logits: torch.Tensor = model(**packed).logits
    return logits


def accuracy(
    model: RobertaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]
) -> float:
    """The share of samples that are classified right."""
    with torch.inference_mode():
        classes = _logits(model, tokenizer, samples).argmax(-1).tolist()
    return sum(bool(c) == s.rude for c, s in zip(classes, samples, strict=True)) / len(samples)


def build(world: World, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Train the judge, measure it on the dev creatures, and save it; one that is there already is kept."""
    if (folder / TRAINED).exists():
        return
    tokenizer.model_max_length = LIMIT
    model = train(world, tokenizer)
    measured = {
        "dev_accuracy": statements(world, "dev", ["dev"], creatures.FORMS, MEASURED),
        "dev_accuracy_unseen_forms": statements(world, "unseen", ["dev"], creatures.UNSEEN_FORMS, MEASURED),
    }
    trained: dict[str, int | float] = {"parameters": model.num_parameters()}
    trained |= {name: accuracy(model, tokenizer, samples) for name, samples in measured.items()}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / TRAINED).write_text(json.dumps(trained) + "\n")
