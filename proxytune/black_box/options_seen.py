"""Multiple choice through what an endpoint shows of one position, as in the paper's section 7.

Only the options are re-weighted: score = log p(option) + alpha * sum of weight * (log p_expert(option) -
log p_antiexpert(option)). An option that is not shown is at most as probable as the last token that is, and
this bound takes its place. Where no option is shown, the item is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from proxytune.api_spec import ApiSpec
from proxytune.black_box.visible import Continued, VisiblePosition
from proxytune.config import AlphaSchedule
from proxytune.decoding import Decoder
from proxytune.engine import Continuation, Ensemble, likelihoods
from proxytune.errors import UserError

Shifts = Sequence[float]
"""Of every option: the sum over the experts, before alpha."""


@dataclass(frozen=True)
class SeenOptions:
    """The log-probabilities of an item's options, as far as the endpoint shows them."""

    logprobs: tuple[float, ...]
    bounded: tuple[bool, ...]
    """Which of them are bounds."""

    @classmethod
    def of(cls, reply: Continued, options: Sequence[str], spec: ApiSpec) -> SeenOptions | None:
        """Those of a reply; None where none of them is shown."""
        if not reply.positions:
            return None
        position = reply.positions[0]
        found = _exact(position, options) if spec.route == "completions" else None
        if found is None or not any(map(math.isfinite, found)):
            # a message begins without a space, and some servers drop it: both forms name the option
            found = _stripped(position, options)
        if not any(map(math.isfinite, found)):
            return None
        bounded = tuple(not math.isfinite(logprob) for logprob in found)
        return cls(
            tuple(position.least if bound else lp for lp, bound in zip(found, bounded, strict=True)), bounded
        )

    def scores(self, shifts: Shifts, alpha: float) -> list[float]:
        """Log-probabilities of the options among themselves, re-weighted."""
        moved = [lp + alpha * shift if alpha else lp for lp, shift in zip(self.logprobs, shifts, strict=True)]
        top = max(moved)
        whole = top + math.log(math.fsum(math.exp(score - top) for score in moved))
        return [score - whole for score in moved]


def _exact(position: VisiblePosition, options: Sequence[str]) -> list[float]:
    """An option is the token with exactly its bytes."""
    return [_mass(position, option.encode().__eq__) for option in options]


def _stripped(position: VisiblePosition, options: Sequence[str]) -> list[float]:
    """An option is every token that is it but for white space around."""
    plain = [option.strip().encode() for option in options]
    return [_mass(position, partial(_is_but_for_space, option)) for option in plain]


def _is_but_for_space(option: bytes, data: bytes) -> bool:
    return data.strip() == option


def _mass(position: VisiblePosition, names: Callable[[bytes], bool]) -> float:
    """The log of the probability of the tokens that name an option."""
    found = [token.logprob for token in position.tokens if token.data and names(token.data)]
    return math.log(math.fsum(map(math.exp, found))) if len(found) > 1 else sum(found) if found else -math.inf


def option_forms(decoder: Decoder, options: Sequence[str], spec: ApiSpec) -> list[list[int]]:
    """The token of the experts for every option; for a chat endpoint that with a space and that without."""
    forms = []
    for option in options:
        texts = [option] if spec.route == "completions" else [option, option.strip()]
        ids = [decoder.continued(text) for text in texts]
        if len(ids[0]) != 1:
            raise several_tokens(option)
        forms.append(list(dict.fromkeys(one[0] for one in ids if len(one) == 1)))
    return forms


def several_tokens(option: str) -> UserError:
    """The error that an endpoint cannot score a text."""
    return UserError(
        f"the text {option[:40]!r} is several tokens, and an endpoint shows the probabilities of one: "
        "--mode choices compares the letters of the choices, for tasks that have them"
    )


def shifts_of(
    decoder: Decoder,
    contexts: Sequence[Mapping[str, tuple[int, ...]]],
    forms: Sequence[Sequence[Sequence[int]]],
) -> Iterator[Shifts]:
    """For every item: how much the experts move each of its options, by one forward of every model."""
    terms = decoder.ensemble.terms
    known = {
        name: list(_logprobs(decoder, name, [one[name] for one in contexts], forms))
        for name in dict.fromkeys(name for term in terms for name in (term.expert, term.antiexpert))
    }
    for place, options in enumerate(forms):
        yield [
            math.fsum(
                term.weight * (known[term.expert][place][at] - known[term.antiexpert][place][at])
                for term in terms
            )
            for at in range(len(options))
        ]


def _logprobs(
    decoder: Decoder,
    name: str,
    contexts: Sequence[tuple[int, ...]],
    forms: Sequence[Sequence[Sequence[int]]],
) -> Iterator[list[float]]:
    """The log-probability of every item's options under one model: of all forms of an option together."""
    alone = Ensemble({name: decoder.ensemble.runners[name]}, name)
    items = [
        Continuation({name: context}, (token,))
        for context, options in zip(contexts, forms, strict=True)
        for option in options
        for token in option
    ]
    found = likelihoods(alone, items, [AlphaSchedule()])
    for options in forms:
        yield [
            math.log(math.fsum(math.exp(float(next(found).logprobs[0, 0])) for _ in option))
            for option in options
        ]
