"""lm_eval's requests on a tiny model, against its logits; and whole tasks from local files."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.models import random_model
from tests.runs import tiny
from v4train.config import load
from v4train.data import train_tokenizer
from v4train.errors import ConfigError
from v4train.evaluation.harness import HarnessModel, check_tasks, run_tasks
from v4train.evaluation.scores import scorer
from v4train.model import model_config

MAX_LENGTH = 24
TEXT = "def recall(key, value):\n    return the value of a key\n" * 5


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> HarnessModel:
    config = load(tiny(tmp_path_factory.mktemp("model"), "run"))
    model = random_model(model_config(config.model), seed=4).eval()
    return HarnessModel(model, train_tokenizer([TEXT], 300), scorer(model, "cpu"), MAX_LENGTH, batch_size=3)


def request(*arguments):
    return SimpleNamespace(args=arguments)


def log_likelihood(asked: HarnessModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One at a time, from all logits."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = asked.model(ids[:, :-1]).logits[0, len(context) - 1 :].double()
    chosen = torch.tensor(continuation)
    values = logits.log_softmax(-1).gather(-1, chosen[:, None]).sum()
    return values.item(), bool((logits.argmax(-1) == chosen).all())


def test_likelihoods_of_continuations(asked):
    text, bos = asked.text, asked.text.bos_id
    pairs = [
        ("def recall", "(key"),
        ("", "value"),
        ("return the value of ", "a key"),
        ("a", " long continuation of it"),
    ]
    found = asked.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        begin = [bos, *text.encode(context.rstrip()).tolist()]
        whole = [bos, *text.encode(context + continuation).tolist()]
        expected, likeliest = log_likelihood(asked, begin, whole[len(begin) :])
        assert value == pytest.approx(expected, abs=1e-4) and greedy == likeliest


def test_greedy_continuations_are_known_as_such(asked):
    context = asked.tok_encode("def")
    with torch.no_grad():
        following = asked.model(torch.tensor([context])).logits[0, -1]
    best, second = following.topk(2).indices.tolist()
    requests = [(None, context, [best]), (None, context, [second])]
    assert [greedy for _, greedy in asked._loglikelihood_tokens(requests)] == [True, False]


def test_a_long_context_loses_its_beginning(asked):
    ids = asked.tok_encode(TEXT)
    ((value, _),) = asked._loglikelihood_tokens([(None, ids[:60], ids[60:65])])
    expected, _ = log_likelihood(asked, ids[65 - MAX_LENGTH - 1 : 60], ids[60:65])
    assert value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="sequence_length=24: a continuation of a task has 25 tokens"):
        asked._loglikelihood_tokens([(None, [0], ids[:25])])


def test_the_likelihood_of_a_whole_text_is_that_of_its_windows(asked):
    ids = asked.text.encode(TEXT).tolist()
    whole = len(ids) // MAX_LENGTH * MAX_LENGTH
    assert whole >= 2 * MAX_LENGTH and len(ids) > whole
    expected = log_likelihood(asked, [asked.text.bos_id], ids[:MAX_LENGTH])[0]
    for first in range(MAX_LENGTH, whole, MAX_LENGTH):
        expected += log_likelihood(asked, ids[first - 1 : first], ids[first : first + MAX_LENGTH])[0]
    # The last window is as long as the others, and scores the rest
    expected += log_likelihood(asked, ids[-MAX_LENGTH - 1 : whole], ids[whole:])[0]
    found = asked.loglikelihood_rolling([request(TEXT), request("")], disable_tqdm=True)
    assert found[1] == 0.0 and found[0] == pytest.approx(expected, rel=1e-5)


def greedy_text(asked: HarnessModel, ids: list[int], new: int) -> str:
    written = []
    for _ in range(new):
        with torch.no_grad():
            logits = asked.model(torch.tensor([[*ids, *written]])).logits[0, -1, : asked.text.vocab_size]
        written.append(int(logits.argmax()))
        if written[-1] == asked.text.eos_id:
            break
    return asked.text.decode(written)


def test_generation_is_greedy_and_stops(asked):
    whole = greedy_text(asked, asked.tok_encode("def "), 8)
    assert len(whole) > 2
    (found,) = asked.generate_until([request("def ", {"until": [], "max_gen_toks": 8})])
    assert found == whole
    end = whole[2]
    (found,) = asked.generate_until([request("def ", {"until": [end, "\udfff"], "max_gen_toks": 8})])
    assert found == whole[: whole.index(end)]


@pytest.fixture
def tasks(tmp_path):
    """A folder of two task files and their questions: the right choice is the second, then the first."""
    questions = [
        {"question": "def", "choices": [" value", " recall"], "answer": 1},
        {"question": "a key", "choices": ["\n", " of"], "answer": 0},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: text\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    return tmp_path, questions


@pytest.mark.filterwarnings("ignore")
def test_tasks_from_local_files(asked, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks[0] / "cache"))
    folder, questions = tasks
    found = run_tasks(asked, ["choose", "text"], str(folder), None, None)
    right, nats, size = 0, 0.0, 0
    for question in questions:
        begin = asked.tok_encode(question["question"])
        values = []
        for choice in question["choices"]:
            whole = asked.tok_encode(question["question"] + choice)
            values.append(log_likelihood(asked, begin, whole[len(begin) :])[0])
        right += values.index(max(values)) == question["answer"]
        ids = asked.text.encode(question["question"]).tolist()
        nats -= log_likelihood(asked, [asked.text.bos_id], ids)[0]
        size += len(question["question"].encode())
    assert found["choose"]["acc"] == right / 2
    assert found["text"]["bits_per_byte"] == pytest.approx(nats / size / torch.tensor(2.0).log().item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("there", "instead", "says"),
    [("{{question}}", "{{answer.nothing.more}}", "UndefinedError"), (".jsonl", ".lost", "FileNotFoundError")],
)
def test_a_task_that_cannot_be_asked_is_refused_in_one_line(tasks, there, instead, says, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks[0] / "cache"))
    check_tasks(["choose", "text"], str(tasks[0]), None)
    file = tasks[0] / "choose.yaml"
    file.write_text(file.read_text().replace(there, instead))
    with pytest.raises(ConfigError, match=f"^tasks=choose: lm_eval can't ask them .*{says}") as error:
        check_tasks(["choose"], str(tasks[0]), None)
    assert len(str(error.value).splitlines()) == 1


def test_a_task_that_wants_text_is_refused_where_nothing_generates(tasks, monkeypatch):
    """Behind one whose likelihoods lm_eval wants first, too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks[0] / "cache"))
    text = (tasks[0] / "text.yaml").read_text()
    kept = [line for line in text.splitlines() if line.startswith(("dataset_", "test_split"))]
    own = ["task: write", *kept, "output_type: generate_until", "doc_to_text: 'a'", "doc_to_target: 'b'"]
    (tasks[0] / "write.yaml").write_text("\n".join([*own, "metric_list: [{metric: exact_match}]"]))
    check_tasks(["choose", "write"], str(tasks[0]), None)
    check_tasks(["choose", "text"], str(tasks[0]), None, generates=False)
    with pytest.raises(ConfigError, match="^evaluation.tasks=choose,write: one of them wants text to be generated"):
        check_tasks(["choose", "write"], str(tasks[0]), None, generates=False, key="evaluation.tasks")


def test_unknown_tasks_are_refused(asked, tasks):
    with pytest.raises(ConfigError, match="^tasks=nope: no task file under .* has that name; there are choose, text"):
        run_tasks(asked, ["choose", "nope"], str(tasks[0]), None, None)
