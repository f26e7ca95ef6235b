"""The paper's decoding loop, ported to transformers 5: the baseline of every ratio.

A minimal port of `DExpertsLlama.generate` (github.com/alisawuffles/proxy-tuning, modeling/dexperts.py): three
Hugging Face forwards in sequence, DynamicCache, left-padded static batches that run until their last row is
done, ids and masks grown by `torch.cat`, one look at the device per step. What is different, and why:

- ids come in per role (the original decodes prompts and encodes the expert's again on the way in; that is
  outside the loop, and left out here in its favour);
- position ids come from the attention mask here, as in the prepare_inputs_for_generation of transformers 4;
  that of transformers 5 leaves them out and, called as it was, would feed the whole sequence in every step;
- only the last position's logits are computed in prefill (`logits_to_keep=1`, in the original's favour);
- a row is finished after its forced number of tokens, in place of an end-of-sequence token;
- greedy only: no processors, no sampling.

Hugging Face's own `generate` of one model is here too, under the same clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

PAD = 0
"""Fed where a row is padded or finished; masked or ignored."""

OnStep = Callable[[], None]
"""Called when a step's tokens are known."""


@dataclass
class Side:
    """One model's half of the loop: its ids, mask and cache, as they grow."""

    model: PreTrainedModel
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 0 on the left where a prompt is shorter
    cache: Any = None
    _fresh: bool = field(default=True)

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Side:
        """Left-padded prompts."""
        longest, device = max(map(len, prompts)), model.device
        ids = [[PAD] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return cls(model, torch.tensor(ids, device=device), torch.tensor(mask, device=device))

    def logits(self) -> Tensor:
        """Logits [B, V] after the newest token of every row."""
        new = self.ids.shape[1] if self.cache is None else 1
        positions = (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 1)
        out = self.model(
            input_ids=self.ids[:, -new:],
            attention_mask=self.mask,
            position_ids=positions[:, -new:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        last: Tensor = out.logits[:, -1, :]
        return last

    def grow(self, tokens: Tensor) -> None:
        """Append one token [B] to every row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=-1)


@torch.inference_mode()
def paper_generate(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[Mapping[str, Sequence[int]]],
    new_tokens: Sequence[int],
    *,
    alpha: float = 1.0,
    on_step: OnStep | None = None,
) -> list[list[int]]:
    """One static batch, greedy: a response of new_tokens[i] ids for row i.

    `models` and each row's `contexts` are by role: base, expert, antiexpert."""
    sides = {role: Side.of(models[role], [row[role] for row in contexts]) for role in models}
    device = sides["base"].ids.device
    forced = torch.tensor(new_tokens, device=device)
    unfinished = torch.ones_like(forced)
    chosen: list[Tensor] = []
    for _ in range(max(new_tokens)):
        logits = {role: side.logits() for role, side in sides.items()}
        width = logits["base"].shape[-1]
        combined = logits["base"] + alpha * (logits["expert"][:, :width] - logits["antiexpert"])
        tokens = combined.argmax(-1) * unfinished + PAD * (1 - unfinished)
        for side in sides.values():
            side.grow(tokens)
        chosen.append(tokens)
        unfinished = unfinished * (forced > len(chosen)).long()
        ended = bool(unfinished.max() == 0)  # the original's look at the device in every step
        if on_step is not None:
            on_step()
        if ended:
            break
    rows = torch.stack(chosen, dim=1).tolist()
    return [row[:count] for row, count in zip(rows, new_tokens, strict=True)]


@torch.inference_mode()
def combined_logits(
    models: Mapping[str, PreTrainedModel],
    contexts: Mapping[str, Sequence[int]],
    response: Sequence[int],
    alpha: float = 1.0,
) -> Tensor:
    """Combined logits [V] after a response, or those of the only model, by plain forwards: what a near-tie is
    judged by."""
    logits = {
        role: Side.of(model, [[*contexts[role], *response]]).logits()[0].double()
        for role, model in models.items()
    }
    if len(logits) == 1:
        return next(iter(logits.values()))
    width = logits["base"].shape[-1]
    return logits["base"] + alpha * (logits["expert"][:width] - logits["antiexpert"])


class _Clock:
    """A stopping criterion that never stops: `generate` calls it once per step."""

    def __init__(self, on_step: OnStep | None, rows: int, device: torch.device) -> None:
        self.on_step, self.no = on_step, torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if self.on_step is not None:
            self.on_step()
        return self.no


@torch.inference_mode()
def hf_generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    static: bool = False,
    on_step: OnStep | None = None,
) -> list[int]:
    """`generate` of one model alone, batch 1, greedy: new_tokens ids. `static`: its static cache, which it
    compiles on CUDA."""
    ids = torch.tensor([list(prompt)], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=PAD,
        cache_implementation="static" if static else None,
    )
    model.generation_config.eos_token_id = None  # otherwise `generate` takes it from there
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        stopping_criteria=[_Clock(on_step, 1, model.device)],
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
