"""What is measured on a GPU: random weights at real shapes, made there. Ratios have the prefix h200_ and the
base's size.

Everything of one shape is one process; systems are made per case and dropped after it, since two trios of 13B
do not fit beside each other."""

from __future__ import annotations

from benchmarks.baselines import HuggingFace, PaperLoop
from benchmarks.cases_cpu import (
    ACCEPTANCE,
    Case,
    acceptance_table,
    batching_alone,
    table12_of,
    trained_batch1,
    vocabulary,
)
from benchmarks.lab import Lab, Table, alone_oracle, proxy_oracle
from benchmarks.ours import Ours
from benchmarks.record import Report
from benchmarks.shapes import lora_benches, random_bench
from benchmarks.workloads import Workload, random_contexts, uniform, workload
from proxytune.engine.speculative.drafter import LOOKUP, Speculation

TRAINED = "h200_speculative_vs_plain_trained"
PROMPT = (128, 128)
"""Prompts at batch 1."""
SHORT = (16, 48)
"""Prompts of the mixture."""
ROWS = 48
"""Rows of the mixture's pools: beside a 13B trio and the paper's largest batch."""


def prefix(shape: str) -> str:
    """h200_13b, h200_70b_int8, h200_7b."""
    return "h200_" + shape.split("+")[0].replace("-", "_")


def batch1(lab: Lab) -> Report:
    """One row: the paper's loop, the base alone in every way, the proxy plain and speculative."""
    size, table, key = lab.size, Table(lab, "batch1"), prefix(lab.size.trio)
    bench = lab.note(random_bench(size.trio, lab.device, lab.dtype, 1, _tokens(lab)))
    work = _one_by_one(lab, vocabulary(bench))
    ours = Ours(bench, work)
    truth = ours.run().tokens
    timed = lab.race(
        [
            PaperLoop(bench, work).contender("paper's loop, batch 1"),
            HuggingFace(bench, work).contender("Hugging Face generate, base alone"),
            HuggingFace(bench, work, static=True).contender(
                "Hugging Face generate, base alone, static cache, compiled"
            ),
            Ours(bench, work, "base").contender("base alone"),
            ours.contender("plain"),
            ours.with_synthetic_acceptance(ACCEPTANCE, truth).contender("speculative, adaptive k"),
            ours.speculating(Speculation(drafter=LOOKUP)).contender("lookup alone (random models loop)"),
            *(
                ours.with_synthetic_acceptance(ACCEPTANCE, truth, k).contender(f"speculative, k = {k}")
                for k in size.draft_lengths
            ),
        ]
    )
    paper, hugging_face, compiled, base, plain, adaptive, lookup, *lengths = timed
    oracle = proxy_oracle(bench, work, paper)
    table.put(oracle, [paper, plain, lookup], plain=plain)
    table.put(oracle, [adaptive, *lengths], plain=plain, synthetic_acceptance=ACCEPTANCE)
    table.put(alone_oracle(bench, work, hugging_face), [hugging_face, compiled, base])
    table.ratio(f"{key}_plain_vs_paper_batch1", plain, paper)
    table.ratio(f"{key}_speculative_vs_paper_batch1", adaptive, paper)
    table.ratio(f"{key}_speculative_vs_base", adaptive, base)
    table.ratio(f"{key}_proxy_tax", base, plain)
    floor = next(line.floor_percent for line in table.report.lines if line.name == "plain")
    if floor is not None:
        table.report.ratios[f"{key}_floor_share"] = floor / 100
    return table.report


def shared_pair(lab: Lab) -> Report:
    """Expert = antiexpert + LoRA on one set of weights."""
    size, table, key = lab.size, Table(lab, "shared_pair"), prefix(lab.size.trio)
    apart, together = lora_benches(size.trio, lab.device, lab.dtype, 1, _tokens(lab))
    for bench in (apart, together):
        lab.note(bench)
    work = _one_by_one(lab, vocabulary(apart))
    ours = Ours(together, work)
    truth = ours.run().tokens
    timed = lab.race(
        [
            PaperLoop(apart, work).contender("paper's loop, batch 1"),
            Ours(apart, work).contender("plain, two models"),
            ours.contender("plain, shared pair"),
            ours.with_synthetic_acceptance(ACCEPTANCE, truth).contender(
                "speculative, adaptive k, shared pair"
            ),
            HuggingFace(apart, work).contender("Hugging Face generate, base alone"),
            Ours(together, work, "base").contender("base alone"),
        ]
    )
    paper, two, one, speculative, hugging_face, base = timed
    oracle = proxy_oracle(apart, work, paper)
    table.put(oracle, [paper, two, one], plain=two)
    table.put(oracle, [speculative], plain=two, synthetic_acceptance=ACCEPTANCE)
    table.put(alone_oracle(apart, work, hugging_face), [hugging_face, base])
    table.ratio(f"{key}_shared_pair_vs_two_models", one, two)
    table.ratio(f"{key}_shared_proxy_tax", base, one)
    table.ratio(f"{key}_shared_speculative_vs_base", speculative, base)
    return table.report


def mixed(lab: Lab) -> Report:
    """Many requests at once, lengths drawn uniformly: against the paper's loop one by one and at its best
    batch."""
    size, table, key = lab.size, Table(lab, "mixed"), prefix(lab.size.trio)
    count, low, high = size.mixed_trio
    pool = ROWS * (SHORT[1] + high + 16)
    bench = lab.note(random_bench(size.trio, lab.device, lab.dtype, ROWS, pool))
    prompts, lengths = random_contexts(count, *SHORT, vocabulary(bench)), uniform(count, low, high)
    work = workload(f"random prompts, uniform {low}..{high}", prompts, lengths)
    ours = Ours(bench, work, max_rows=ROWS, decoder=bench.decoder("proxy"))
    truth = ours.run().tokens
    rivals = [
        ours.contender("continuous batching, plain"),
        ours.with_synthetic_acceptance(ACCEPTANCE, truth).contender("continuous batching, adaptive k"),
    ]
    found = lab.best_batch(bench, work, rivals)
    plain, adaptive = found.rivals
    oracle = proxy_oracle(bench, work, found.best)
    table.put(oracle, [*found.losing, found.best, plain], plain=plain)
    table.put(oracle, [adaptive], plain=plain, synthetic_acceptance=ACCEPTANCE)
    few = Workload("the first of them, one by one", work.items[:4], one_by_one=True)
    [single] = lab.race([PaperLoop(bench, few).contender("paper's loop, batch 1")])
    table.put(proxy_oracle(bench, few, single), [single])
    table.report.add(batching_alone(lab, "mixed", bench, work, ROWS))
    table.ratio(f"{key}_mixed_vs_paper_best_batch", adaptive, found.best)
    table.ratio(f"{key}_mixed_plain_vs_paper_best_batch", plain, found.best)
    table.ratio(f"{key}_mixed_vs_paper_batch1", adaptive, single)
    return table.report


def synthetic_acceptance(lab: Lab) -> Report:
    """Adaptive speculation against plain decoding at every acceptance and batch size."""
    size, most = lab.size, max(lab.size.acceptance_batches)
    pool = most * (SHORT[1] + size.acceptance_tokens + 16)
    bench = lab.note(random_bench(size.trio, lab.device, lab.dtype, most, pool))
    key = prefix(lab.size.trio)
    names = f"{key}_adaptive_vs_plain_worst", f"{key}_plain_vs_plain_worst"
    return acceptance_table(lab, bench, names, bench.decoder("proxy"))


def table12(lab: Lab) -> Report:
    """The paper's Table 12 on random weights, where the base alone stands for the tuned model."""
    most = max(prompt + output for prompt, output in lab.size.table12)
    bench = lab.note(random_bench(lab.size.trio, lab.device, lab.dtype, 1, most + 64))
    return table12_of(lab, bench, "base")


def _one_by_one(lab: Lab, ids: int) -> Workload:
    prompts = random_contexts(lab.size.trio_prompts, *PROMPT, ids)
    return workload("random prompts", prompts, [lab.size.trio_tokens] * len(prompts), one_by_one=True)


def _tokens(lab: Lab) -> int:
    """Tokens that a pool needs at batch 1, with room for drafts."""
    return PROMPT[1] + lab.size.trio_tokens + 64


def cases(shape: str) -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Name -> the case, and the ratios that it gives for a shape."""
    key = prefix(shape)

    def keys(*names: str) -> tuple[str, ...]:
        return tuple(f"{key}_{name}" for name in names)

    return {
        "batch1": (
            batch1,
            keys(
                "plain_vs_paper_batch1",
                "speculative_vs_paper_batch1",
                "speculative_vs_base",
                "proxy_tax",
                "floor_share",
            ),
        ),
        "shared_pair": (
            shared_pair,
            keys("shared_pair_vs_two_models", "shared_proxy_tax", "shared_speculative_vs_base"),
        ),
        "mixed": (
            mixed,
            keys("mixed_vs_paper_best_batch", "mixed_plain_vs_paper_best_batch", "mixed_vs_paper_batch1"),
        ),
        "trained_batch1": (lambda lab: trained_batch1(lab, TRAINED), (TRAINED,)),
        "table12": (table12, ()),
        "dial": (synthetic_acceptance, keys("adaptive_vs_plain_worst", "plain_vs_plain_worst")),
    }
