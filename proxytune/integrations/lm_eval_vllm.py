"""A system in vLLM as a model of lm-eval: `proxytune lm-eval --engine vllm`.

All models see the same ids, so lm-eval's own way from texts to ids is the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from proxytune.config import Sampling, parse_alpha
from proxytune.errors import UserError
from proxytune.integrations.lm_eval_requests import names_of, sampling_of
from proxytune.integrations.lm_eval_system import ModelArguments, SystemLM
from proxytune.integrations.vllm_plugin import VllmDecoder, VllmLaunch
from proxytune.options import DecodeOptions, EngineOptions
from proxytune.records import Example, Prompt

Ids = list[int]


class ProxyTunedVllm(SystemLM):
    """One role of a system, answering lm-eval's requests through vLLM."""

    def __init__(self, launch: VllmLaunch, max_length: int | None = None, *, progress: bool = True) -> None:
        """The engine starts with the first request."""
        launch.check()
        super().__init__(launch.models, launch.role, launch.alpha)
        self.launch, self.progress = launch, progress
        self.max_length = min(launch.texts.window[0] - 1, max_length or launch.texts.window[0])

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ProxyTunedVllm:
        """The model of --model_args."""
        given = ModelArguments.read(arg_dict, additional_config or {})
        system = given.system()
        role = system.require(given.role)
        alpha = system.alpha if given.alpha is None else parse_alpha(given.alpha)
        alpha.check(allow_negative=given.allow_negative_alpha)
        launch = VllmLaunch(
            given.models(system), role, alpha, given.part(DecodeOptions), given.part(EngineOptions)
        )
        return cls(launch, given.max_length, progress=given.progress)

    @cached_property
    def decoder(self) -> VllmDecoder:
        """vLLM, started when it is first needed."""
        return VllmDecoder(self.launch)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests is told apart by."""
        return f"{super().tokenizer_name}-vllm"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refused: vLLM gives all models one text, and lm-eval's conversations have a form per model."""
        raise UserError("--apply_chat_template is of --engine own: each model gets its own format there")

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Ids, Ids]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """The log-probability of ids after a context, which is cut on the left where it is too long."""
        items = []
        for _text, context, ids in requests:
            room = self.max_length - len(ids)
            if room < 1:
                raise UserError(f"a continuation of {len(ids)} tokens: the models see {self.max_length}")
            if len(context) > room:
                self._note(f"contexts were cut on the left: models see {self.max_length} tokens")
            items.append((tuple(context[-room:]), tuple(ids)))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(items)
        found = self.decoder.scored(items, self.alpha)
        hidden = disable_tqdm or not self.progress
        for place, logprob, greedy in tqdm(found, "likelihoods", len(items), disable=hidden):
            answers[place] = logprob, greedy
            if (text := requests[place][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[place])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every text, in windows that are as long as the models allow."""
        windows, owners = list[tuple[None, Ids, Ids]](), list[int]()
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            owners += [place] * len(own)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[place] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A response to every context, cut before the first of its stop strings."""
        groups: dict[Sampling, list[int]] = {}
        for place, request in enumerate(requests):
            asked = sampling_of(request.args[1], self.tokenizer.eos_token)
            groups.setdefault(asked, []).append(place)
        names, answers = names_of(requests), [""] * len(requests)
        hidden = disable_tqdm or not self.progress
        with tqdm(total=len(requests), desc="responses", disable=hidden) as bar:
            for sampling, places in groups.items():
                place_of = {names[at]: at for at in places}
                examples = [self._example(names[at], requests[at].args[0], sampling) for at in places]
                for completion in self.decoder.stream(examples, sampling, alpha=self.alpha):
                    answers[place_of[completion.example_id]] = completion.text
                    bar.update()
        return answers

    def _example(self, name: str, context: str, sampling: Sampling) -> Example:
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"{sampling.max_new_tokens} new tokens leave no room for a context in the {self.max_length} "
                "tokens that the models can see: --gen_kwargs max_gen_toks=N"
            )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        return Example(name, Prompt(context, context, ids=dict.fromkeys(self.launch.names, tuple(ids))))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside its settings."""
        if "decoder" in self.__dict__:
            for remark in self.decoder.remarks:
                self._note(remark)
        return super().get_model_info()
