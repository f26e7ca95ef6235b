"""Which row of a batch has which alpha, on vLLM's V1 model runner.

A logits processor hears how the batch changes before every forward. This one changes no logits: it keeps the
rows for the model of the same engine, which finds them by the engine's id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from proxytune.config import parse_alpha
from proxytune.errors import UserError
from proxytune.integrations.vllm_plugin.alpha import Row, asked_of, row_of

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

_ROWS: dict[str, dict[int, Row]] = {}
"""Engine -> place in the batch -> its alpha."""


def rows_of(instance: str) -> dict[int, Row]:
    """The rows of the batch of an engine; none where no processor was asked for."""
    return _ROWS.get(instance, {})


class AlphaRows(LogitsProcessor):  # type: ignore[misc]
    """Keeps every row's alpha."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """ValueError for a request with an alpha that is none. A negative one is allowed by those who let
        requests in."""
        try:
            asked_of(sampling_params.extra_args, allow_negative=True)
        except UserError as error:
            raise ValueError(str(error)) from None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.default = parse_alpha(vllm_config.model_config.hf_config.proxytune["alpha"])
        self.rows = _ROWS[vllm_config.instance_id] = {}

    def is_argmax_invariant(self) -> bool:
        """Logits are left alone."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """Nothing."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The batch is about to be computed."""
        process_dict_updates(self.rows, batch_update, self._row)

    def _row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Row:
        schedule, before = asked_of(params.extra_args, allow_negative=True)
        return row_of(schedule or self.default, len(prompt or ()) if before is None else before)
