"""The training loop: weights of tokens are honoured, a seed decides everything, schedules and packing are as
stated."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from proxytune.tuning import training as tune
from proxytune.tuning.training import TrainingExample, TuneConfig


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )


def example(ids: list[int], weights: list[float] | None = None) -> TrainingExample:
    return TrainingExample(tuple(ids), tuple(weights or [1.0] * len(ids)))


EXAMPLES = [example([1, 2, 3, 4 + i % 5, 2]) for i in range(20)]


def trained(
    examples: list[TrainingExample], factory: tune.OptimizerFactory | None = None, **settings: object
) -> LlamaForCausalLM:
    model = tiny()
    optimizers = (factory or tune.adamw(1e-2))(model)
    tune.fit(
        model, examples, optimizers, TuneConfig.model_validate({"batch_size": 4, **settings}), show=False
    )
    return model


def state(model: LlamaForCausalLM) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: LlamaForCausalLM, b: LlamaForCausalLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


@pytest.mark.parametrize("factory", [tune.adamw(1e-2), tune.muon(1e-2)])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(factory: tune.OptimizerFactory) -> None:
    assert equal(trained(EXAMPLES, factory, seed=1), trained(EXAMPLES, factory, seed=1))
    assert not equal(trained(EXAMPLES, factory, seed=1), trained(EXAMPLES, factory, seed=2))


def test_a_last_token_of_weight_0_changes_nothing() -> None:
    def ending(last: int) -> list[TrainingExample]:
        return [example([1, 5, 6, last], [0, 1, 1, 0])] * 8

    assert equal(trained(ending(7)), trained(ending(9)))
    counted = [example([1, 5, 6, 7], [0, 1, 1, 1])] * 8
    assert not equal(trained(ending(7)), trained(counted))


def test_the_loss_is_the_weighted_mean() -> None:
    logits = torch.randn(1, 4, 32)
    ids, weights = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[9.0, 1.0, 0.0, 3.0]])
    each = -torch.log_softmax(logits[0, :-1], -1)[range(3), [2, 3, 4]]
    expected = (each[0] + 3 * each[2]) / 4
    assert torch.isclose(tune.weighted_loss(logits, tune.TrainingBatch(ids, weights, None)), expected)
    nothing = tune.TrainingBatch(ids, torch.zeros(1, 4), None)
    assert tune.weighted_loss(logits, nothing) == 0


def test_padding_does_not_count() -> None:
    rows = [example([1, 2, 3]), example([1, 2, 3, 4, 5, 6])]
    batch = tune.collate(rows)
    model = tiny().eval()
    together = tune.weighted_loss(model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch)
    apart = []
    for row in rows:
        one = tune.collate([row])
        assert one.mask is None
        apart.append(tune.weighted_loss(model(input_ids=one.ids).logits, one) * (len(row.ids) - 1))
    assert torch.isclose(together, sum(apart, torch.tensor(0.0)) / 7, atol=1e-5)


@pytest.mark.parametrize(("length", "blocks"), [(3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_packing_keeps_a_last_block_that_is_whole(length: int, blocks: int) -> None:
    ids = list(range(length))
    found = tune.pack([example(ids, [0.5] * length)], 4)
    assert [list(block.ids) for block in found] == [ids[:4], ids[4:8]][:blocks]


def test_packing_keeps_the_order_and_drops_the_rest() -> None:
    blocks = tune.pack([example([1, 2, 3], [0.1, 0.2, 0.3]), example([4, 5, 6, 7])], 3)
    assert [b.ids for b in blocks] == [(1, 2, 3), (4, 5, 6)]
    assert blocks[0].weights == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("block", [None, 7])
def test_steps_are_counted_right(block: int | None) -> None:
    config = TuneConfig(batch_size=3, epochs=2, block=block)
    assert len(list(tune.batches(EXAMPLES, config))) == tune.count_steps(EXAMPLES, config)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TuneConfig(warmup_steps=10, decay_share=0.5)
    rates = [tune.learning_rate_factor(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[:10] == sorted(rates[:10])
    assert set(rates[10:50]) == {1.0}
    assert rates[50:] == sorted(rates[50:], reverse=True) and rates[-1] == pytest.approx(1 / 50)


def test_only_what_the_optimiser_holds_is_trained() -> None:
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad = "layers.1" in name
    before = state(model)
    tune.fit(model, EXAMPLES, tune.adamw(1e-2)(model), TuneConfig(batch_size=4), show=False)
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old) == ("layers.1" not in name)


def test_training_learns_and_says_what_it_did() -> None:
    model = tiny()
    config = TuneConfig(batch_size=4, epochs=6, bf16=True)
    fitted = tune.fit(model, EXAMPLES, tune.adamw(1e-2)(model), config, show=False)
    assert fitted.losses[-1] < fitted.losses[0] / 2
    assert fitted.tokens == 6 * sum(len(e.ids) for e in EXAMPLES) and len(fitted.losses) == 30
    assert not model.training


def test_padding_is_no_token() -> None:
    model = tiny()
    rows = [example([1, 2, 3]), example([1, 2, 3, 4, 5])]
    assert tune.fit(model, rows, tune.adamw(1e-3)(model), TuneConfig(batch_size=2), show=False).tokens == 8


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValidationError):
        TuneConfig.model_validate({"epoch": 3})
    with pytest.raises(ValueError, match="2 ids but 1 weights"):
        TrainingExample((1, 2), (1.0,))
