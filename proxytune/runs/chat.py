"""A conversation with a loaded system. Every role gets what was said in a format of its own, whoever said it,
so that role and alpha may change from answer to answer."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from proxytune.config import AlphaSchedule, Role, Sampling
from proxytune.decoding import Conversation
from proxytune.errors import PromptTooLong, UserError
from proxytune.records import Completion, Prompt
from proxytune.runs.evaluation import alpha_for
from proxytune.runs.steered import Alpha, Comparison, ResponseStream, SteeredModel

Message = tuple[str, str]
"""Who speaks (`system`, `user`, `assistant`), and what."""


class Chat:
    """Messages so far, and who answers the next one.

    A question that gets no answer (it does not fit, a chat template has no text for it) leaves the
    conversation as it was."""

    def __init__(
        self,
        model: SteeredModel,
        *,
        system: str | None = None,
        as_: str = "proxy",
        alpha: Alpha = None,
        sampling: Sampling | None = None,
        allow_negative_alpha: bool = False,
    ) -> None:
        """Begin a conversation with `model`; `system` is the system message. UserError for a role that the
        system lacks, and for an alpha out of bounds."""
        self.model, self.allow_negative_alpha = model, allow_negative_alpha
        self.sampling = (sampling or Sampling()).model_copy(update={"n": 1})
        self.system = system
        """The system message of the conversation, from its beginning, also where it is set later."""
        self.turns: list[Message] = []
        """What user and assistant said so far."""
        self.as_, self.alpha = as_, alpha

    @property
    def as_(self) -> Role:
        """Who answers."""
        return self._role

    @as_.setter
    def as_(self, role: str) -> None:
        self._role = self.model.system.require(role)

    @property
    def alpha(self) -> AlphaSchedule:
        """The alpha of the proxy."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha) -> None:
        if "proxy" not in self.model.system.roles and alpha is None:
            self._alpha = self.model.system.alpha
            return
        proxy = self.model.system.require("proxy")
        found = alpha_for(self.model.system, proxy, alpha, allow_negative=self.allow_negative_alpha)
        assert found is not None
        self._alpha = found

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, the system message first."""
        return (*([("system", self.system)] if self.system else []), *self.turns)

    def reset(self) -> None:
        """Forget what was said. The system message, the role and alpha stay."""
        self.turns.clear()

    def ask(self, text: str) -> ChatAnswer:
        """The answer to a message in pieces of text, as they are decoded. At its end, both are part of the
        conversation.

        UserError, with the next one, where the conversation leaves no room for an answer."""
        if not text.strip():
            raise UserError("the message is empty")
        alpha = self.alpha if self.as_ == "proxy" else None
        stream = self.model.stream(
            self._prompt((*self.messages, ("user", text))),
            as_=self.as_,
            sampling=self.sampling,
            alpha=alpha,
            allow_negative_alpha=self.allow_negative_alpha,
        )
        return ChatAnswer(self, stream, text)

    def compare(self, text: str | None = None) -> Comparison:
        """The answers of all roles: to the last message, or to a new one, which joins the conversation with
        the answer of the role that is set."""
        if text is None and not self.turns:
            raise UserError("nothing was asked yet: write /compare QUESTION, or ask something first")
        if text is not None and not text.strip():
            raise UserError("the message is empty")
        before = self.messages if text is not None else self.messages[:-1]
        asked = (*before, ("user", text)) if text is not None else before
        try:
            found = self.model.compare(
                self._prompt(asked),
                sampling=self.sampling,
                alpha=self.alpha,
                allow_negative_alpha=self.allow_negative_alpha,
            )
        except PromptTooLong as error:
            raise _too_long(error) from None
        for completion in found.values():
            if completion.finish_reason == "template":
                raise UserError(str(completion.remark))
        if text is not None:
            self._add(text, found[self.as_].text)
        return found

    def _prompt(self, messages: tuple[Message, ...]) -> Prompt:
        return Conversation(messages).prompt

    def _add(self, question: str, answer: str) -> None:
        self.turns += [("user", question), ("assistant", answer.strip())]


class ChatAnswer(Iterator[str]):
    """One answer as it is decoded, without white space before it."""

    completion: Completion | None = None
    """The whole response, at its end; None where it was stopped."""

    def __init__(self, chat: Chat, stream: ResponseStream, question: str) -> None:
        self._chat, self._stream, self._question = chat, stream, question
        self._ended = False
        self.text = ""
        """What is there of it."""

    def __next__(self) -> str:
        while True:
            try:
                piece = next(self._stream)
            except StopIteration:
                self._end()
                raise
            except PromptTooLong as error:
                self._ended = True
                raise _too_long(error) from None
            except UserError:
                self._ended = True
                raise
            piece = piece if self.text else piece.lstrip()
            if piece:
                self.text += piece
                return piece

    def stop(self) -> None:
        """End it after the step that is under way: for a signal handler, or another thread. What is there of
        it stays in the conversation."""
        self._stream.stop()

    def close(self) -> None:
        """End it at once. What is there of it stays in the conversation, with the question; without any,
        neither does."""
        self._stream.close()
        self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.completion = self._stream.completion
        if self.text or self.completion is not None:
            self._chat._add(self._question, self.text)

    def __enter__(self) -> ChatAnswer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _too_long(error: PromptTooLong) -> UserError:
    return UserError(
        f"the conversation has {error.tokens} tokens for the {error.model}, whose context window is "
        f"{error.window}: begin a new one (/reset), or shorten the message"
    )
