"""Makes the demo models from nothing: world -> text -> tokenizer -> pretraining -> tuning -> checkpoints ->
dev scores.

`make demo-models` runs it. Everything is decided by the seeds (and, to the last bit, by the machine and its
thread count); weights are rounded to bfloat16 before anything is measured. It measures on the dev split only:
the test split is for `proxytune demo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from proxytune.config import ModelSpec, Role, System
from proxytune.demo import World, corpus, world
from proxytune.errors import UserError
from proxytune.intervals import gap_closed
from proxytune.models import Models
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Metric
from proxytune.runs import evaluation, judging, session
from proxytune.runs.decoders import decoder_here
from proxytune.sandbox import Sandbox
from proxytune.tasks import TASKS, read_source
from proxytune.terminal import show
from proxytune.tuning import demo_judge
from proxytune.tuning.training import Fitted, TrainingExample, TuneConfig, adamw, fit, muon

WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"
REPORT = "demo_build.json"
JUDGE = "judge"
TRAINED = "trained.json"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_VOCABULARY = 1664
CONTEXT = 2048
TUNING_SEEDS = (0, 1, 2)
"""The weights of the first are kept; the others show how much the choice of seed matters."""


@dataclass(frozen=True)
class ModelShape:
    """The size of a Llama model and the learning rate of its pretraining."""

    hidden: int
    layers: int
    heads: int
    rate: float


SHAPES = {
    "base": ModelShape(256, 4, 4, 2e-3),
    "mid": ModelShape(128, 4, 4, 3e-3),
    "antiexpert": ModelShape(64, 2, 4, 5e-3),
}
"""The pretrained models. All see the same tokens in the same order."""
TUNED = {"tuned": "base", "mid-tuned": "mid", "expert": "antiexpert"}
"""The tuned models and what each is made from."""

PRETRAINING = TuneConfig(batch_size=12, block=256, warmup_steps=50, decay_share=0.35, bf16=True)
TUNING = TuneConfig(batch_size=16, epochs=2, warmup_steps=5, bf16=True)
TUNING_RATE = 2e-4


# Text, tokens, models


def system_prompt() -> str:
    """The system message of TruthfulQA's chat form, which the tuned models learn."""
    prompt = read_source(TASKS["truthfulqa"], "generated", 1).examples[0].prompt
    assert prompt.system is not None
    return prompt.system


def banned_texts() -> list[str]:
    """What the tasks' settings ban, with and without a space before it: a ban is of single tokens."""
    settings = [task.sampling for task in TASKS.values()]
    texts = {text for sampling in settings for text in (*sampling.ban, *sampling.ban_first)}
    return [form for text in sorted(texts) for form in (text, f" {text}")]


def train_tokenizer(documents: Sequence[corpus.Document], whole: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that loses no text, with single digits, `<s>` at the start, and the words of the texts
    `whole` (the system prompt, what tasks ban) as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),  # code is cut at line ends into prompt and response
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["".join(s.text for s in document) for document in documents[::4]]
    tokenizer.train_from_iterator([*texts, *[*whole] * len(texts)], trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(documents: Iterable[corpus.Document], tokenizer: PreTrainedTokenizerFast) -> list[TrainingExample]:
    """Documents as ids with weights: a token has the weight of the segment that it ends in, the final `</s>`
    counts fully."""
    examples, eos = [], int(tokenizer.eos_token_id)
    for document in documents:
        encoded = tokenizer.backend_tokenizer.encode("".join(s.text for s in document))
        by_character = [s.weight for s in document for _ in s.text]
        weights = [by_character[end - 1] if end else 0.0 for _, end in encoded.offsets]
        examples.append(TrainingExample((*encoded.ids, eos), (*weights, 1.0)))
    return examples


def new_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=int(shape.hidden * 8 / 3) // 16 * 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=min(0.05, 0.5 / shape.hidden**0.5),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, fitted: Fitted, folder: Path) -> None:
    """A complete checkpoint folder in bfloat16, with what it was trained on; `model` is used up."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trained = {"parameters": model.num_parameters(), "tokens": fitted.tokens, "device": _device()}
    (folder / TRAINED).write_text(json.dumps(trained) + "\n")


def load(folder: Path) -> PreTrainedModel:
    """A saved model in float32, on the GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Training


def pretrain(
    miniature: World, folder: Path, amounts: corpus.Amounts, shapes: Mapping[str, ModelShape] = SHAPES
) -> None:
    """Train the pretrained models into `folder`; one that is there already is kept."""
    documents = corpus.pretraining(miniature, system_prompt(), amounts)
    tokenizer = train_tokenizer(documents, [system_prompt(), *banned_texts()])
    examples = encode(documents, tokenizer)
    for name, shape in shapes.items():
        if not (folder / name / TRAINED).exists():
            model = new_model(shape, tokenizer).to(_device())
            title = f"pretraining {name} ({model.num_parameters():,} parameters)"
            fitted = fit(model, examples, muon(shape.rate)(model), PRETRAINING, title)
            save(model, tokenizer, fitted, folder / name)


def tune(
    miniature: World,
    source: Path,
    target: Path,
    seed: int,
    amounts: corpus.TuningAmounts,
    tuned: Mapping[str, str] = TUNED,
) -> None:
    """Tune a copy of each pretrained model in `source` into `target`: the same examples, recipe and seed
    for every size. One that is there already is kept."""
    tokenizer = AutoTokenizer.from_pretrained(source / "base")
    examples = encode(corpus.tuning(miniature, system_prompt(), amounts), tokenizer)
    config, optimizers = TUNING.model_copy(update={"seed": seed}), adamw(TUNING_RATE)
    for name, origin in tuned.items():
        if not (target / name / TRAINED).exists():
            model = load(source / origin)
            fitted = fit(model, examples, optimizers(model), config, f"tuning {name}, seed {seed}")
            save(model, tokenizer, fitted, target / name)


# Measuring on the dev split


def system_in(pretrained: Path, tuned: Path) -> System:
    """The demo system, from checkpoint folders."""

    def spec(folder: Path, chat: bool) -> ModelSpec:
        return ModelSpec(model=str(folder), dtype="float32", chat="llama2" if chat else "none")

    return System(
        name="demo-build",
        base=spec(pretrained / "base", chat=False),
        antiexpert=spec(pretrained / "antiexpert", chat=False),
        expert=spec(tuned / "expert", chat=True),
        tuned=spec(tuned / "tuned", chat=True),
        judges={"toxigen": str(pretrained / JUDGE)},
    )


VARIANTS = ("0.25", "0.5", "1.5", "2", "first:1", "first:8", "first:16")
"""Alphas that are measured beside 1, for the first tuning seed."""


Scores = dict[str, float | None]


@dataclass(frozen=True)
class Measuring:
    """What measuring takes beside the models."""

    n: int
    """Dev items of each task; fewer where the demo's own data has fewer."""
    folder: Path
    """Takes the files."""
    sandbox: Sandbox | None
    """Runs the functions; without one they are not measured."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that can be measured here."""
        return tuple(t for t in world.TASKS if TASKS[t].execute is None or self.sandbox is not None)


def measure(system: System, middle: Path, how: Measuring, variants: Sequence[str]) -> dict[str, Scores]:
    """Task -> role (or variant) -> score on the first dev items."""
    scores: dict[str, Scores] = {}
    loaded = Models(system)
    chat = ModelSpec(model=str(middle), dtype="float32", chat="llama2")
    middle_system = system.model_copy(update={"name": "demo-build-mid", "tuned": chat})

    def score(
        own: System,
        task: str,
        role: Role,
        models: Models,
        alpha: str | None = None,
        forced: str | None = None,
    ) -> Metric:
        return _score(own, task, role, models, how, RunOptions(alpha=alpha, data=str(data), forced=forced))

    for task in how.tasks:
        data = how.folder / f"{task}.jsonl"
        items = world.rows(task, "dev", min(how.n, world.ITEMS[task]))
        data.write_text("".join(json.dumps(row) + "\n" for row in items))
        by_role = {role: score(system, task, role, loaded) for role in system.roles}
        found: Scores = {role: metric.value for role, metric in by_role.items()}
        found["gap_closed"] = gap_closed(by_role["base"], by_role["proxy"], by_role["tuned"])
        found["tuned_mid"] = score(middle_system, task, "tuned", Models(middle_system)).value
        for alpha in variants:
            found[f"proxy alpha={alpha}"] = score(system, task, "proxy", loaded, alpha=alpha).value
        if variants and task in world.OPENERS:
            opener = world.OPENERS[task]
            found["base_opener_forced"] = score(system, task, "base", loaded, forced=opener).value
        scores[task] = found
        rounded = {name: value and round(value, 3) for name, value in found.items()}
        show(f"{task} {rounded}")
    return scores


def _score(
    system: System, task: str, role: Role, loaded: Models, how: Measuring, options: RunOptions
) -> Metric:
    """The headline of one run that is thrown away."""
    job = evaluation.plan(system, task, role, options)
    sandbox = how.sandbox if job.task.execute is not None else None
    with tempfile.TemporaryDirectory(dir=how.folder) as folder:
        path = Path(folder) / "run"
        made = session.run_job(job, path, decoder_here(loaded), DecodeOptions(progress=False), sandbox)
        who = judging.judging_of(system, job.task, JudgeOptions(), "generate")
        found = (made if who is None else who(path)).score
        assert found is not None, f"nothing of {task} as {role} has a score"
        return found


# The whole


def build(
    out: Path, work: Path, amounts: corpus.Amounts, tuning: corpus.TuningAmounts, n: int
) -> dict[str, Any]:
    """Make all models, put the demo's five and the judge into `out`, and return (and write there) what was
    measured."""
    miniature, by_seed = world.make_world(), list[dict[str, Scores]]()
    pretrain(miniature, work, amounts)
    demo_judge.build(miniature, AutoTokenizer.from_pretrained(work / "base"), work / JUDGE)
    how = Measuring(n, work, open_sandbox())
    for seed in TUNING_SEEDS:
        target = work / f"seed-{seed}"
        tune(miniature, work, target, seed, tuning)
        variants = VARIANTS if seed == TUNING_SEEDS[0] else ()
        by_seed.append(measure(system_in(work, target), target / "mid-tuned", how, variants))
    first = work / f"seed-{TUNING_SEEDS[0]}"
    _install(work, first, out)
    folders = [*(work / name for name in SHAPES), *(first / name for name in TUNED)]
    report = {
        "world_seed": miniature.seed,
        "split": "dev",
        "n": {task: min(n, world.ITEMS[task]) for task in how.tasks},
        "pretraining": {"documents": asdict(amounts), **PRETRAINING.model_dump()},
        "tuning": {"examples": asdict(tuning), "rate": TUNING_RATE, **TUNING.model_dump(exclude={"seed"})},
        "models": {folder.name: json.loads((folder / TRAINED).read_text()) for folder in folders},
        "judge": json.loads((work / JUDGE / TRAINED).read_text()),
        "by_tuning_seed": by_seed,
        "spread": spread(by_seed),
    }
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def open_sandbox() -> Sandbox | None:
    """The sandbox that runs the demo's functions; None, with a printed line, where there is none."""
    try:
        return Sandbox.open()
    except UserError as error:
        show(f"humaneval is not measured: {error}")
        return None


def spread(by_seed: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, list[float]]]:
    """Task -> name -> [lowest, mean, highest] over the tuning seeds, of what was measured for all of them."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in by_seed[0]:
        for name in by_seed[0][task]:
            values = [value for scores in by_seed if (value := scores[task].get(name)) is not None]
            if len(values) == len(by_seed):
                figures = (min(values), mean(values), max(values))
                found.setdefault(task, {})[name] = [round(value, 4) for value in figures]
    return found


def _install(pretrained: Path, tuned: Path, out: Path) -> None:
    """Copy the five checkpoints of the demo, and the judge."""
    sources = {**dict.fromkeys(("base", "antiexpert", JUDGE), pretrained), **dict.fromkeys(TUNED, tuned)}
    for name, folder in sources.items():
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(folder / name, out / name)
        for file in (out / name).iterdir():
            file.chmod(0o644)  # save_pretrained keeps the weights from other users


def main() -> None:
    """The command line of `python -m proxytune.tuning.demo_models`."""
    parser = argparse.ArgumentParser(description="Train the demo models and measure them on the dev split.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the five checkpoints go")
    parser.add_argument(
        "--work", type=Path, help="keep all checkpoints here, and go on from those that are here"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of all training text, for a trial")
    parser.add_argument("--items", type=int, default=500, help="dev items per task to measure on, at most")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as for the committed weights; a second thread hardly helps models this small
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        given.out.mkdir(parents=True, exist_ok=True)
        amounts, tuning = corpus.Amounts().scaled(given.share), corpus.TuningAmounts().scaled(given.share)
        report = build(given.out, work, amounts, tuning, given.items)
    for task, rows in report["spread"].items():
        lines = (f"{name} {low:.3f}..{high:.3f}" for name, (low, _, high) in rows.items())
        show("\n  ".join([task, *lines]))


if __name__ == "__main__":
    main()
