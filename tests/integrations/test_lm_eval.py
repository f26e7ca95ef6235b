"""Our model of lm-eval beside lm-eval's own, request by request, figure by figure, on tiny random models."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from proxytune.config import ModelSpec, System
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from tests.support import lm_eval_tasks, tiny
from tests.support.adapters import fresh
from tests.support.require import require_or_skip

try:
    import datasets
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    from proxytune.integrations.lm_eval import ProxyTunedLM
    from proxytune.integrations.lm_eval_requests import ChatContext, ContextReader, sampling_of
    from tests.support import lm_eval_oracle as oracle
except ImportError:
    require_or_skip("lm-eval", "lm-eval is not installed")

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets keeps goes to a temporary folder, and nothing is asked of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A task of each kind. One text and one question are longer than the models' window."""
    folder = tmp_path_factory.mktemp("tasks")
    long = {"question": "An old kettle " * 30, "answer": "7"}
    return {
        "sums": lm_eval_tasks.write(folder, "sums", lm_eval_tasks.GENERATE, [*lm_eval_tasks.sums(5), long]),
        "choose": lm_eval_tasks.write(folder, "choose", lm_eval_tasks.CHOOSE, lm_eval_tasks.choices(8)),
        "read": lm_eval_tasks.write(folder, "read", lm_eval_tasks.READ, lm_eval_tasks.texts(4)),
    }


@pytest.fixture(scope="module")
def usual(trio: System, tasks: dict[str, Path]) -> dict[str, Any]:
    """Our answers with the usual settings."""
    return oracle.evaluated(ProxyTunedLM(trio), list(tasks.values()))


def in_dtype(system: System, dtype: str) -> System:
    """The trio in another dtype."""
    roles = ("base", "expert", "antiexpert")
    return system.model_copy(
        update={role: getattr(system, role).model_copy(update={"dtype": dtype}) for role in roles}
    )


def same(ours: dict[str, Any], theirs: dict[str, Any], tasks: dict[str, Path], dtype: str) -> float:
    """Check that both have the same figures, log-probabilities and responses; -> the largest difference."""
    worst = 0.0
    for task in tasks:
        exact = 0 if task != "read" else 1e-6  # a perplexity is e to the power of a sum
        want = oracle.figures(theirs, task)
        assert want and oracle.figures(ours, task) == pytest.approx(want, rel=exact or 1e-12), task
    for task in ("choose", "read"):
        pairs = list(zip(oracle.logprobs(ours, task), oracle.logprobs(theirs, task), strict=True))
        assert len(pairs) in (32, 4) and all(b < -1 for _, b in pairs)
        worst = max(worst, *(abs(a - b) / max(1.0, abs(b) / 100) for a, b in pairs))
    assert worst < TOLERANCE[dtype]
    assert oracle.greedy(ours, "choose") == oracle.greedy(theirs, "choose")
    assert oracle.answers(ours, "sums") == oracle.answers(theirs, "sums")
    return worst


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *(("alpha 0", dtype) for dtype in TOLERANCE),
        *(("expert = antiexpert", dtype) for dtype in TOLERANCE),
        ("the base alone", "float64"),
    ],
)
@pytest.mark.every(3)
def test_a_shift_of_nothing_is_the_hf_model(
    way: str, dtype: str, trio: System, tasks: dict[str, Path]
) -> None:
    system = in_dtype(trio, dtype)
    if way == "expert = antiexpert":
        ours = ProxyTunedLM(system.model_copy(update={"expert": system.antiexpert}))
    else:
        ours = ProxyTunedLM(system, "base") if way == "the base alone" else ProxyTunedLM(system, alpha=0)
    found = oracle.evaluated(ours, list(tasks.values()), num_fewshot=1)
    same(found, oracle.evaluated(oracle.hf(system), list(tasks.values()), num_fewshot=1), tasks, dtype)


@pytest.mark.parametrize(("alpha", "dtype"), [(1.0, "float64"), (1.0, "float32"), (0.5, "float64")])
@pytest.mark.every(3)
def test_a_shift_is_the_formula_on_whole_sequences(
    alpha: float, dtype: str, trio: System, tasks: dict[str, Path]
) -> None:
    system = in_dtype(trio, dtype)
    paths = list(tasks.values())
    found = oracle.evaluated(ProxyTunedLM(system, alpha=alpha), paths)
    same(found, oracle.evaluated(oracle.CombinedHF(system, alpha), paths), tasks, dtype)
    base = oracle.evaluated(ProxyTunedLM(system, "base"), paths)
    for task in tasks:  # a model that forgot the experts somewhere would give the base's answers there
        together = zip(oracle.answers(found, task), oracle.answers(base, task), strict=True)
        assert all(one != other for one, other in together), task


@pytest.mark.parametrize(
    "decode", [DecodeOptions(speculate=4, kv_memory="2MB"), DecodeOptions(speculate="off", batch=2)]
)
@pytest.mark.every(2)
def test_how_it_is_computed_changes_no_answer(
    decode: DecodeOptions, trio: System, tasks: dict[str, Path], usual: dict[str, Any]
) -> None:
    found = oracle.evaluated(ProxyTunedLM(trio, decode=decode), list(tasks.values()))
    same(found, usual, tasks, "float64")


def ask(kind: str, *arguments: Any, repeats: int = 1) -> list[Instance]:
    """Requests as lm-eval makes them."""
    made = [Instance(kind, {}, own, 0, ("t", place, 1)) for place, own in enumerate(arguments)]
    return [one for one in made for _ in range(repeats)]


PAIRS = (
    ("The sea is", " blue"),
    ("The sea is", " a kettle of water"),
    ("", "Hello there"),
    ("", "<s>Hello"),
    ("Is it? ", "yes"),
    ("First line\n", "second"),
    (" ", "x"),
    ("<s>Once", " upon"),
    ("kettle " * 60, " boils"),
    ("short", " and long" * 20),
)


def test_texts_are_split_as_lm_eval_splits_them(trio: System) -> None:
    """White space between context and continuation, no context, a beginning of sequence, texts that are too
    long."""
    requests = ask("loglikelihood", *PAIRS)
    ours = ProxyTunedLM(trio, alpha=0)
    want = oracle.hf(trio).loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in want], abs=1e-9)
    assert [a for _, a in found] == [b for _, b in want]
    assert ours.get_model_info()["proxytune"]["notes"] == [
        "1 of 10 contexts were cut on the left for the base: models see 256 tokens"
    ]


def test_every_model_reads_a_text_with_its_own_tokenizer() -> None:
    words = [tiny.tokenizer(), tiny.tokenizer(swapped=("a", "b"))]
    models: Any = [
        SimpleNamespace(name=name, tokenizer=own, spec=ModelSpec(model="m"), require_rows=lambda ids: None)
        for name, own in zip(("base", "expert"), words, strict=True)
    ]
    reader = ContextReader(models, "proxy", lambda note: None)
    for _ in range(2):  # the second time from what is known
        found = reader.context("ab")
        assert [own.decode(found[name][1:]) for own, name in zip(words, found, strict=True)] == ["ab", "ab"]
        assert found["base"] != found["expert"]
        contexts, ids = reader.pair("ab", " b")
        assert contexts == found and words[0].decode(ids) == " b"


def test_contexts_that_are_alike_are_computed_once(trio: System) -> None:
    start = "The same long beginning of every one of these contexts, "
    pairs = [(f"{start}{n}", f" {letter}") for letter in "ABCD" for n in range(6)]
    ours = ProxyTunedLM(trio)
    ours.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    stats = ours.decoder.stats  # bytes are tokens, after a beginning of sequence; a context counts once
    assert (stats.prompt_tokens, stats.generated_tokens) == (6 * (1 + len(start) + 1), 24 * 2)
    assert stats.seconds > 0 and ours.get_model_info()["proxytune"]["cost"]["generated_tokens"] == 48
    fed = {name: 0 for name in ours.names}

    def count(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(work: Any) -> Any:
            fed[name] += sum(len(segment.ids) for segment in work.segments)
            return forward(work)

        return counted

    for name, runner in ours.decoder.ensemble.runners.items():
        runner.forward = count(name, runner.forward)  # type: ignore[method-assign]
    ours.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    once = len(start) + 6 + 24 * 2  # bytes are tokens: the beginning, six ends, and two ids a continuation
    assert all(tokens <= once + 6 for tokens in fed.values()), fed


def test_settings_of_responses() -> None:
    asked = {"until": ["\n", ""], "max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    torch.manual_seed(1234)
    found = sampling_of(asked, "</s>")
    assert (found.stop, found.max_new_tokens, found.temperature) == (("\n", "</s>"), 7, 0.5)
    assert (found.top_p, found.seed) == (0.9, 1234)
    greedy = sampling_of({"until": "###", "temperature": 0.7, "do_sample": False, "top_k": 4}, None)
    assert (greedy.stop, greedy.temperature, greedy.max_new_tokens, greedy.top_k) == (("###",), 0, 256, 0)
    with pytest.raises(UserError, match=r"'repetition_penalty' is not supported; supported: do_sample"):
        sampling_of({"repetition_penalty": 1.2}, None)
    with pytest.raises(UserError, match="num_beams=4"):
        sampling_of({"num_beams": 4}, None)
    with pytest.raises(UserError, match="generation settings: top_p: Input should be greater than 0"):
        sampling_of({"do_sample": True, "top_p": 0}, None)


def test_repetitions_of_a_request_differ_and_come_again(trio: System) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "seed": 5}
    requests = ask("generate_until", ("The sea", settings), ("A kettle", settings), repeats=3)
    first, second = (ProxyTunedLM(trio).generate_until(requests) for _ in range(2))
    assert first == second and len(set(first)) == 6


def test_responses_end_before_the_first_stop_string(trio: System) -> None:
    ours = ProxyTunedLM(trio)
    settings: dict[str, Any] = {"until": [], "max_gen_toks": 48}
    [whole] = ours.generate_until(ask("generate_until", ("The sea", settings)))
    new = [at for at in range(2, len(whole)) if whole.find(whole[at]) == at and whole[at] != "\ufffd"]
    settings["until"] = [whole[new[2]], whole[new[1]], "not there"]
    assert ours.generate_until(ask("generate_until", ("The sea", settings))) == [whole[: new[1]]]


def test_a_response_that_leaves_no_room_is_refused(trio: System) -> None:
    with pytest.raises(
        UserError, match=r"256 new tokens leave no room .* in the 256 .* --gen_kwargs max_gen_toks"
    ):
        ProxyTunedLM(trio).generate_until(ask("generate_until", ("The sea", {"until": []})))
    with pytest.raises(UserError, match="no tokens of its own: ''"):
        ProxyTunedLM(trio).loglikelihood(ask("loglikelihood", ("The sea", "")))


def test_a_soft_prompt_takes_its_place_in_the_window(trio: System, tmp_path: Path) -> None:
    """Contexts are cut so that its tokens, which nobody sent, fit too."""
    assert trio.antiexpert is not None
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(fresh(Path(str(trio.antiexpert.model))), config).save_pretrained(tmp_path)
    ours = ProxyTunedLM(trio.model_copy(update={"expert": ModelSpec(adapter=str(tmp_path))}))
    assert (ours.max_length, ProxyTunedLM(trio).max_length) == (251, 256)
    long = "A kettle " * 60
    [(logprob, _)] = ours.loglikelihood(ask("loglikelihood", (long, "x")))
    assert logprob < 0 and ours.loglikelihood_rolling(ask("loglikelihood_rolling", (long,)))[0] < 0
    assert len(ours.generate_until(ask("generate_until", (long, {"until": [], "max_gen_toks": 4})))) == 1


def test_answers_go_into_the_cache_of_lm_eval(trio: System, tmp_path: Path) -> None:
    ours = ProxyTunedLM(trio)
    cached = CachingLM(ours, str(tmp_path / "answers.db"))
    asked = {
        "loglikelihood": ask("loglikelihood", *PAIRS[:4]),
        "loglikelihood_rolling": ask("loglikelihood_rolling", ("A text.",), ("Another one.",)),
        "generate_until": ask("generate_until", ("The sea", {"until": ["\n"], "max_gen_toks": 4})),
    }
    first = {kind: getattr(cached, kind)(requests) for kind, requests in asked.items()}
    again = CachingLM(ProxyTunedLM(trio), str(tmp_path / "answers.db"))
    assert {kind: getattr(again, kind)(requests) for kind, requests in asked.items()} == first
    assert "decoder" not in vars(again.lm)  # nothing was computed, so nothing was loaded
    cached.dbdict.close(), again.dbdict.close()


def test_broken_logits_are_said(trio: System) -> None:
    ours = ProxyTunedLM(trio)
    with torch.no_grad():
        ours.decoder.loaded["expert"].module.get_output_embeddings().weight[5] = float("nan")
    [(logprob, greedy)] = ours.loglikelihood(ask("loglikelihood", ("The sea", " is")))
    assert logprob != logprob and not greedy
    assert "1 of 1 answers have no sound logits" in ours.get_model_info()["proxytune"]["notes"][-1]


# Chat formats

TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> System:
    """A base and an expert, each with a chat template of its own."""
    root = tmp_path_factory.mktemp("chatty")
    templates = {"base": TURNS, "expert": OTHER_TURNS, "antiexpert": None}
    specs = {}
    for seed, (role, template) in enumerate(templates.items()):
        model = tiny.build("llama", seed, max_position_embeddings=1024)
        folder = tiny.save(root / role, model, tiny.tokenizer(chat_template=template))
        specs[role] = tiny.spec(folder, "tokenizer" if template else "none")
    return System(name="chatty", **specs)


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it red?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Is it blue?"},
]


def test_every_model_gets_the_conversation_in_its_own_format(chatty: System) -> None:
    ours = ProxyTunedLM(chatty)
    context = ours.apply_chat_template(HISTORY)
    assert context.startswith("<s><system>Be brief.</system>\n<user>Is it red?</user>")
    seen = {name: ours.tokenizer.decode(ids) for name, ids in ours._reader.context(context).items()}
    assert seen == {
        "base": context,
        "expert": "<s>SYSTEM: Be brief.\nUSER: Is it red?\nASSISTANT: Yes.\nUSER: Is it blue?\nASSISTANT:",
        "antiexpert": "<s>Be brief.\n\nIs it red? Yes.\n\nIs it blue?",
    }
    again = pickle.loads(pickle.dumps(context))  # as lm-eval's cache of requests keeps it
    assert again == context and again.conversation == context.conversation
    begun = ours.apply_chat_template(
        [*HISTORY, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    seen = {name: ours.tokenizer.decode(ids) for name, ids in ours._reader.context(begun).items()}
    assert seen["expert"].endswith("USER: Is it blue?\nASSISTANT:It is")
    assert seen["antiexpert"].endswith("Is it blue? It is")
    llama2 = ProxyTunedLM(chatty.model_copy(update={"base": _with(chatty.base, "llama2")}), "base")
    assert llama2.apply_chat_template(HISTORY) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it red? [/INST] Yes. </s><s>[INST] Is it blue? [/INST]"
    )


def _with(spec: ModelSpec, chat: str) -> ModelSpec:
    return spec.model_copy(update={"chat": chat})


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.every(2)
def test_a_chat_model_is_the_hf_model_with_its_template(
    multiturn: bool, chatty: System, tasks: dict[str, Path]
) -> None:
    given = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": multiturn,
        "num_fewshot": 2,
        "system_instruction": "Be brief.",
    }
    chosen = {name: tasks[name] for name in ("sums", "choose")}
    found = oracle.evaluated(ProxyTunedLM(chatty, alpha=0), list(chosen.values()), **given)
    want = oracle.evaluated(oracle.hf(chatty), list(chosen.values()), **given)
    for task in chosen:
        assert oracle.figures(found, task) == oracle.figures(want, task)
        assert [s["arguments"] for s in found["samples"][task]] == [
            s["arguments"] for s in want["samples"][task]
        ]
    assert oracle.answers(found, "sums") == oracle.answers(want, "sums")
    assert oracle.logprobs(found, "choose") == pytest.approx(oracle.logprobs(want, "choose"), abs=1e-9)


def test_a_plain_model_sees_of_a_conversation_what_lm_eval_shows_without_a_template(
    chatty: System, tasks: dict[str, Path]
) -> None:
    seen: dict[bool, set[tuple[int, ...]]] = {}
    for template in (True, False):
        ours = ProxyTunedLM(chatty)
        found = oracle.evaluated(ours, [tasks["sums"]], num_fewshot=2, apply_chat_template=template,
                                 fewshot_as_multiturn=template)  # fmt: skip
        contexts = [sample["arguments"][0][0] for sample in found["samples"]["sums"]]
        assert all(isinstance(context, ChatContext) == template for context in contexts)
        seen[template] = {ours._reader.context(context)["antiexpert"] for context in contexts}
    assert len(seen[True]) == 6 and seen[True] == seen[False]


def test_chat_formats_are_told_apart_and_stored(chatty: System, trio: System) -> None:
    ours = ProxyTunedLM(chatty)
    plain = ProxyTunedLM(chatty.model_copy(update={"expert": _with(chatty.expert, "none")}))  # type: ignore[arg-type]
    assert ours.tokenizer_name != plain.tokenizer_name and "/" not in ours.tokenizer_name
    assert ours.chat_template(True) == f"base: {TURNS}\nexpert: {OTHER_TURNS}\nantiexpert: none"
    with pytest.raises(UserError, match="give the option without a value"):
        ours.chat_template("tool_use")
    with pytest.raises(UserError, match="no model of system 'trio' has a chat format"):
        ProxyTunedLM(trio).apply_chat_template(HISTORY)


def test_plain_texts_for_a_chat_model_are_said(chatty: System) -> None:
    ours = ProxyTunedLM(chatty, "expert")
    ours.loglikelihood(ask("loglikelihood", ("The sea", " is")))
    [note] = ours.get_model_info()["proxytune"]["notes"]
    assert note.startswith("the expert (chat: tokenizer) got plain texts") and "--apply_chat_template" in note


# What is wrong is said before anything is loaded


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"pretrained": "demoo"}, "Unknown system 'demoo'. Did you mean: demo"),
        ({"pretrained": "demo", "role": "expret"}, "Unknown role 'expret'. Did you mean: expert"),
        ({"pretrained": "demo", "alpha": 11.0}, "alpha = 11 is out of range"),
        ({"pretrained": "demo", "alpha": -1.0}, "alpha = -1 is negative"),
        ({"pretrained": "demo", "speculate": "maybe"}, "speculate: give 'auto', 'off' or a length"),
        ({"pretrained": "demo", "dtype": "float16"}, "unknown key 'dtype'. Known: batch"),
        ({"pretrained": "demo", "max_length": 0}, "max_length: Input should be greater than or equal to 2"),
        ({"pretrained": "demo", "vocab": "loose"}, "vocab 'loose' must be strict or intersect"),
        ({"role": "base"}, "model_args: pretrained: Field required"),
    ],
)
def test_wrong_model_arguments_are_one_line(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=r"(?s)^[^\n]*$") as caught:
        ProxyTunedLM.create_from_arg_obj(given, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    assert reason in str(caught.value)


def test_model_arguments_as_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Models, "check", lambda self, names: None)
    more = {"batch_size": "auto", "max_batch_size": 16}
    made = ProxyTunedLM.create_from_arg_string("system=demo,role=base,alpha=first:16,speculate=off", more)
    assert (made.system.name, made.role, made.alpha.text) == ("demo", "base", "first:16")
    assert made.options == DecodeOptions(batch=16, speculate="off")
