"""Our model in lm-evaluation-harness, and the harness' own model beside it. Nothing here asks the network."""

import functools
import json
import math
import re

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.data.sources.base import Document
from rwkv_train.errors import BackendError, ConfigError, DataError
from rwkv_train.evaluation import harness_tasks
from rwkv_train.evaluation.harness import RwkvTrainLM
from rwkv_train.evaluation.harness_tasks import evaluate_tasks, format_results
from rwkv_train.evaluation.perplexity import evaluate_documents
from rwkv_train.evaluation.prefix import Prefix
from rwkv_train.generation.generate import generate
from rwkv_train.generation.sampling import SamplingSettings
from rwkv_train.models.registry import build_model

TEXTS = [
    "It was a bright cold day in April,\n\tand the clocks  were striking thirteen. ",
    "Grüße! 🦢 \u2003 x",
    "x" * 300 + " and so on",
]
CHOICES = [
    {"question": "What is the colour of the sky?", "choices": ["blue", "a lion", "none"], "answer": 0},
    {"question": "Two and two are", "choices": ["four", "five!", "six"], "answer": 2},
]
QUESTION = "Q: {{question}}\nA:"
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is ", "blue"),
    ("", "Nothing before"),
    ("  ", "only spaces before"),
    ("long " * 40, "end"),
    ("x", ""),
]
ONE_VERSION = pytest.mark.parametrize("model", ["rwkv7"], indirect=True)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a task that is given as a dictionary, on documents that are given as dictionaries."""
    # Both take seconds: the index of all the harness' own tasks, and its look at the machine.
    monkeypatch.setattr(harness_tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    def run(lm, documents, **task):
        (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
        files = {"data_files": {"test": str(tmp_path / "documents.jsonl")}, "cache_dir": str(tmp_path)}
        config = {"task": "mine", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "mine.yaml").write_text(json.dumps(config | task))  # JSON is YAML
        return evaluate_tasks(lm, ["mine"], include_path=tmp_path / "tasks")

    return run


def rolling(run, lm):
    names = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    metrics = [{"metric": name, "aggregation": how} for name, how in names.items()]
    found = run(
        lm,
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics,
    )["results"]["mine"]
    return {name: found[f"{name},none"] for name in names}


def requests(kind, arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def naive_log_p(model, before, target):
    """One token after the other, each after everything before it."""
    total, is_greedy = 0.0, True
    for token in target:
        with torch.no_grad():
            logits = model(torch.tensor([before])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, dim=0)[token])
        is_greedy &= int(logits.argmax()) == token
        before = [*before, token]
    return total, is_greedy


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token(model, tokenizer, run):
    empty_head = build_model(model.config, wkv_backend="reference")
    found = rolling(run, RwkvTrainLM(empty_head, tokenizer))

    n_bytes, n_words = (
        sum(map(count, TEXTS)) for count in (lambda t: len(t.encode()), lambda t: len(re.split(r"\s+", t)))
    )
    assert found["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)  # a token is a byte
    assert found["byte_perplexity"] == pytest.approx(257, rel=1e-5)
    assert math.log(found["word_perplexity"]) == pytest.approx(math.log(257) * n_bytes / n_words, rel=1e-6)


def test_the_harness_finds_what_eval_ppl_finds(model, tokenizer, run):
    found = rolling(run, RwkvTrainLM(model, tokenizer, batch_size=2, chunk_len=50))

    ours = evaluate_documents(model, tokenizer, [Document(text, "d") for text in TEXTS]).total
    assert found["bits_per_byte"] == pytest.approx(ours.bits_per_byte, rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(ours.byte_ppl, rel=1e-5)
    assert math.log(found["word_perplexity"]) == pytest.approx(ours.nats / ours.words, rel=1e-6)


@pytest.mark.parametrize(
    ("prefix", "before", "alone"),
    [
        (Prefix.END_OF_DOCUMENT, [0], [0]),
        (Prefix.NEWLINE, [1 + ord("\n")], [1 + ord("\n")]),
        (Prefix.NONE, [], [0]),
    ],
    ids=str,
)
def test_likelihoods_are_those_of_reading_token_after_token(model, tokenizer, prefix, before, alone):
    lm = RwkvTrainLM(model, tokenizer, prefix=prefix, batch_size=4, chunk_len=16)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)

    for (context, target), (log_p, is_greedy) in zip(PAIRS, found, strict=True):
        # Spaces at the end of a context belong to what is scored.
        n_kept = len(context.rstrip())
        start = (before if n_kept else alone) + tokenizer.encode(context[:n_kept])
        expected = naive_log_p(model, start, tokenizer.encode(context[n_kept:] + target))
        assert log_p == pytest.approx(expected[0], rel=1e-5)
        assert is_greedy == expected[1]


@ONE_VERSION
def test_a_continuation_that_greedy_decoding_gives_is_greedy(model, tokenizer):
    with torch.no_grad():  # it writes letters only, so that a token is a character
        model.ln_out.bias[0] = 10
        model.head.weight[:, 0] = -10
        model.head.weight[1 + ord("a") : 1 + ord("z") + 1, 0] = 10
    text = "".join(generate(model, tokenizer, "ab", SamplingSettings(temperature=0.0), max_tokens=5, seed=0))
    pairs = [("ab", text), ("ab", text[:-1] + "~")]
    found = RwkvTrainLM(model, tokenizer).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


@ONE_VERSION
def test_where_a_token_reaches_across_the_boundary_the_continuation_counts_by_itself(model):
    class Pairs:
        """Two characters are a token, and so is one that is left over."""

        end_of_document = 0

        def encode(self, text):
            return [sum(map(ord, text[i : i + 2])) % 250 + 1 for i in range(0, len(text), 2)]

    tokenizer = Pairs()
    found = RwkvTrainLM(model, tokenizer).loglikelihood(
        requests("loglikelihood", [("abc", "d"), ("abc", "def")]), disable_tqdm=True
    )
    context = [0, *tokenizer.encode("abc")]
    assert len(tokenizer.encode("abcd")) == 2, "as many as the context has alone"
    assert found[0][0] == pytest.approx(naive_log_p(model, context, tokenizer.encode("d"))[0], rel=1e-5)
    assert found[1][0] == pytest.approx(naive_log_p(model, context, tokenizer.encode("ef"))[0], rel=1e-5)


@ONE_VERSION
def test_the_choice_of_a_task_is_the_likeliest_one(model, tokenizer, run):
    found = run(
        RwkvTrainLM(model, tokenizer),
        CHOICES,
        output_type="multiple_choice",
        doc_to_text=QUESTION,
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    right = right_for_its_length = 0
    for document in CHOICES:
        context = [0, *tokenizer.encode(f"Q: {document['question']}\nA:")]
        log_p = [
            naive_log_p(model, context, tokenizer.encode(" " + choice))[0] for choice in document["choices"]
        ]
        for_its_length = [p / len(choice) for p, choice in zip(log_p, document["choices"], strict=True)]
        right += log_p.index(max(log_p)) == document["answer"]
        right_for_its_length += for_its_length.index(max(for_its_length)) == document["answer"]
    assert found["results"]["mine"]["acc,none"] == right / 2
    assert found["results"]["mine"]["acc_norm,none"] == right_for_its_length / 2
    assert "|mine " in format_results(found)


@ONE_VERSION
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_text_is_that_of_generating_alone(model, tokenizer, batch_size):
    model = model.double()
    contexts = ["To be", "", "Grüße " * 30, "x"]
    found = RwkvTrainLM(model, tokenizer, batch_size=batch_size).generate_until(
        requests("generate_until", [(context, {"until": ["e"], "max_gen_toks": 12}) for context in contexts]),
        disable_tqdm=True,
    )
    expected = [
        "".join(
            generate(model, tokenizer, c, SamplingSettings(temperature=0), max_tokens=12, seed=0, stop=["e"])
        )
        for c in contexts
    ]
    assert found == expected


@ONE_VERSION
def test_repeats_of_a_drawn_text_differ_and_come_again(model, tokenizer):
    asked = requests("generate_until", [("x", {"do_sample": True, "until": [], "max_gen_toks": 20})] * 3)
    texts = RwkvTrainLM(model, tokenizer).generate_until(asked, disable_tqdm=True)
    assert len(set(texts)) == 3
    assert RwkvTrainLM(model, tokenizer, batch_size=2).generate_until(asked, disable_tqdm=True) == texts


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    weights = Weights(model.config, model.state_dict(), tokenizer.identity, step=None)
    return str(write_weights(tmp_path / "model", weights, "safetensors"))


@ONE_VERSION
def test_the_harness_loads_a_checkpoint_by_name(model, tokenizer, folder):
    lm = get_model("rwkv-train").create_from_arg_string(
        f"pretrained={folder},prefix=newline,chunk_len=64", {"batch_size": "4", "device": "cpu"}
    )
    same = RwkvTrainLM(model, tokenizer, prefix=Prefix.NEWLINE)
    asked = requests("loglikelihood", [("a", "b")])
    assert lm.loglikelihood(asked, disable_tqdm=True)[0][0] == pytest.approx(
        same.loglikelihood(asked, disable_tqdm=True)[0][0], rel=1e-5
    )
    assert lm.get_model_info()["prefix"] == "newline"
    assert lm.tokenizer_name.startswith("bytes-")


def test_what_the_arguments_say_goes_before_the_options_of_the_harness():
    with pytest.raises(BackendError, match="there is no device 'cuda:98'"):
        RwkvTrainLM.create_from_arg_string("pretrained=x,device=cuda:98", {"device": "cpu"})


@pytest.mark.parametrize("model", ["rwkv4"], indirect=True)  # the version that transformers has
def test_the_harness_finds_the_same_with_the_same_weights_in_transformers(model, tokenizer, tmp_path):
    pytest.importorskip("accelerate", reason="the harness' model `hf` needs accelerate")
    weights = Weights(model.config, model.state_dict(), tokenizer.identity, step=None)
    path = write_weights(tmp_path / "hf", weights, "hf")
    # One text at a time: beside a longer one it would begin with padding, which this model reads.
    theirs = get_model("hf")(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)
    ours = RwkvTrainLM(model, tokenizer, prefix=Prefix.NONE)

    pairs = requests("loglikelihood", [pair for pair in PAIRS if pair[1] and pair[0] != "  "])
    for (expected, is_greedy), found in zip(
        theirs.loglikelihood(pairs, disable_tqdm=True), ours.loglikelihood(pairs), strict=True
    ):
        assert found == (pytest.approx(expected, rel=1e-5), is_greedy)
    texts = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)
    prompts = requests("generate_until", [(text, {"until": ["e"], "max_gen_toks": 8}) for text in TEXTS])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tokenizer=bytes", "needs the argument 'pretrained'"),
        ("pretrained=x,max_length=5", "has no argument 'max_length'"),
        ("pretrained=x,prefix=bos", "prefix is 'bos'; it must be one of end-of-document, newline, none"),
        ("pretrained=x,dtype=auto", "dtype is 'auto'; it must be one of fp32"),
        ("pretrained=x,batch_size=auto", "batch_size is 'auto'; it must be a whole number"),
    ],
)
def test_arguments_that_mean_nothing_here_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RwkvTrainLM.create_from_arg_string(arguments)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="there is no device 'cuda:99' here; give --device cpu or auto"):
        RwkvTrainLM.create_from_arg_string("pretrained=x", {"device": "cuda:99"})


@ONE_VERSION
def test_a_task_that_is_not_there_is_refused_with_its_likely_name(model, tokenizer, run, tmp_path):
    lm = RwkvTrainLM(model, tokenizer)
    rolling(run, lm)
    with pytest.raises(ConfigError, match=r"has no task 'mien'; did you mean 'mine'\?"):
        evaluate_tasks(lm, ["mien"], include_path=tmp_path / "tasks")
    with pytest.raises(ConfigError, match="there is no folder"):
        evaluate_tasks(lm, ["mine"], include_path=tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"there is no file missing\.yaml"):
        evaluate_tasks(lm, ["missing.yaml"])


@ONE_VERSION
def test_a_task_of_the_user_that_is_wrong_gets_a_sentence(model, tokenizer, run, tmp_path):
    lm = RwkvTrainLM(model, tokenizer)
    task = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{nothing}}"}
    with pytest.raises(
        ConfigError, match="the YAML of a task of mine cannot be used: 'nothing' is undefined"
    ):
        run(lm, [{"text": "x"}], metric_list=[{"metric": "bits_per_byte"}], **task)
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(DataError, match=r"the data of a task of mine is not here.*documents\.jsonl"):
        evaluate_tasks(lm, ["mine"], include_path=tmp_path / "tasks")
    (tmp_path / "broken.yaml").write_text("task: [x")
    with pytest.raises(
        ConfigError, match=r"the YAML of a task of .*broken\.yaml cannot be used: while parsing"
    ):
        evaluate_tasks(lm, [str(tmp_path / "broken.yaml")])


@ONE_VERSION
@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ({"doc_to_txt": "x"}, "unexpected keyword argument 'doc_to_txt'"),
        ({"test_split": "tset"}, "KeyError: 'tset'"),
        ({"metric_list": [{"metric": "accuraci"}]}, "KeyError"),
        ({"metric_list": [{"metric": "acc", "aggregation": "meen"}]}, "the metric acc has an aggregation"),
        ({"output_type": "multiple"}, "invalid output_type 'multiple'"),
        ("just text", "Expected YAML dict"),
    ],
    ids=str,
)
def test_a_task_that_the_harness_cannot_build_gets_a_sentence(
    model, tokenizer, run, tmp_path, mistake, reason
):
    task = {"output_type": "multiple_choice", "doc_to_text": QUESTION, "metric_list": [{"metric": "acc"}]}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    lm = RwkvTrainLM(model, tokenizer)
    if isinstance(mistake, dict):
        with pytest.raises(ConfigError, match=f"cannot build the task mine: .*{reason}"):
            run(lm, CHOICES, **task | mistake)
        return
    (tmp_path / "text.yaml").write_text(mistake)
    with pytest.raises(ConfigError, match=rf"cannot build the task .*text\.yaml: .*{reason}"):
        evaluate_tasks(lm, [str(tmp_path / "text.yaml")])


@ONE_VERSION
def test_groups_keep_their_rows_and_no_task_comes_twice(model, tokenizer, run, tmp_path):
    lm = RwkvTrainLM(model, tokenizer)
    rolling(run, lm)
    group = {"task": ["mine"], "aggregate_metric_list": [{"metric": "bits_per_byte", "weight_by_size": True}]}
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"group": name} | group))
    found = evaluate_tasks(lm, ["one"], include_path=tmp_path / "tasks")
    expected = found["results"]["mine"]["bits_per_byte,none"]
    assert found["groups"]["one"]["bits_per_byte,none"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="Duplicate task 'mine'"):
        evaluate_tasks(lm, ["one", "two"], include_path=tmp_path / "tasks")


@ONE_VERSION
@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), ModuleNotFoundError("No module named 'x'")], ids=str
)
def test_a_task_whose_data_or_package_is_missing_gets_a_sentence(model, tokenizer, run, error, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        DataError if isinstance(error, OSError) else ConfigError, match=f"a task of mine.*{error}"
    ):
        rolling(run, RwkvTrainLM(model, tokenizer))
