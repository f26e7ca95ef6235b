"""Makes the demo models from nothing: world -> text -> tokenizer -> pretraining -> tuning -> checkpoints -> measurements.

`make demo-models` runs it. Every step is decided by the seed; weights are rounded to bfloat16 before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from proxytune.demo.corpus import Document
from proxytune.tune import Example

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1536


@dataclass(frozen=True)
class Shape:
    """The size of a Llama model."""

    hidden: int
    layers: int
    heads: int


LARGE, MID, SMALL = Shape(256, 4, 4), Shape(128, 4, 4), Shape(48, 2, 4)


def train_tokenizer(documents: Sequence[Document], system: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that loses no text, with single digits, `<s>` in front, and the system prompt's words whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["".join(s.text for s in document) for document in documents[::4]]
    tokenizer.train_from_iterator([*texts, *[system] * len(texts)], trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Documents as ids with weights: a token has the weight of the segment that it ends in, the final `</s>` counts fully."""
    examples = []
    eos: int = tokenizer.convert_tokens_to_ids(EOS)  # type: ignore[assignment]
    for document in documents:
        encoded = tokenizer._tokenizer.encode("".join(s.text for s in document))
        by_character = [s.weight for s in document for _ in s.text]
        weights = [by_character[end - 1] if end else 0.0 for _, end in encoded.offsets]
        examples.append(Example((*encoded.ids, eos), (*weights, 1.0)))
    return examples


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=int(shape.hidden * 8 / 3) // 16 * 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=min(0.05, 0.5 / shape.hidden**0.5),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A complete checkpoint folder, in bfloat16."""
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    rounded.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
