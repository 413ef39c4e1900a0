"""lm-evaluation-harness runs its tasks on this package's models, and gets what direct calls compute."""

import dataclasses
import json
import logging
import sys
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from harness_tasks import write_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import simple_parse_args_string
from tiny_decoder import MODEL, TAILED, params, vary
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.calibration import calibrate
from hshare_jax.evaluation import lm_eval_model
from hshare_jax.evaluation.likelihood import log_likelihoods
from hshare_jax.evaluation.lm_eval_model import HShareLM, main
from hshare_jax.generate import generate
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.plan_files import save_channels, save_plan
from hshare_jax.models.pretrained import Model, save_model
from hshare_jax.sampling_params import SamplingParams

SHALLOW = dataclasses.replace(MODEL, num_layers=2, windows=(None,) * 2)
TOKENIZER = byte_tokenizer(LETTERS)
TOKENIZER.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = len(TOKENIZER) - 1
TINY = Model(SHALLOW, params(SHALLOW), TOKENIZER, (END,), "some/tiny", "0" * 16)
# The model arguments of a command line, and the method that they mean.
ARGUMENTS = (
    "num_sinks=2,num_critical=6,num_recent=4,num_probes=4,label_channels=3,sharing_ratio=3/4-2/3-1/3,label_bits=8,"
    "dilate=false,lists_per=query_head,budget_ratio=1/2,min_length=0,"
    "dense_layers=1,tail_rank=0"
)
METHOD = vary(TAILED, label_bits=8, dilate=False, lists_per="query_head", budget_ratio=Fraction(1, 2))
TASKS = {
    "tiny_answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "tiny_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["in", "the end", "an inn."]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "tiny_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
DOCUMENTS = [
    {"question": "there", "answer": "in"},
    {"question": "the rain in spain stays mainly in the plain.", "answer": "an inn"},
    {"question": "in the end, an inn. ", "answer": "the end"},
]


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def encode(text) -> list[int]:
    return TOKENIZER(text)["input_ids"]  # pyright: ignore[reportReturnType]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with three tasks; nothing is read from elsewhere."""
    write_tasks(tmp_path, TASKS, DOCUMENTS, monkeypatch)
    return tmp_path / "tasks"


def test_tasks_of_each_kind_get_what_direct_calls_compute(tasks):
    model = HShareLM(TINY, method="dense", batch_size=3)
    results: Any = simple_evaluate(
        model, tasks=[*TASKS], task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )
    samples = results["samples"]
    questions = [document["question"] for document in DOCUMENTS]

    answers = generate(TINY, questions, max_new_tokens=8, method=None, stop=["\n"])
    assert [sample["resps"][0][0] for sample in samples["tiny_answers"]] == answers.texts

    for question, sample in zip(questions, samples["tiny_choices"], strict=True):
        context = encode(question.rstrip())
        pairs = [(context, encode(question + choice)[len(context) :]) for choice in (" in", " the end", " an inn.")]
        expected = log_likelihoods(TINY, pairs, method=None, batch_size=3)
        for (found,), (total, is_greedy) in zip(sample["resps"], expected, strict=True):
            assert found == (pytest.approx(total, abs=1e-3), is_greedy)

    pairs = [([END], encode(question)) for question in questions]
    totals = [total for total, _ in log_likelihoods(TINY, pairs, method=None, batch_size=3)]
    assert [sample["resps"][0][0] for sample in samples["tiny_texts"]] == pytest.approx(totals, abs=1e-3)
    assert results["results"]["tiny_texts"]["bits_per_byte,none"] > 0


def test_the_command_line_knows_the_model(tasks, tmp_path, monkeypatch, capsys):
    save_model(TINY, tmp_path / "tiny")
    arguments = ["--model_args", f"pretrained={tmp_path / 'tiny'},{ARGUMENTS}", "--include_path", str(tasks)]
    arguments += ["--tasks", "tiny_answers", "--limit", "1", "--apply_chat_template", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model", "hshare_jax", *arguments])
    main()
    assert "|tiny_answers|" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["method"] == repr(METHOD)
    assert found["config"]["model_dtype"] == "float32"
    assert found["chat_template"] == TOKENIZER.chat_template


def test_model_arguments_are_the_settings_by_name():
    assert get_model("hshare_jax") is HShareLM
    parsed = simple_parse_args_string(ARGUMENTS)
    made = HShareLM(TINY, **parsed, batch_size="4", device="cuda:0", max_batch_size=8)
    assert (made.method, made.batch_size, made.max_length) == (METHOD, 4, SHALLOW.max_positions)
    defaults = HShareLM(TINY)
    assert defaults.method == HShare().with_settings({"min_length": 0})  # methods are compared at equal reads
    assert HShareLM(TINY, method="dense").method is None
    paper = HShareLM(TINY, preset="hshare-paper", num_probes="all", label_bits="none", budget_ratio=0.125, num_sinks=0)
    assert paper.method == vary(HShare.paper(), label_bits=None, budget_ratio=Fraction(1, 8), num_sinks=0)
    search = HShareLM(TINY, plan_kind="published", plan_scope="batch", num_probes=7).method
    assert search == vary(HShare(), plan_kind="published", plan_scope="batch", num_probes=7, min_length=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"critical": 4}, r"unknown model arguments critical; there are pretrained, method, .*num_critical"),
        ({"method": "quest2"}, "method=quest2 must be one of 'hshare', 'dense'"),
        ({"preset": "paper"}, "preset=paper must be hshare-paper"),
        ({"method": "dense", "num_sinks": 0}, "num_sinks is for sparse decoding; leave it or method=dense out"),
        ({"method": "dense", "sharing_ratio": "1-1-1"}, "sharing_ratio is for sparse decoding"),
        ({"method": "h2o", "sharing_ratio": "1-1-1"}, "sharing_ratio is for method=hshare; leave it or method=h2o out"),
        ({"method": "quest", "label_bits": 8}, "label_bits is for method=hshare"),
        ({"sharing_ratio": "1-1-1", "refresh_interval": 2}, "sharing_ratio=1-1-1 sets refresh_interval too"),
        ({"sharing_ratio": 0.5}, "sharing_ratio=0.5 must be three fractions"),
        ({"num_sinks": "few"}, "num_sinks=few must be at least 0"),
        ({"layer_ratio": "1/0"}, "layer_ratio=1/0 must be a Fraction"),
        ({"head_ratio": "1/2", "plan_kind": "anchors"}, "head_ratio=1/2 must be 1 with plan_kind=anchors"),
        ({"plan": "units"}, "unknown model arguments plan; there are .*plan_kind"),
        ({"dilate": "perhaps"}, "dilate=perhaps must be true or false"),
        ({"batch_size": "auto"}, "batch_size=auto must be at least 1"),
        ({"max_length": 2000}, "max_length=2000 must be at most the model's 1024 positions"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"tensor_parallel_size": "99"}, "tensor_parallel_size=99 must be at most the .* that jax finds"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_model_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HShareLM(TINY, **arguments)


def test_calibrated_files_take_the_place_of_what_prompts_are_read_for(tmp_path):
    text = "the rain in spain stays mainly in the plain, or so it is said. " * 4
    found = calibrate(TINY, [text], method=TAILED)
    plan, channels = str(tmp_path / "plan.json"), str(tmp_path / "channels.json")
    save_plan(plan, found.plan, TINY, TAILED)
    save_channels(channels, found.channels, TINY)
    names = ("num_sinks", "num_critical", "num_recent", "label_channels", "min_length", "dense_layers", "tail_rank")
    arguments: dict[str, Any] = {name: getattr(TAILED.settings, name) for name in names} | {"num_probes": 4}
    made = HShareLM(TINY, plan_file=plan, channels_file=channels, **arguments, sharing_ratio="3/4-2/3-1/3")
    known = dataclasses.replace(TAILED, plan=found.plan, channels=found.channels)
    assert made.method == known
    # The files are named; the thousands of numbers in them are not repeated.
    expected = {"plan_file": plan, "channels_file": channels, "method": repr(TAILED)}
    assert made.get_model_info().items() >= expected.items()
    requests = [(TOKENIZER.encode(text[:90]), TOKENIZER.encode(text[90:120]))]
    given = made._loglikelihood_tokens([(None, *request) for request in requests])
    assert given == log_likelihoods(TINY, requests, method=known, batch_size=1)
    assert given != log_likelihoods(TINY, requests, method=TAILED, batch_size=1)
    answer = made.generate_until([Instance("generate_until", {}, (text[:90], {"until": [], "max_gen_toks": 12}), 0)])
    assert answer == generate(TINY, [requests[0][0]], max_new_tokens=12, method=known).texts
    both = HShareLM(TINY, method="double_sparsity", channels_file=channels, label_channels=3).method
    assert isinstance(both, HShare)
    assert both.channels == known.channels
    with pytest.raises(
        ValueError, match=r"layer_ratio=1/8 has no effect: .*plan.json says which .* found with layer_ratio=3/4: leave"
    ):
        HShareLM(TINY, plan_file=plan, **arguments, sharing_ratio="1/8-2/3-1/3")
    with pytest.raises(ValueError, match=r"channels_file=.*channels.json has no effect: scoring=exact reads keys"):
        HShareLM(TINY, channels_file=channels, scoring="exact", label_channels=None)
    with pytest.raises(ValueError, match="plan_file is for method=hshare; leave it or method=h2o out"):
        HShareLM(TINY, plan_file=plan, method="h2o")


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="has no tokenizer"):
        HShareLM(dataclasses.replace(TINY, tokenizer=None))


def test_answers_come_in_the_order_of_the_requests_whatever_their_settings():
    prompts = ["there", "the rain in spain stays mainly in the plain.", "in", ""]
    kinds = [{"until": "in", "max_gen_toks": 8}, {"until": ["", "x"], "max_new_tokens": 8, "num_beams": 1, "top_p": 0}]
    asked = [(prompt, kinds[index % 2]) for index, prompt in enumerate(prompts)]
    found = HShareLM(TINY, method="dense", batch_size=2).generate_until(requests("generate_until", *asked))
    for first, stop in enumerate(("in", "x")):
        ids = [encode(prompt) or [END] for prompt in prompts[first::2]]
        assert generate(TINY, ids, max_new_tokens=8, method=None, stop=[stop]).texts == found[first::2]


def test_repeats_are_sampled_differently_and_not_by_their_batch():
    asked = requests("generate_until", *[("there", {"temperature": 2.0, "top_k": 20.0, "max_gen_toks": 8})] * 4)
    found = HShareLM(TINY, method="dense", batch_size=2).generate_until(asked)
    assert len(set(found)) == 4
    sampling = SamplingParams(temperature=2.0, top_k=20)
    assert found == generate(TINY, ["there"] * 4, max_new_tokens=8, method=None, sampling=sampling).texts


def test_contexts_too_short_for_a_plan_are_told(caplog):
    budget: dict[str, Any] = {"num_sinks": 2, "num_critical": 6, "num_recent": 4, "min_length": 0}
    model = HShareLM(TINY, batch_size=2, sharing_ratio="3/4-2/3-1/3", **budget)
    long = "the rain in spain stays mainly in the plain."
    asked = requests("loglikelihood", (long, " in"), ("in", " the end"), ("in", long))
    with caplog.at_level(logging.WARNING, logger=lm_eval_model.__name__):
        model.loglikelihood(asked)
    assert caplog.messages == [
        "1 of 3 texts are no longer than the 12 tokens that a head reads: every method decodes them as dense decoding "
        "does; choose fewer critical or recent tokens",
        "1 of 3 texts have fewer than the 18 tokens before decoding that a plan and tails are found from: hshare "
        "shares nothing across layers and heads there, and loses what it does not read; give a plan and channels made "
        "beforehand, by hshare-jax calibrate",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=lm_eval_model.__name__):
        HShareLM(TINY, method="h2o", batch_size=2, **{**budget, "min_length": None}).loglikelihood(asked)
    assert not caplog.messages


def test_every_score_is_cached_as_soon_as_it_is_known():
    model, kept = HShareLM(TINY, method="dense", batch_size=1, max_length=20), []
    model.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))  # pyright: ignore
    pairs, texts = [("there", " in"), ("in", " the end")], ["the rain in spain stays mainly in the plain.", "in"]
    scores = model.loglikelihood(requests("loglikelihood", *pairs))
    totals = model.loglikelihood_rolling(requests("loglikelihood_rolling", *[(text,) for text in texts]))
    assert {entry[:2]: entry[2] for entry in kept} == {
        **{("loglikelihood", pair): score for pair, score in zip(pairs, scores, strict=True)},
        **{("loglikelihood_rolling", (text,)): total for text, total in zip(texts, totals, strict=True)},
    }
    assert len(kept) == 4


def test_prompts_lose_their_beginning_where_they_leave_no_room(caplog):
    model = HShareLM(TINY, method="dense", batch_size=3, max_length=20)
    long = "the rain in spain stays mainly in the plain."
    asked = requests("generate_until", *[(prompt, {"until": [], "max_gen_toks": 8}) for prompt in (long, "in", long)])
    with caplog.at_level(logging.WARNING, logger=lm_eval_model.__name__):
        found = model.generate_until(asked)
    assert caplog.messages == [
        "2 of 3 prompts were cut from the left: with their output they are longer than max_length=20"
    ]
    assert found[0] == generate(TINY, [encode(long)[-12:]], max_new_tokens=8, method=None).texts[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=lm_eval_model.__name__):
        scores = model.loglikelihood(requests("loglikelihood", (long, " in"), ("in", " the end")))
    assert len(caplog.messages) == 1
    ids = encode(long + " in")
    num_context = len(encode(long))
    expected = log_likelihoods(
        TINY, [(ids[len(ids) - 21 : num_context], ids[num_context:])], method=None, batch_size=1
    )  # fmt: skip
    assert scores[0][0] == pytest.approx(expected[0][0], abs=1e-3)
    with pytest.raises(ValueError, match="max_gen_toks=20 must be less than max_length=20"):
        model.generate_until(requests("generate_until", ("in", {"max_gen_toks": 20})))


@pytest.mark.parametrize("gen_kwargs", [{"num_beams": 4}, {"typical_p": 0.5}])
def test_sampling_that_does_not_exist_is_refused(gen_kwargs):
    with pytest.raises(
        ValueError, match=rf"unknown generation_kwargs {next(iter(gen_kwargs))}; for sampling there are"
    ):
        HShareLM(TINY).generate_until(requests("generate_until", ("in", gen_kwargs)))


def test_contexts_end_where_their_text_does():
    # Spaces go to the continuation; nothing before a text is the token that ends one; a blank context is none.
    model = HShareLM(TINY, method="dense", batch_size=3)
    found = model.loglikelihood(requests("loglikelihood", ("the ", "end"), ("", "the end"), (" ", "the end")))
    pairs = [(encode("the"), encode(" end")), ([END], encode("the end")), ([END], encode(" the end"))]
    expected = log_likelihoods(TINY, pairs, method=None, batch_size=3)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)


def test_a_rolling_likelihood_predicts_every_token_once():
    text = "the rain in spain stays mainly in the plain."
    ids = encode(text)
    windows = [([END], ids[:16]), (ids[15:16], ids[16:32]), (ids[len(ids) - 17 : 32], ids[32:])]
    assert 32 < len(ids) < 48
    expected = sum(total for total, _ in log_likelihoods(TINY, windows, method=None, batch_size=3))
    model = HShareLM(TINY, method="dense", batch_size=3, max_length=16)
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)))
    assert found == [pytest.approx(expected, abs=1e-3), 0]


def test_chats_go_through_the_template_of_the_tokenizer():
    model = HShareLM(TINY)
    chat = [{"role": "user", "content": "in"}]
    assert model.apply_chat_template(chat) == "user: in\nassistant: "
    begun = [*chat, {"role": "assistant", "content": "the"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "user: in\nassistant: the"
    assert model.chat_template(True) == TOKENIZER.chat_template
    assert model.tokenizer_name == "some__tiny"


def test_special_tokens_are_not_added_twice():
    class Beginning:
        """A tokenizer that begins texts with a token."""

        bos_token_id, eos_token_id = 7, None

        def decode(self, ids):
            return "<s>" if ids == [7] else ""

        def __call__(self, text, add_special_tokens):
            return {"input_ids": ([7] if add_special_tokens else []) + [len(text)]}

    model = HShareLM(TINY)
    model.tokenizer = Beginning()  # pyright: ignore[reportAttributeAccessIssue]
    assert (model.prefix_token_id, model.eot_token_id) == (7, END)
    assert model.tok_encode("in") == [7, 2]
    assert model.tok_encode("<s>in") == [5]
    assert model.tok_encode("in", add_special_tokens=False) == [2]
