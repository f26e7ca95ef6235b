"""One training from its request to the expert's folder: checked, resumed where it stopped, recorded, and
written out with the system that uses it.

    OUT/training.json                     the record: settings, data, curves, time, memory
    OUT/adapter_model.safetensors, ...    the result: an adapter, or a checkpoint (model.safetensors)
    OUT/system.yaml                       a system that uses it at once
    OUT/checkpoints/                      where it goes on from after a kill; deleted when it is finished
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback
from transformers import logging as transformers_logging
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from proxytune import __version__
from proxytune.config import ModelSpec
from proxytune.errors import UserError, did_you_mean
from proxytune.models import Tokenizer, plain
from proxytune.processes import is_first
from proxytune.provenance import provenance
from proxytune.run_files import FolderOwner, disk_errors_in_one_line
from proxytune.training_record import (
    TrainingRecord,
    TuningRequest,
    read_training,
    thinned,
)
from proxytune.tuning.checkpoints import FOLDER, WholeCheckpoints, newest
from proxytune.tuning.estimate import MemoryEstimate, Shape, estimate
from proxytune.tuning.examples import TuneData, read_data
from proxytune.tuning.methods import Method, get_method
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.system_file import write_system
from proxytune.tuning.tokens import TokenRows, encode, learned_tokens
from proxytune.tuning.watch import Watch, curve_of, peak_bytes

if TYPE_CHECKING:  # trl is an extra: what is missing is said before anything imports it
    from trl import SFTConfig

    from proxytune.tuning.trainer import ExpertTrainer, Steering

LOGS = "tensorboard"
"""The folder of --report-to tensorboard in that of the training."""
KEPT = 2
"""Checkpoints that are kept: a kill may spoil the last one."""
NOT_DECISIVE = {"report_to", "base"}
"""Settings that change no weight. (`base` does with --through, and is put back then.)"""


@dataclass(frozen=True)
class TuneJob:
    """A training, checked as far as that needs no weights."""

    method: Method
    spec: ModelSpec
    """The model that is tuned, as it is loaded: the antiexpert."""
    options: TuneOptions
    data: TuneData
    train: TokenRows
    held_out: TokenRows
    tokenizer: Tokenizer
    estimate: MemoryEstimate
    notes: tuple[str, ...] = field(default=())

    @property
    def learning_rate(self) -> float:
        """The given one, or the method's."""
        return self.options.learning_rate or self.method.learning_rate

    @property
    def base(self) -> ModelSpec:
        """The large model: the one that is named, or the model itself."""
        named = self.options.base
        return self.spec if named is None else ModelSpec(model=named, dtype=self.spec.dtype)

    @property
    def request(self) -> TuningRequest:
        """What decides the weights."""
        leave_out = NOT_DECISIVE - ({"base"} if self.options.through else set())
        settings = {
            **self.options.model_dump(mode="json", exclude=leave_out),
            "learning_rate": self.learning_rate,
        }
        return TuningRequest(
            method=self.method.name,
            model=str(self.spec.model),
            revision=self.spec.revision,
            settings=settings,
            data_sha256=self.data.sha256,
        )


def plan(method_name: str, model: str, options: TuneOptions) -> TuneJob:
    """Check a training: its method, data, model, window and memory by estimate. Reads no weights. UserError
    in one line for what cannot be."""
    method = get_method(method_name)
    method.check(options)
    if options.data is None:
        raise UserError("give the training examples: --data FILE")
    if options.through is not None and options.base is None:
        raise UserError("--through base needs the large model: --base MODEL")
    if options.through is not None and options.teacher is not None:
        raise UserError("--through and --teacher are two losses: give one of them")
    if options.patience and options.validation is None:
        raise UserError(f"--patience {options.patience} needs held-out examples: --validation SHARE")
    _check_reports(options)
    data = read_data(options.data, options.validation, options.limit, options.seed)
    spec = ModelSpec(model=model, dtype=options.dtype, quantization=method.quantization, chat=options.chat)
    skeleton, weights = plain.check(spec)
    room = _window(skeleton, spec, options.max_length, method.virtual_tokens(options), data)
    tokenizer = plain.load_tokenizer(spec)
    train, held = (encode(part, spec, tokenizer, room) for part in (data.train, data.validation))
    others = _others(spec, options, method, weights)
    shape = Shape.of(options, method, max(train.longest, held.longest), others)
    need = estimate(method.prepare(skeleton, options), skeleton.config, weights, method, shape)
    return TuneJob(method, spec, options, data, train, held, tokenizer, need, _notes(train, held, options))


def _check_reports(options: TuneOptions) -> None:
    """UserError for a receiver of curves that transformers does not know, or that is not installed."""
    for name in options.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise did_you_mean("receiver of curves", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report-to {name}: it is not installed here: `pip install {name}`")


def _window(skeleton: PreTrainedModel, spec: ModelSpec, most: int, virtual: int, data: TuneData) -> int:
    """Tokens that an example may have: --max-length, or less where the model's window is smaller."""
    window = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return most
    if virtual >= window:
        raise UserError(f"--virtual-tokens {virtual}: '{spec.model}' takes {window} tokens in all")
    return min(most, int(window) - virtual)


def _others(spec: ModelSpec, options: TuneOptions, method: Method, weights: float) -> float:
    """Bytes of the models that run beside the expert: base and antiexpert of --through, the teacher."""
    named = options.base if options.through is not None else options.teacher
    if named is None:
        return 0.0
    other = ModelSpec(model=named, dtype=spec.dtype)
    _, large = plain.check(other)
    plain.require_one_vocabulary(other, spec)
    return large + (weights if options.through is not None and method.result == "weights" else 0.0)


def _notes(train: TokenRows, held: TokenRows, options: TuneOptions) -> tuple[str, ...]:
    notes = []
    if cut := train.cut + held.cut:
        notes.append(f"{cut} completions were cut at {options.max_length} tokens: their ends are not learned")
    if joined := train.joined + held.joined:
        notes.append(
            f"{joined} prompts are tokenised otherwise where their completion follows: end prompts at the "
            "end of a word, and begin completions with a space"
        )
    return tuple(notes)


def tune(job: TuneJob, out: Path, *, show: bool = True) -> TrainingRecord:
    """Train, or go on where the folder's training stopped, and write the result into `out`. A finished
    training is read and never made again. UserError where the folder is another training's, or another
    process writes to it."""
    with disk_errors_in_one_line(out):
        out.mkdir(parents=True, exist_ok=True)
    if not is_first():
        there = _read_own(job, out)
        return there if there is not None and there.status == "finished" else _train(job, out, there, False)
    owner = FolderOwner(out)
    try:
        there = _read_own(job, out)
        if there is not None and there.status == "finished":
            owner.tidy()
            return there
        job.estimate.require_room()
        owner.take()
        return _train(job, out, there, show)
    finally:
        owner.release()


def _read_own(job: TuneJob, out: Path) -> TrainingRecord | None:
    """The record of this very training in the folder; None for a new folder."""
    there = read_training(out)
    if there is None:
        if any(path.name != ".writer" for path in out.iterdir()):
            raise UserError(f"'{out}' is not empty and holds no training: choose another folder with --out")
        return None
    if (differs := job.request.difference(there.request)) is not None:
        raise UserError(
            f"'{out}' holds another training ({differs}): choose another folder with --out, or delete it"
        )
    return there


def _train(job: TuneJob, out: Path, there: TrainingRecord | None, show: bool) -> TrainingRecord:
    resumed = newest(out)
    record = there or _begun(job)
    if resumed is not None:
        record = record.model_copy(update={"resumed": record.resumed + 1})
    if is_first():
        record.write(out)
    with _quiet_libraries():
        trainer, watch = _trainer(job, out, resumed, show)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        best = _write_result(job, trainer, out) if is_first() else None
    state = trainer.state
    points = curve_of(state.log_history)
    made = record.model_copy(
        update={
            "status": "finished",
            "steps": state.global_step,
            "epochs": round(float(state.epoch or 0.0), 4),
            "best_step": best,
            "stopped_early": state.global_step < state.max_steps,
            "seconds": round(watch.seconds, 3),
            "cpu_seconds": round(watch.cpu_seconds, 3),
            "tokens_seen": int(state.num_input_tokens_seen),
            "peak_bytes": peak_bytes(),
            "before_bytes": watch.before_bytes,
            "curve": thinned(points),
        }
    )
    if not is_first():
        return made
    write_system(job.spec, job.base, job.method.result, job.options, out)
    made.write(out)
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    return made


def _begun(job: TuneJob) -> TrainingRecord:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return TrainingRecord(
        status="unfinished",
        request=job.request,
        result=job.method.result,
        antiexpert=job.spec.model_copy(update={"chat": "none"}),
        examples=len(job.train.ids),
        held_out=len(job.held_out.ids),
        tokens=job.train.tokens,
        learned=learned_tokens(job.train, job.tokenizer),
        cut=job.train.cut,
        parameters=job.estimate.parameters,
        trainable=job.estimate.trainable,
        estimated_bytes=job.estimate.bytes,
        notes=job.notes,
        provenance=provenance(__version__, device, torch.get_num_threads()),
    )


def _trainer(job: TuneJob, out: Path, resumed: Path | None, show: bool) -> tuple[ExpertTrainer, Watch]:
    """trl's loop over this job."""
    from proxytune.tuning.trainer import ExpertTrainer

    torch.manual_seed(job.options.seed)  # of new weights beside the model's
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(f"tuning {job.method.name}", show)
    module = plain.load(job.spec)
    prepared = job.method.prepare(module, job.options)
    callbacks: list[Any] = [WholeCheckpoints(out, resumed), watch]
    if job.options.patience:
        callbacks.append(EarlyStoppingCallback(job.options.patience))
    trainer = ExpertTrainer(
        model=prepared,
        args=arguments(job, out),
        train_dataset=_dataset(job.train),
        eval_dataset=_dataset(job.held_out) if job.held_out.ids else None,
        processing_class=job.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / LOGS)  # its own default goes with the checkpoints
    for parameter in prepared.parameters():
        if parameter.requires_grad and job.method.result == "adapter":
            parameter.data = parameter.data.float()  # trl makes adapters on 4-bit weights bfloat16
    if job.options.through is not None:
        trainer.steering = _steering(job, trainer.args.device)
    if job.options.teacher is not None:
        teacher = plain.load(ModelSpec(model=job.options.teacher, dtype=job.options.dtype))
        trainer.teacher = teacher.to(trainer.args.device)
    return trainer, watch


def _steering(job: TuneJob, device: torch.device) -> Steering:
    """The base and, unless the expert can take its adapter off, the antiexpert, frozen."""
    from proxytune.tuning.trainer import Steering

    own = None if job.method.result == "adapter" else plain.load(job.spec).to(device)
    base = plain.load(job.base).to(device)
    return Steering(base, own, job.options.alpha, plain.require_one_vocabulary(job.base, job.spec))


def _dataset(rows: TokenRows) -> Dataset:
    return Dataset.from_dict({"input_ids": list(map(list, rows.ids)), "labels": list(map(list, rows.labels))})


def arguments(job: TuneJob, out: Path) -> SFTConfig:
    """The options as trl has them."""
    from trl import SFTConfig

    asked, steps = job.options, job.options.save_every
    when: dict[str, Any] = {"strategy": "epoch"} if steps is None else {"strategy": "steps", "steps": steps}
    held_out = bool(job.held_out.ids)
    return SFTConfig(
        output_dir=str(out / FOLDER),
        per_device_train_batch_size=asked.batch,
        per_device_eval_batch_size=asked.batch,
        gradient_accumulation_steps=asked.accumulate,
        learning_rate=job.learning_rate,
        lr_scheduler_type=asked.schedule if asked.schedule != "constant" else "constant_with_warmup",
        warmup_steps=asked.warmup,  # below 1 it is a share
        weight_decay=asked.weight_decay,
        max_grad_norm=0.0 if job.method.fused else asked.clip,
        num_train_epochs=asked.epochs,
        max_steps=-1 if asked.max_steps is None else asked.max_steps,
        optim=job.method.optimizer(asked),
        bf16=asked.bf16,
        gradient_checkpointing=asked.checkpoint_activations,
        seed=asked.seed,
        data_seed=asked.seed,
        save_strategy=when["strategy"],
        save_steps=when.get("steps", 500),
        save_total_limit=KEPT,
        eval_strategy=when["strategy"] if held_out else "no",
        eval_steps=when.get("steps") if held_out else None,
        metric_for_best_model="eval_loss" if held_out else None,
        greater_is_better=False if held_out else None,
        restore_callback_states_from_checkpoint=bool(asked.patience),
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=list(asked.report_to) or "none",
        use_cpu=not torch.cuda.is_available(),  # or several processes on CPUs would not know of each other
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _write_result(job: TuneJob, trainer: ExpertTrainer, out: Path) -> int | None:
    """Write the weights: the last ones, or those of the best checkpoint on held-out examples; -> its step."""
    best = trainer.state.best_model_checkpoint
    adapter = job.method.result == "adapter"
    if best is not None and trainer.state.best_global_step != trainer.state.global_step:
        kinds = ("adapter_*",) if adapter else ("*.safetensors", "*.safetensors.index.json", "*config.json")
        for path in (
            path for kind in kinds for path in Path(best).glob(kind) if path.name != "proxytune.safetensors"
        ):
            shutil.copyfile(path, out / path.name)
    else:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        more = {"save_embedding_layers": False} if adapter else {}
        model.save_pretrained(out, **more)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card, which has nothing but headings
    if not adapter:
        job.tokenizer.save_pretrained(out)
    return trainer.state.best_global_step if best is not None else None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """transformers, datasets, trl and peft say nothing but errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(level)
