"""What is measured on the CPU, case by case: contenders of one workload, raced, and the ratios they give."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.baselines import HuggingFace, HuggingFaceBatching, PaperLoop
from benchmarks.lab import Lab, Table, alone_oracle, proxy_oracle
from benchmarks.measure import Contender
from benchmarks.ours import DEFAULT, Ours
from benchmarks.record import Oracle, Report
from benchmarks.shapes import Bench, lora_benches
from benchmarks.workloads import (
    Workload,
    demo_prompts,
    log_uniform,
    natural_lengths,
    random_contexts,
    same_token,
    uniform,
    workload,
)
from proxytune.config import Role
from proxytune.decoding.decoder import Decoder
from proxytune.engine.speculative.drafter import LOOKUP, Speculation

ACCEPTANCE = 0.8
"""The synthetic acceptance where a ratio needs one figure."""
PROMPT = (16, 48)
"""Shortest and longest random prompt."""


def fixed(k: int) -> Speculation:
    """Drafts of one length, by the expert alone."""
    return Speculation(k=k, lookup=False)


def demo_batch1(lab: Lab) -> Report:
    """The demo's own prompts at batch 1: real models and acceptance."""
    return _own_answers(lab, "demo_batch1", lab.demo, "speculative_vs_plain_demo")


def trained_batch1(lab: Lab, key: str = "speculative_vs_plain_trained") -> Report:
    """The same of the trio that is trained here."""
    return _own_answers(lab, "trained_batch1", lab.trained, key)


def _own_answers(lab: Lab, case: str, bench: Bench, key: str) -> Report:
    """The demo world's prompts at batch 1, responses as long as the proxy's own answers."""
    size, table = lab.size, Table(lab, case)
    decoder = bench.decoder("proxy")
    asked = demo_prompts(decoder, size.demo_prompts, ("gsm", "truthfulqa"))
    lengths = natural_lengths(decoder, [example for _, example in asked], size.demo_longest)
    work = workload("demo prompts, own lengths", [c for c, _ in asked], lengths, one_by_one=True)
    ours = Ours(bench, work)
    timed = lab.race(
        [
            PaperLoop(bench, work).contender("paper's loop, batch 1"),
            ours.contender("plain"),
            ours.speculating(DEFAULT).contender("speculative, adaptive k and lookup"),
            ours.speculating(Speculation(lookup=False)).contender("speculative, adaptive k"),
            ours.speculating(Speculation(drafter=LOOKUP)).contender("speculative, lookup alone"),
            *(ours.speculating(fixed(k)).contender(f"speculative, k = {k}") for k in size.draft_lengths),
            HuggingFace(bench, work).contender("Hugging Face generate, base alone"),
            Ours(bench, work, "base").contender("base alone"),
            Ours(bench, work, "base", DEFAULT).contender("base alone, lookup"),
        ]
    )
    paper, plain, default = timed[:3]
    table.put(proxy_oracle(bench, work, paper), timed[:-3], plain=plain)
    table.put(alone_oracle(bench, work, timed[-3]), timed[-3:])
    table.ratio(key, default, plain)
    return table.report


def trio_batch1(lab: Lab) -> Report:
    """The random trio at batch 1, with synthetic acceptance."""
    size, bench, table = lab.size, lab.trio, Table(lab, "trio_batch1")
    prompts = random_contexts(size.trio_prompts, *PROMPT, vocabulary(bench))
    work = workload("random prompts", prompts, [size.trio_tokens] * len(prompts), one_by_one=True)
    ours = Ours(bench, work)
    truth = ours.run().tokens
    alone = lab.race(
        [
            PaperLoop(bench, work).contender("paper's loop, batch 1"),
            HuggingFace(bench, work).contender("Hugging Face generate, base alone"),
            HuggingFace(bench, work, static=True).contender(
                "Hugging Face generate, base alone, static cache"
            ),
            ours.contender("plain"),
            ours.with_synthetic_acceptance(ACCEPTANCE, truth).contender("speculative, adaptive k"),
            *(
                ours.with_synthetic_acceptance(ACCEPTANCE, truth, k).contender(f"speculative, k = {k}")
                for k in size.draft_lengths
            ),
            Ours(bench, work, "base").contender("base alone"),
        ]
    )
    paper, hugging_face, static, plain, adaptive, *lengths, base = alone
    oracle = proxy_oracle(bench, work, paper)
    table.put(oracle, [paper, plain], plain=plain)
    table.put(oracle, [adaptive, *lengths], plain=plain, synthetic_acceptance=ACCEPTANCE)
    table.put(alone_oracle(bench, work, hugging_face), [hugging_face, static, base])
    table.ratio("speculative_vs_plain_trio", adaptive, plain)
    table.ratio("speculative_trio_vs_paper_batch1", adaptive, paper)
    table.ratio("speculative_trio_vs_base_hf", adaptive, hugging_face)
    return table.report


def mixed(lab: Lab) -> Report:
    """Demo prompts, many at once, response lengths drawn uniformly."""
    count, low, high = lab.size.mixed
    return _demo_mixture(lab, "mixed", f"uniform {low}..{high}", uniform(count, low, high))


def long_tail(lab: Lab) -> Report:
    """Demo prompts, many at once, most responses short and a few long."""
    count, low, high = lab.size.long_tail
    return _demo_mixture(lab, "long_tail", f"log-uniform {low}..{high}", log_uniform(count, low, high))


def _demo_mixture(lab: Lab, case: str, name: str, lengths: list[int]) -> Report:
    bench = lab.demo
    asked = demo_prompts(bench.decoder("proxy"), len(lengths), ("gsm",))
    work = workload(f"demo prompts, {name}", [context for context, _ in asked], lengths)
    ours = Ours(bench, work, max_rows=bench.max_rows)
    rivals = [
        ours.contender("continuous batching, plain"),
        ours.speculating(DEFAULT).contender("continuous batching, speculation auto"),
    ]
    return _against_best_batch(lab, case, bench, work, rivals)


def mixed_trio(lab: Lab) -> Report:
    """The random trio, many requests at once, response lengths drawn uniformly; without speculation, since
    random models accept nothing real."""
    count, low, high = lab.size.mixed_trio
    bench = lab.trio
    prompts = random_contexts(count, *PROMPT, vocabulary(bench))
    work = workload(f"random prompts, uniform {low}..{high}", prompts, uniform(count, low, high))
    rival = Ours(bench, work, max_rows=bench.max_rows).contender("continuous batching, plain")
    report = _against_best_batch(lab, "mixed_trio", bench, work, [rival])
    report.add(batching_alone(lab, "mixed_trio", bench, work, min(count, bench.max_rows)))
    return report


def batching_alone(lab: Lab, case: str, bench: Bench, work: Workload, rows: int) -> Report:
    """The base alone in two continuous batches, Hugging Face's and ours."""
    table = Table(lab, case)
    timed = lab.race(
        [
            HuggingFaceBatching(bench, work, rows).contender("Hugging Face continuous batching, base alone"),
            Ours(bench, work, "base", max_rows=rows).contender("base alone, continuous batching"),
        ],
        lab.size.long_repeats,
    )
    table.put(alone_oracle(bench, work, timed[0]), timed)
    return table.report


def _against_best_batch(lab: Lab, case: str, bench: Bench, work: Workload, rivals: list[Contender]) -> Report:
    """The last rival is proxytune as it decodes by default, and gives the ratio."""
    table, found = Table(lab, case), lab.best_batch(bench, work, rivals)
    oracle = proxy_oracle(bench, work, found.best)
    table.put(oracle, [*found.losing, found.best, *found.rivals])
    table.ratio(f"{case}_vs_paper_best_batch", found.rivals[-1], found.best)
    return table.report


def shared_pair(lab: Lab) -> Report:
    """Expert = antiexpert + LoRA: two small models and one set of weights, the pair alone and the proxy."""
    size, table = lab.size, Table(lab, "shared_pair")
    apart, together = lora_benches(size.trio, lab.device, lab.dtype, MAX_PAIR_ROWS)
    for bench in (apart, together):
        lab.note(bench)
    prompts = random_contexts(1, *PROMPT, vocabulary(apart))
    work = workload("random prompt", prompts, [size.pair_tokens], one_by_one=True)
    expert = HuggingFace(apart, work, "expert")
    pairs = lab.race(
        [
            Ours(apart, work, pair_only=True).contender("pair alone, two models"),
            Ours(together, work, pair_only=True).contender("pair alone, shared weights"),
            expert.contender("Hugging Face generate, expert alone"),
        ]
    )
    two, one, alone = pairs
    table.put(alone_oracle(apart, work, alone, "expert"), pairs, plain=two)
    table.ratio("shared_pair_vs_two_models", one, two)
    ours = Ours(together, work)
    truth = ours.run().tokens
    proxies = lab.race(
        [
            PaperLoop(apart, work).contender("paper's loop, batch 1"),
            Ours(apart, work).contender("plain, two models"),
            ours.contender("plain, shared pair"),
            ours.with_synthetic_acceptance(ACCEPTANCE, truth).contender(
                "speculative, adaptive k, shared pair"
            ),
        ]
    )
    oracle = proxy_oracle(apart, work, proxies[0])
    table.put(oracle, proxies[:-1], plain=proxies[1])
    table.put(oracle, proxies[-1:], plain=proxies[1], synthetic_acceptance=ACCEPTANCE)
    return table.report


MAX_PAIR_ROWS = 8


def synthetic_acceptance(lab: Lab) -> Report:
    """Adaptive speculation against plain decoding at every acceptance and batch size: it must not lose."""
    report = Report()
    for name in lab.size.acceptance_systems:
        bench: Bench = getattr(lab, name)
        report.add(
            acceptance_table(lab, bench, (f"adaptive_vs_plain_worst_{name}", f"plain_vs_plain_worst_{name}"))
        )
    return report


def acceptance_table(lab: Lab, bench: Bench, keys: tuple[str, str], decoder: Decoder | None = None) -> Report:
    """Plain and adaptive decoding at every acceptance and batch; under `keys` the worst ratio to plain
    decoding, and what the clock makes of plain decoding against itself. The oracle is plain decoding, whose
    tokens the drafts are made of."""
    size, table = lab.size, Table(lab, "dial")
    ratios, noise = list[float](), list[float]()
    for batch in size.acceptance_batches:
        tokens = size.acceptance_tokens if batch <= 8 else size.acceptance_tokens // 2
        prompts = random_contexts(batch, *PROMPT, vocabulary(bench))
        work = workload("random prompts", prompts, [tokens] * batch)
        plain = Ours(bench, work, max_rows=batch, decoder=decoder)
        truth = plain.run().tokens
        speculative = [
            plain.with_synthetic_acceptance(share, truth).contender(f"speculative, adaptive k, {share:g}")
            for share in size.acceptances
        ]
        undrafted, again, *drafted = lab.race(
            [plain.contender("plain"), plain.contender("plain, again"), *speculative], size.long_repeats
        )
        oracle = Oracle(bench, work, truth)
        table.put(oracle, [undrafted, again], plain=undrafted)
        noise.append(min(again.versus(undrafted), undrafted.versus(again)))
        for share, one in zip(size.acceptances, drafted, strict=True):
            table.put(oracle, [one], synthetic_acceptance=share, plain=undrafted)
            ratios.append(one.versus(undrafted))
        if decoder is not None:
            decoder.ensemble.forget_graphs()  # every acceptance has made its own
    table.report.ratios |= dict(zip(keys, (min(ratios), min(noise)), strict=True))
    return table.report


def table12(lab: Lab) -> Report:
    """The paper's Table 12: one token repeated as the prompt, batch 1, prompt and output lengths as there.

    "Tuned" is the large model alone: on the demo its tuned model, on random weights the base, which takes the
    same time."""
    report = Report()
    for name in lab.size.table12_systems:
        report.add(table12_of(lab, getattr(lab, name), "tuned" if name == "demo" else "base"))
    return report


def table12_of(lab: Lab, bench: Bench, tuned: Role) -> Report:
    """The table of one system, whose large model alone is that of the role `tuned`."""
    table = Table(lab, "table12")
    for prompt, output in lab.size.table12:
        work = workload(f"{prompt}/{output}", [same_token(prompt)], [output], one_by_one=True)
        ours, large = Ours(bench, work), HuggingFace(bench, work, tuned)
        contenders = [
            large.contender("tuned, Hugging Face generate"),
            Ours(bench, work, tuned).contender("tuned, ours"),
            PaperLoop(bench, work).contender("proxy, paper's loop"),
            ours.contender("proxy, ours, plain"),
        ]
        if tuned == "tuned":  # random models accept nothing real
            contenders.append(ours.speculating(DEFAULT).contender("proxy, ours, default"))
        timed = lab.race(contenders, lab.size.long_repeats)
        table.put(alone_oracle(bench, work, timed[0], tuned), timed[:2])
        table.put(proxy_oracle(bench, work, timed[2]), timed[2:])
    return table.report


def vocabulary(bench: Bench) -> int:
    """Ids to draw random prompts from."""
    return int(bench.plain["base"].config.vocab_size)


Case = Callable[[Lab], Report]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "demo_batch1": (demo_batch1, ("speculative_vs_plain_demo",)),
    "trained_batch1": (trained_batch1, ("speculative_vs_plain_trained",)),
    "trio_batch1": (
        trio_batch1,
        ("speculative_vs_plain_trio", "speculative_trio_vs_paper_batch1", "speculative_trio_vs_base_hf"),
    ),
    "mixed": (mixed, ("mixed_vs_paper_best_batch",)),
    "long_tail": (long_tail, ("long_tail_vs_paper_best_batch",)),
    "mixed_trio": (mixed_trio, ("mixed_trio_vs_paper_best_batch",)),
    "shared_pair": (shared_pair, ("shared_pair_vs_two_models",)),
    "dial": (
        synthetic_acceptance,
        tuple(f"{what}_vs_plain_worst_{name}" for name in ("demo", "trio") for what in ("adaptive", "plain")),
    ),
    "table12": (table12, ()),
}
"""Name -> the case, and the ratios that it gives."""
