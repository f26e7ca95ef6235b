"""The client of a base behind an API: what it is asked, in parallel, within the budget, and once.

Replies are stored by their content, so that neither another alpha nor a resumed run asks again. The cost of
a call is entered under the item that it is for, before it is sent: --max-cost holds for all sessions
together that ask about the same items."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune.api_spec import ApiSpec
from proxytune.black_box.visible import Continued, read_answer
from proxytune.config import cache_folder
from proxytune.endpoints import Budget, CallFailed, CallLimits, CallQueue, ReplyStore, calls, endpoint, prices
from proxytune.errors import UserError, needs_extra
from proxytune.options import ApiOptions
from proxytune.records import Took

FRAMING = 32
"""More tokens than a chat template puts around a message."""
TOKEN_BYTES, REPLY_BYTES = 512, 1 << 16
"""Of a reply, for every visible token and for all the rest."""


@dataclass(frozen=True)
class Question:
    """One request: go on after a prompt."""

    item: int
    """The item that it is for, by its number at the client."""
    prompt: str | tuple[int, ...]
    """The text, or token ids."""
    max_tokens: int = 1
    visible: bool = True
    """Whether the most probable tokens of each position are to be shown."""
    stop: tuple[str, ...] = ()

    def body(self, spec: ApiSpec) -> dict[str, Any]:
        """As it is sent."""
        common: dict[str, Any] = {"model": spec.model, "max_tokens": self.max_tokens, "temperature": 0}
        if self.stop:
            common["stop"] = list(self.stop)
        if spec.route == "chat":
            shown = {"logprobs": True, "top_logprobs": spec.top_logprobs} if self.visible else {}
            return {**common, "messages": [{"role": "user", "content": self.prompt}], **shown}
        prompt = list(self.prompt) if isinstance(self.prompt, tuple) else self.prompt
        return {**common, "prompt": prompt, **({"logprobs": spec.top_logprobs} if self.visible else {})}

    def most(self, spec: ApiSpec) -> prices.Tokens:
        """The most tokens that it can take: none is shorter than a byte."""
        size = (
            len(self.prompt.encode("utf-8", "surrogatepass"))
            if isinstance(self.prompt, str)
            else len(self.prompt)
        )
        return size + (FRAMING if spec.route == "chat" else 1), self.max_tokens

    def reply_bytes(self, spec: ApiSpec) -> int:
        """The most that a reply can have."""
        shown = 1 + (spec.top_logprobs + 1 if self.visible else 0)
        return REPLY_BYTES + TOKEN_BYTES * self.max_tokens * shown


@dataclass
class ApiClient:
    """Asks an endpoint. One client serves all that one command asks."""

    spec: ApiSpec
    options: ApiOptions = field(default_factory=ApiOptions)
    cache: Path | None = None
    agreed: bool = False
    """Whether the user agreed to what it costs, when asked."""
    items: list[str] = field(default_factory=list)
    """What each item's cost is entered under."""
    total: Took = field(default_factory=Took)
    """What this client's calls have taken."""
    _taken: dict[int, Took] = field(default_factory=dict)
    _number: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """See that the library is there and, where a limit is set, a price."""
        needs_extra("a base behind an API", "httpx2", "api")
        _ = self.endpoint
        if self.options.max_cost is not None and self.price is None:
            raise UserError(
                f"--max-cost needs the price of '{self.spec.model}': add --price IN,OUT (USD per 1e6)"
            )

    @cached_property
    def endpoint(self) -> endpoint.Endpoint:
        """Where requests go, with the key of the environment."""
        options, spec = self.options, self.spec
        limits = CallLimits(deadline=options.api_deadline, retries=options.api_retries)
        key = endpoint.key_in(spec.key_variable)
        return endpoint.Endpoint(spec.api, key, limits, "`api` in the system's file", spec.key_variable)

    @property
    def price(self) -> prices.Price | None:
        """The price given, or the listed one; nothing for a server on this machine."""
        listed = prices.PRICES.get(self.spec.model)
        return self.options.price or ((0.0, 0.0) if self.spec.is_here else listed)

    @cached_property
    def store(self) -> ReplyStore:
        """Where replies are kept."""
        path = self.cache or cache_folder() / "base_replies.sqlite"
        return ReplyStore(path, "the cache of what a base behind an API replied")

    @cached_property
    def budget(self) -> Budget:
        """What may be spent, and what is."""
        return Budget(self.options.max_cost)

    def item(self, prompt: str) -> int:
        """The number of the item with this prompt; what earlier sessions spent on it counts from now on."""
        account = self._hashed("item", prompt)
        with self._lock:
            if account not in self._number:
                self._number[account] = len(self.items)
                self.items.append(account)
                self.budget.spent += self.usd(self.store.spent([account])) or 0.0
            return self._number[account]

    def usd(self, tokens: prices.Tokens) -> float | None:
        """What tokens cost; None where no price is known."""
        return prices.usd(tokens, self.price)

    def key(self, question: Question) -> str:
        """The content that a reply depends on."""
        return self._hashed(self.spec.route, json.dumps(question.body(self.spec), sort_keys=True))

    def _hashed(self, *parts: str) -> str:
        content = json.dumps([self.spec.api, self.spec.model, *parts])
        return hashlib.sha256(content.encode()).hexdigest()

    def known(self, question: Question) -> bool:
        """Whether the reply is stored."""
        return self.store.get(self.key(question)) is not None

    def ask(self, questions: Sequence[Question]) -> list[Continued]:
        """The replies, in order; equal questions are asked once. UserError, with what is spent, when the
        endpoint fails for good or the money is."""
        found: list[Continued | None] = [None] * len(questions)
        for place, reply in self.replies(questions):
            found[place] = reply
        return [reply for reply in found if reply is not None]

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Continued]]:
        """The place of a question and its reply, as they come."""
        wanted: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            wanted.setdefault(self.key(question), []).append(place)
        missing = []
        for key, places in wanted.items():
            stored = self.store.get(key)
            if stored is None:
                missing.append(places)
                continue
            reply = Continued.read(stored)
            yield from ((place, reply) for place in places)
        if not missing:
            return
        self.check()
        sending = _Sending(self, [questions[places[0]] for places in missing])
        queue = CallQueue(
            sending.send, sending.estimate, self.budget, self.options.parallel, self.endpoint.limits
        )
        try:
            for number, reply in queue.replies(range(len(missing))):
                yield from ((place, reply) for place in missing[number])
        except calls.CallsEnded as error:
            more = "with a higher limit " if error.money else ""
            raise UserError(
                f"the endpoint of {self.spec}: {error}; {self.spent()}; what it said is kept, and the same "
                f"command {more}continues"
            ) from None

    def took(self, item: int) -> Took:
        """What calls for an item took since it was last asked."""
        with self._lock:
            return self._taken.pop(item, Took())

    def count(self, item: int, tokens: prices.Tokens) -> None:
        """One more call for an item has ended."""
        with self._lock:
            self._taken[item] = _more(self._taken.get(item, Took()), tokens)
            self.total = _more(self.total, tokens)

    def spent(self) -> str:
        """What this command has spent, in words."""
        took = self.total
        tokens = took.api_prompt_tokens, took.api_completion_tokens
        usd = self.usd(tokens)
        cost = "" if usd is None else f", {usd:.4f} USD"
        return f"spent: {took.api_calls} calls, {tokens[0]:,} + {tokens[1]:,} tokens{cost}"

    def spent_before(self, items: Collection[int]) -> float:
        """US dollars that all sessions have spent on items."""
        return self.usd(self.store.spent(self.items[item] for item in items)) or 0.0


def _more(took: Took, tokens: prices.Tokens) -> Took:
    return Took(
        api_calls=took.api_calls + 1,
        api_prompt_tokens=took.api_prompt_tokens + tokens[0],
        api_completion_tokens=took.api_completion_tokens + tokens[1],
    )


@dataclass(frozen=True)
class _Sending:
    """The calls of one `replies`."""

    client: ApiClient
    questions: Sequence[Question]

    def estimate(self, number: int) -> float:
        """US dollars that a call can cost."""
        return self.client.usd(self.questions[number].most(self.client.spec)) or 0.0

    def send(self, number: int) -> calls.CallResult[Continued]:
        """Ask, and keep the reply and the cost."""
        client, question = self.client, self.questions[number]
        spec, most = client.spec, question.most(client.spec)
        entered = client.store.sending(client.items[question.item], most)
        path = "chat/completions" if spec.route == "chat" else "completions"
        result: Continued | CallFailed
        try:
            answer = client.endpoint.post(path, question.body(spec), question.reply_bytes(spec))
            tokens = endpoint.reported(answer.prompt_tokens, answer.completion_tokens, most)
            result = read_answer(answer, logprobs=question.visible)
        except CallFailed as error:
            result, tokens = error, most if error.paid else (0, 0)
        stored = None if isinstance(result, CallFailed) else result.stored()
        client.store.ended(entered, client.key(question), tokens, stored)
        client.count(question.item, tokens)
        return calls.CallResult(result, client.usd(tokens) or 0.0)


def texts_of(prompts: Iterable[str]) -> float:
    """Tokens of prompts, roughly."""
    return sum(map(len, prompts)) / prices.CHARACTERS_PER_TOKEN
