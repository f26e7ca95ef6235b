"""What the engine's clocks count."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from proxytune.config import Sampling, System
from proxytune.engine import timing
from proxytune.engine.speculative.draft_length import DraftLength
from proxytune.engine.speculative.drafter import Speculation
from proxytune.engine.timing import PrefillShare, work_clock
from tests.support.decoders import decoder, ragged
from tests.support.on_device import as_on_a_device


def test_the_clock_of_the_device() -> None:
    assert work_clock(["cpu", "cpu"]) is time.thread_time
    assert work_clock(["cpu", "cuda"]) is work_clock(["cuda"]) is time.perf_counter


class Machine:
    """A machine whose forwards take known times, on which other programs run now and then."""

    def __init__(self, patch: pytest.MonkeyPatch, delay: float) -> None:
        self.wall = self.work = 0.0
        self.delay, self.draw = delay, random.Random(1)
        patch.setattr(timing.time, "thread_time", lambda: self.work)
        patch.setattr(timing.time, "perf_counter", lambda: self.wall)

    def slowed(self, function: Any) -> Any:
        """A forward that takes a second and a hundredth more per token; to the wall, often far longer."""

        def forward(work: Any) -> Any:
            seconds = 1.0 + 0.01 * sum(len(segment.ids) for segment in work.segments)
            self.work += seconds
            self.wall += seconds * (self.draw.choice((1.0, 1.0, self.delay)))
            return function(work)

        return forward


@pytest.mark.parametrize("delay", [1.0, 27.0])
def test_what_other_programs_take_is_not_measured(
    trio: System, delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft length is chosen from the same times as on an idle machine."""
    d, machine = decoder(trio, batch=2, speculation=Speculation(lookup=False)), None
    for runner in d.ensemble.runners.values():
        patched: Any = runner
        machine = machine or Machine(monkeypatch, delay)
        monkeypatch.setattr(patched, "forward", machine.slowed(patched.forward))
    list(d.stream(ragged(4), Sampling(max_new_tokens=40)))
    learnt: DraftLength = d.ensemble.draft_length
    assert len(learnt.verify.seen) > 2 and len(learnt.draft.seen) > 0
    for tokens, (mean_tokens, seconds, count) in learnt.verify.seen.items():
        if count > 1 and tokens <= 8:  # base and antiexpert; the expert too where it has not drafted
            assert seconds * learnt.verify.level == pytest.approx(2.0 + 0.02 * mean_tokens, rel=0.01)
    assert d.stats.seconds == pytest.approx(machine.wall if machine else 0.0)


def test_prompts_have_their_share_of_the_time(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    d = decoder(trio, batch=2, speculation=Speculation(k=0))
    machine = Machine(monkeypatch, 1.0)
    for runner in d.ensemble.runners.values():
        patched: Any = runner
        monkeypatch.setattr(patched, "forward", machine.slowed(patched.forward))
    stream = d.stream(ragged(2, 1), Sampling(max_new_tokens=5))
    list(stream)
    prompts = sum(len(ids) - 1 for e in ragged(2, 1) for ids in d.contexts(e.prompt).values())
    assert d.stats.prefill_seconds == pytest.approx(3 + 0.01 * prompts)
    assert d.stats.seconds - d.stats.prefill_seconds == pytest.approx(5 * 3 * 1.02)


def test_shares() -> None:
    share = PrefillShare()
    assert share.together(0, 5) == 0.0 and share.together(15, 5) == 0.75
    assert share.alone(7) == 1.0 and share.together(0, 5) == 0.0


def test_shares_of_steps_that_are_read_late() -> None:
    """Prompts run behind the step that is in flight: the step after it waits for them."""
    share = PrefillShare()
    assert share.alone(5) == 1.0
    share.started(15)
    assert share.collected(5) == 0.5
    share.started(0)
    assert share.collected(5) == 0.75
    assert share.collected(5) == 0.0


def test_steps_on_a_device_are_shared_too(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    d = decoder(trio, batch=2, speculation=Speculation(k=0))
    list(d.stream(ragged(5, 1), Sampling(max_new_tokens=5)))
    assert 0 < d.stats.prefill_seconds < d.stats.seconds


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("k", [0, 3])
def test_what_responses_took_is_what_the_call_took(
    trio: System, monkeypatch: pytest.MonkeyPatch, k: int, on_device: bool
) -> None:
    """All of it: time, tokens, steps, drafts and preemptions, shared out to responses of many lengths."""
    if on_device:
        as_on_a_device(monkeypatch)
    d = decoder(trio, batch=3, speculation=Speculation(k=k))
    sampling = Sampling(max_new_tokens=20, temperature=1.0, n=2, stop=("a", "e"))
    took = [completion.took for completion in d.stream(ragged(6, 1), sampling)]
    assert len({one.generated_tokens for one in took}) > 3
    for name, whole in vars(d.stats).items():
        assert sum(getattr(one, name) for one in took) == pytest.approx(whole), name
    assert all(one.seconds > one.prefill_seconds >= 0 and one.row_steps > 0 for one in took)
    assert (sum(one.drafted for one in took) > 0) == (k > 0)


def test_what_unfinished_responses_took_is_theirs(trio: System) -> None:
    """The time of what is decoded together goes to responses by their tokens, ended or not."""
    d = decoder(trio, batch=4, speculation=Speculation(k=0))
    stream = d.stream(ragged(4), Sampling(max_new_tokens=30))
    ended, stats = next(stream).took, d.stats
    stream.close()
    decoding = ended.seconds - ended.prefill_seconds
    share = ended.generated_tokens / stats.generated_tokens
    assert share < 0.5 and decoding == pytest.approx(share * (stats.seconds - stats.prefill_seconds))
    assert 0 < ended.prefill_seconds < stats.prefill_seconds
