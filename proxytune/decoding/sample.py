"""What a role sees of a sample prompt: tried before weights are loaded, and shown by `proxytune check`."""

from __future__ import annotations

from proxytune.config import ModelSpec
from proxytune.decoding.prompts import Form, ids_of, text_for
from proxytune.decoding.templates import TemplateFault
from proxytune.errors import UserError
from proxytune.models import Tokenizer
from proxytune.records import Prompt

QUESTION = "What is 2 + 3?"
SAMPLE = Prompt(plain=f"Question: {QUESTION}\nAnswer:", user=QUESTION)


def sample_context(
    spec: ModelSpec, tokenizer: Tokenizer, name: str, form: Form, prompt: Prompt = SAMPLE
) -> tuple[str, tuple[int, ...]]:
    """The text and the ids of the context that the model called `name` would see. UserError in one line if
    its chat template is absent or broken."""
    try:
        text = text_for(spec.chat, form, prompt, tokenizer)
        return text, ids_of(spec, tokenizer, text)
    except TemplateFault as fault:
        raise UserError(
            f"the {name}: the chat template of '{spec.model}' fails on a sample prompt ({fault}): "
            "mend it, or set `chat: llama2` or `chat: none`"
        ) from None
    except UserError as error:
        raise UserError(f"the {name}: {error}") from None
