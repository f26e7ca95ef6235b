"""Tokens of texts and back: the routes that vLLM has, which lm-eval and others ask."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel

from proxytune.decoding.open_batch import OpenBatch
from proxytune.server.answers.calls import conversation_of_messages
from proxytune.server.answers.protocol import DetokenizeBody, TokenizeBody
from proxytune.server.faults import RequestFault
from proxytune.server.work.service import Service


class TokenizedText(BaseModel):
    """A text in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]


class DetokenizedText(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client must know to make prompts itself."""

    model: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


def tokens_router(service: Service) -> APIRouter:
    """The routes, in the ids of the model that decodes."""
    router = APIRouter(tags=["tokens"])

    def batch_of(model: str | None) -> OpenBatch:
        return service.batches[service.role_of(model or service.first_model)]

    @router.post("/tokenize")
    async def tokenize(body: Annotated[TokenizeBody, Body()]) -> TokenizedText:
        """The tokens of a text, or of a conversation in the format of the model that decodes."""
        batch = batch_of(body.model)
        ids = await service.prepare(lambda: _ids(batch, body))
        tokenizer = batch.decoder.tokenizer
        return TokenizedText(
            count=len(ids),
            max_model_len=batch.decoder.ensemble.window,
            tokens=ids,
            token_strs=[str(token) for token in tokenizer.convert_ids_to_tokens(ids)],
        )

    @router.post("/detokenize")
    async def detokenize(body: Annotated[DetokenizeBody, Body()]) -> DetokenizedText:
        """The text of tokens, special ones included."""
        batch = batch_of(body.model)
        if body.tokens:
            await service.prepare(lambda: batch.of_ids(body.tokens))
        tokenizer = batch.decoder.tokenizer
        text = await service.prepare(
            lambda: tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False) if body.tokens else ""
        )
        return DetokenizedText(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> TokenizerInfo:
        """Special tokens, and the chat template of the model that decodes where it has one."""
        batch = batch_of(model)
        decoder = batch.decoder
        tokenizer = decoder.tokenizer
        spec = decoder.loaded[decoder.target].spec
        return TokenizerInfo(
            model=model or service.first_model,
            vocab_size=decoder.ensemble.runners[decoder.target].alignment.size,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            chat_template=_template(tokenizer.chat_template) if spec.chat == "tokenizer" else None,
        )

    return router


def _template(found: Any) -> str | None:
    return found if isinstance(found, str) else None


def _ids(batch: OpenBatch, body: TokenizeBody) -> list[int]:
    decoder = batch.decoder
    if body.messages is not None:
        context = batch.of_conversation(conversation_of_messages(body.messages))
        virtual = len(decoder.loaded[decoder.target].virtual_ids)
        return list(context[decoder.target][virtual:])
    assert body.prompt is not None
    try:
        body.prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestFault(400, f"the prompt is not valid Unicode: {error.reason}", param="prompt") from None
    found: list[int] = decoder.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    return found
