"""The model that vLLM runs: base, experts and antiexperts side by side, combined in `compute_logits`.

`forward` gives [hidden states of every model | alpha], one row per token, and vLLM takes the rows whose
logits it wants. So the right alpha is there for sampled tokens, prompt log-probabilities and drafts alike.
KV does not depend on alpha: the prefix cache is shared across alphas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from proxytune.config import parse_alpha
from proxytune.integrations.vllm_plugin.alpha import COLUMNS, alphas_of, columns, packed, row_of, unpacked
from proxytune.integrations.vllm_plugin.role_configs import RoleModel, assert_own, built
from proxytune.integrations.vllm_plugin.v1_rows import rows_of

MARK = ":"
"""Between a role and the name of a weight: no checkpoint has it in a name."""


class ProxyTunedForCausalLM(nn.Module):
    """logits = base + alpha * sum_i weight_i * (expert_i - antiexpert_i), as one model of vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """What is to be loaded is in the configuration under `proxytune` (launch.py writes it)."""
        super().__init__()
        asked: dict[str, Any] = vllm_config.model_config.hf_config.proxytune
        self.terms: list[tuple[str, str, float]] = [(e, a, float(w)) for e, a, w in asked["terms"]]
        self.size: int = asked["size"]
        self.width: int = vllm_config.model_config.get_vocab_size()
        self.dtype = vllm_config.model_config.dtype
        self.default = row_of(parse_alpha(asked["alpha"]), 0)
        self.v2: bool = vllm_config.use_v2_model_runner
        self.instance = vllm_config.instance_id
        if not current_platform.is_cpu() and not self.v2 and not vllm_config.model_config.enforce_eager:
            raise RuntimeError(
                "with vLLM's V1 model runner, CUDA graphs would replay a stale alpha: unset "
                "VLLM_USE_V2_MODEL_RUNNER, or add --eager"
            )
        self.roles = [RoleModel(name, *where) for name, where in asked["models"].items()]
        self.configs: dict[str, VllmConfig] = {}
        self.widths: list[int] = []
        for role in self.roles:
            model, self.configs[role.name] = built(vllm_config, role)
            setattr(self, role.name, model)
            self.widths.append(self.configs[role.name].model_config.get_hidden_size())
        self.secondary_weights = [
            DefaultModelLoader.Source(role.model, role.revision, prefix=f"{role.name}{MARK}")
            for role in self.roles[1:]
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every weight to the model that it is of; -> the names of the parameters that were filled."""
        filled = set[str]()

        def role_of(item: tuple[str, Tensor]) -> str:
            return item[0].partition(MARK)[0] if MARK in item[0] else self.roles[0].name

        def own(items: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            return ((name.rpartition(MARK)[2], tensor) for name, tensor in items)

        for name, items in groupby(weights, role_of):
            loaded = getattr(self, name).load_weights(own(items))
            filled |= {f"{name}.{parameter}" for parameter in loaded}
        for role in self.roles:
            assert_own(getattr(self, role.name), self.configs[role.name], role)
        return filled

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's embeddings [T, d]. (vLLM asks for them to see that this is a model.)"""
        found: Tensor = getattr(self, self.roles[0].name).embed_input_ids(input_ids)
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of all models, and alpha, of every token: [T, sum of widths + 1 or 2]. `alpha` [T] is
        given by Model Runner V2."""
        hidden = [getattr(self, role.name)(input_ids, positions, None, None) for role in self.roles]
        if alpha is None:
            alpha = alphas_of(self._rows(positions), positions)
        return torch.cat([*hidden, packed(alpha, self.dtype)], dim=-1)

    def _rows(self, positions: Tensor) -> Tensor:
        """The row of alpha [T, 5] of every token of the V1 runner's batch; the default's where vLLM only
        measures."""
        tokens = positions.shape[-1]
        default = torch.tensor(self.default, device=positions.device).expand(tokens, COLUMNS)
        metadata, asked = get_forward_context().attn_metadata, rows_of(self.instance)
        if not isinstance(metadata, dict) or not metadata or not asked:
            return default
        starts = next(iter(metadata.values())).query_start_loc
        batch = [asked.get(index, self.default) for index in range(len(starts) - 1)]
        table = torch.tensor(batch, device=positions.device)
        rows = table.repeat_interleave((starts[1:] - starts[:-1]).to(table.device), dim=0)
        return torch.cat([rows, default[len(rows) :]])

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The combined logits [rows, V] in float32; None on the ranks that gather none. Ids beyond the
        tokenizer have none."""
        *hidden, bits = torch.split(hidden_states, [*self.widths, columns(self.dtype)], dim=-1)
        found: dict[str, Tensor] = {}
        for role, states in zip(self.roles, hidden, strict=True):
            logits = getattr(self, role.name).compute_logits(states.contiguous())
            if logits is None:
                return None
            found[role.name] = logits[:, : self.size].float()
        alpha = unpacked(bits)[:, None]
        combined = found[self.roles[0].name]
        for expert, antiexpert, weight in self.terms:
            combined = combined + alpha * weight * (found[expert] - found[antiexpert])
        return nn.functional.pad(combined, (0, self.width - self.size), value=-torch.inf)

    def get_model_state_cls(self) -> type[Any]:
        """What Model Runner V2 keeps for every request."""
        from proxytune.integrations.vllm_plugin.v2_rows import AlphaState

        return AlphaState
