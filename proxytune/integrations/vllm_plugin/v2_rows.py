"""Which request has which alpha, on vLLM's Model Runner V2, the usual one on a GPU.

Written from vLLM 0.32's source (vllm/v1/worker/gpu). It was not run: the CPU build has no Triton, without
which V2 does not start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from proxytune.config import parse_alpha
from proxytune.integrations.vllm_plugin.alpha import COLUMNS, alphas_of, asked_of, row_of


class AlphaState(DefaultModelState):  # type: ignore[misc]
    """A row of alpha per slot of a request, and alpha per token at an address that CUDA graphs keep."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.default = parse_alpha(vllm_config.model_config.hf_config.proxytune["alpha"])
        self.rows = UvaBackedTensor((self.max_num_reqs, COLUMNS), dtype=torch.float32)
        self.alpha = torch.zeros(self.max_num_tokens, dtype=torch.float32, device=device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request gets a slot."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        extra = None if params is None else params.extra_args
        schedule, before = asked_of(extra, allow_negative=True)
        if before is None:
            before = len(new_req_data.prompt_token_ids or ())
        self.rows.np[req_index] = row_of(schedule or self.default, before)

    def apply_staged_writes(self) -> None:
        """New rows become visible to the device."""
        super().apply_staged_writes()
        self.rows.copy_to_uva()

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Tensor | None]:
        """Alpha of the batch's tokens, beside what the model gets anyway. No copy waits for the device."""
        inputs: dict[str, Tensor | None] = super().prepare_inputs(input_batch, req_states)
        tokens = input_batch.num_tokens_after_padding
        starts = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        places = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
        row = torch.searchsorted(starts, places, right=True).clamp(max=input_batch.num_reqs - 1)
        slots = input_batch.idx_mapping[: input_batch.num_reqs][row]
        self.alpha[:tokens] = alphas_of(self.rows.gpu[slots.long()], input_batch.positions[:tokens])
        return {**inputs, "alpha": self.alpha[:tokens]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """What a CUDA graph is captured with: the same buffer."""
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "alpha": self.alpha[:num_tokens]}
