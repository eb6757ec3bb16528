"""Rewards: what each says on answers made by hand, how they are summed, and what is refused, where, and when."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.data import Prompt
from jaxft.errors import CheckpointError, RewardError
from jaxft.models.names import variables
from jaxft.models.sharing import with_head
from jaxft.rewards import Answers, ExactAnswer, Length, Regex, Term, make_reward, read_rewards
from jaxft.rewards.named import normal


def answers(*completions, **columns):
    return Answers([f"q{i}" for i in range(len(completions))], list(completions), columns)


def rows(*columns):
    return [Prompt(np.array([1]), "q", one, f"rows.jsonl:{n}") for n, one in enumerate(columns, 1)]


def refused(terms, *, error=RewardError, **options):
    with pytest.raises(error) as raised:
        make_reward(terms, **options)
    return str(raised.value)


# what the named ones say


def test_length():
    """The shorter over the longer: hand-worked at 0, a quarter, the target, and twice the target."""
    texts = answers("", "one", "a  b\nc d", "a b c d e f g h")
    assert Length(4)(texts) == [0.0, 0.25, 1.0, 0.5]
    assert Length(4, "characters")(answers("ab", "abcdefgh", "a b ")) == [0.5, 0.5, 1.0]
    counted = Answers(["a"] * 2, ["x", "y"], lengths=np.array([3, 12]))
    assert Length(6, "tokens")(counted) == [0.5, 0.5]
    with pytest.raises(RewardError, match="do not say how many tokens"):
        Length(6, "tokens")(answers("a"))


def test_regex():
    texts = answers("<b>1</b>", "none", "", "11x1")
    assert Regex(r"\d")(texts) == [1.0, 0.0, 0.0, 1.0]
    assert Regex(r"\d", share=True)(texts) == [1 / 8, 0.0, 0.0, 0.75]
    assert Regex("(?i)NONE")(texts) == [0.0, 1.0, 0.0, 0.0]


RIGHT = [
    ("#### 72", "so it is\n#### 72", 1),
    ("#### 72", "#### 72 ", 1),
    ("#### 72", "#### 72.00", 1),
    ("#### 72", "#### 7\nno, wait\n#### 72", 1),  # the last one counts
    ("#### 72", "#### 71 and not 72", 0),
    ("#### 72", "it is 72.", 1),  # no mark: the last number
    ("#### 72", "it is 72, or 73", 0),
    ("#### 72", "I do not know", 0),
    ("#### 72", "", 0),
    ("#### 1,200", "it makes $1200", 1),
    ("#### -5", "it is -5", 1),
    ("#### 5", "that is 10-5", 1),  # a minus between numbers is none of the number's
    ("#### 0.5", "it is 0.5", 1),
    (72, "it is 72", 1),
    (72.0, "#### 72", 1),
    ("Paris.", "#### Paris", 1),
    ("Paris", "#### paris", 0),
    ("Paris", "Paris", 0),  # no mark and no number: nothing is said to be the answer
]


@pytest.mark.parametrize(("known", "text", "right"), RIGHT)
def test_exact_answer(known, text, right):
    assert ExactAnswer()(answers(text, answer=[known])) == [right]


def test_exact_answer_as_it_is_asked_for():
    assert ExactAnswer(last_number=False)(answers("it is 72", answer=[72])) == [0.0]
    assert ExactAnswer(pattern=r"\\boxed{(.*?)}", column="gold")(answers(r"\boxed{x} 3", gold=["x"])) == [1.0]
    assert ExactAnswer(pattern="yes|no")(answers("no ... yes", answer=["yes"])) == [1.0]  # without a group, all of it
    with pytest.raises(RewardError, match=r"row 2 \('q1'\): answer: the answer to compare with is expected, it is nul"):
        ExactAnswer()(answers("1", "2", answer=["1", None]))


def test_numbers_are_compared_as_numbers():
    assert normal("1,200") == normal("$1200.0") == normal(" 1200. ") != normal("1200.5")
    assert (normal("12 apples"), normal("1.2.3")) == ("12 apples", "1.2.3")


# several, weighted


def test_several_are_weighted_and_summed():
    """By hand: 2 x length - 0.5 x function."""

    def vowels(completions, prompts):
        assert prompts == ["q0", "q1"]
        return np.array([sum(letter in "aeiou" for letter in text) for text in completions])

    reward = make_reward([Term("length", 2.0, {"target": 2}), SimpleNamespace(reward=vowels, weight=-0.5, options={})])
    each = reward.each(answers("a i", "b"))
    assert {name: scores.tolist() for name, scores in each.items()} == {"length": [1.0, 0.5], "vowels": [2.0, 0.0]}
    total = reward(answers("a i", "b"))
    assert total.tolist() == [1.0, 1.0] and total.dtype == np.float32
    assert reward.total(each).tolist() == total.tolist()


def test_terms_of_one_name_are_told_apart():
    reward = make_reward([Term("regex", options={"pattern": p}) for p in "abc"])
    assert list(reward.each(answers("ab"))) == ["regex", "regex_2", "regex_3"]


# functions


FILE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Held:
    n: int

def short(prompts, completions, limit=3, **columns):
    return [float(len(text) < limit) + sum(map(len, columns.values())) for text in completions]

def by_column(completions, prompts, level):
    return [float(x) for x in level]

def fussy(prompts, completions):
    if any("bad" in text for text in completions):
        raise KeyError("no such word")
    return [1.0] * len(completions)

def together(prompts, completions):
    if len(completions) > 1:
        raise ValueError("too many")
    return [1.0]

async def later(prompts, completions):
    return []

def alone(completions):
    return []

def by_position(prompts, completions, /):
    return []

number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return "mine.py"


def test_a_function_of_a_file(file):
    assert make_reward(f"{file}:short")(answers("ab", "abc", x=[1, 2], y=[3, 4])).tolist() == [5.0, 4.0]
    assert make_reward(Term(f"{file}:short", options={"limit": 4}))(answers("abc")).tolist() == [1.0]
    assert make_reward(f"{file}:by_column")(answers("a", "b", level=[2, 5], more=[0, 0])).tolist() == [2.0, 5.0]


def test_a_file_is_read_anew_and_leaves_nothing_behind(file, tmp_path):
    assert make_reward(f"{file}:short")(answers("ab")).tolist() == [1.0]
    (tmp_path / "mine.py").write_text(FILE.replace("float(len", "5 + (len"))
    assert make_reward(f"{file}:short")(answers("ab")).tolist() == [6.0]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


def test_a_function_that_raises_is_named_with_its_row(file):
    given = Answers(["q" * 100, "w" * 100], ["fine", "bad"], places=["rows.jsonl:7", "rows.jsonl:9"])
    with pytest.raises(RewardError) as raised:
        make_reward(f"{file}:fussy")(given)
    said = str(raised.value)
    assert said.startswith("reward 'fussy': rows.jsonl:9 ('" + "w" * 80 + "...'): it raised KeyError: 'no such word'")
    line = FILE.splitlines().index('        raise KeyError("no such word")') + 1
    assert said.endswith(f"(mine.py:{line})")
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(RewardError, match=r"2 answers, from rows.jsonl:7 .* on: it raised ValueError: too many"):
        make_reward(f"{file}:together")(given)


CAME = [
    ([1.0, float("nan")], r"row 2 \('q1'\): it gave 'nan', and one finite number is expected"),
    ([float("-inf"), None], r"row 1 \('q0'\): it gave '-inf', and one finite .* \(and 1 more\)"),
    ([None, 1], "row 1 .* it gave 'None'"),
    ([1.0, 1e300], r"row 2 .* it gave '1e\+300'"),  # infinite in float32
    ([1.0, "1"], "row 2 .* it gave '1'"),
    ([1.0, [2.0]], "row 2 .* it gave '.2.0.'"),
    ([1.0], "it gave 1 numbers for 2 answers"),
    ([], "it gave 0 numbers for 2 answers"),
    (1.0, "it gave no list of numbers, but float: 1.0 for 2 answers"),
    (None, "it gave no list of numbers, but NoneType"),
    ("ab", "it gave no list of numbers, but str"),
    ({0: 1.0, 1: 1.0}, "it gave no list of numbers, but dict"),
    (np.ones((2, 1)), r"it gave no list of numbers, but ndarray of shape \(2, 1\)"),
]


@pytest.mark.parametrize(("came", "what"), CAME)
def test_what_came_is_looked_at(came, what):
    def mine(prompts, completions):
        return came

    with pytest.raises(RewardError, match=rf"reward 'mine': {what}"):
        make_reward(mine)(answers("a", "b"))


@pytest.mark.parametrize("came", [(1, 2.5), np.array([1, 2.5]), [np.float32(1), np.array(2.5)], [True, 2.5]])
def test_numbers_of_any_kind_are_taken(came):
    def mine(prompts, completions):
        return came

    assert make_reward(mine)(answers("a", "b")).tolist() == [1.0, 2.5]


# what is refused before anything is trained


WRONG = [
    ("exact", "'exact': no reward of this name, no file.py:function, and no folder; nearest: 'exact_answer'"),
    ("length", "'length': the option 'target' is missing"),
    (Term("length", options={"target": 0}), "'length': target=0: give a whole number of at least 1"),
    (Term("length", options={"target": 2.5}), "'length': target=2.5: give a whole"),
    (Term("length", options={"target": 2, "unit": "word"}), "'length': unit='word': nearest: 'words'"),
    (Term("length", options={"target": 2, "units": "words"}), "'length': it has no option 'units'; nearest: 'unit'"),
    (Term("regex", options={"pattern": "("}), "'regex': pattern='(': not a regular expression"),
    (Term("regex", options={"pattern": 3}), "'regex': pattern=3: not a regular expression"),
    (Term("regex", options={"pattern": "a", "share": 1}), "'regex': share=1: give true or false"),
    (Term("exact_answer", options={"column": 1}), "'exact_answer': column=1: give the name of a column"),
    (Term("exact_answer", options={"last_number": "no"}), "'exact_answer': last_number='no': give true or false"),
    (Term("regex", float("nan"), {"pattern": "a"}), "'regex': weight nan: give a finite number"),
    ([], "no reward was given"),
    (3, "3 is no reward: give a name"),
    ("mine.py", "'mine.py': give the function too: file.py:function"),
    ("mine.py:", "'mine.py:': give the function too"),
    ("not.py:short", "'not.py:short': not.py: no such file (paths are relative to the working directory)"),
    ("mine.py:shrt", "'mine.py:shrt': mine.py: there is no 'shrt' in it; nearest: 'short'"),
    ("mine.py:number", "'mine.py:number': mine.py: number is a int, no function"),
    ("mine.py:later", "'mine.py:later': it is an async function"),
    ("mine.py:alone", "'mine.py:alone': it does not take prompts: it is called as f(prompts, completions, **columns)"),
    ("mine.py:by_position", "it takes prompts by position alone"),
    (Term("mine.py:fussy", options={"limit": 1}), "'mine.py:fussy': it has no option 'limit'; there are: 'completions"),
    (Term("mine.py:short", options={"prompts": 1}), "the option 'prompts' is what the function gets of the answers"),
]


@pytest.mark.parametrize(("terms", "what"), WRONG)
def test_what_is_wrong_is_said_before_training(file, terms, what):
    assert what in refused(terms)


def test_everything_that_is_wrong_is_said_at_once(file):
    said = refused(["exact", Term("length", options={"target": 0, "a": 1}), "mine.py:shrt", "mine.py:alone"])
    assert said.splitlines()[0] == "rewards that cannot be had" and len(said.splitlines()) == 5


def test_a_file_that_cannot_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, what in (
        ("x = 1\nimport not_there\n", "bad.py:2: the file cannot be run (ModuleNotFoundError: No module named"),
        ("def f(:\n", "bad.py:1: the file cannot be run (SyntaxError"),
        ("raise SystemExit(3)", "bad.py:1: the file cannot be run (SystemExit: 3)"),
    ):
        (tmp_path / "bad.py").write_text(text)
        assert what in refused("bad.py:f")


def test_rows_that_cannot_be_scored(file):
    data = rows({"answer": "#### 1"}, {"answer": None}, {"other": 2}, {"answer": " "})
    said = refused("exact_answer", rows=data)
    assert "rows.jsonl:2: answer: the answer to compare with is expected, it is null" in said
    assert "rows.jsonl:3: answer: the answer to compare with is expected, the row has no such column; it has 'o" in said
    assert "rows.jsonl:4: answer: the answer to compare with is empty" in said and "jsonl:1" not in said
    said = refused("mine.py:by_column", rows=rows({"answer": 1}))
    assert "it takes level, which is no column of the rows (they have 'answer' beside prompt) and no option" in said
    assert make_reward(Term("mine.py:by_column", options={"level": [4]}), rows=rows({}))(answers("a")).tolist() == [4]
    said = refused(Term("mine.py:short", options={"answer": 1}), rows=rows({"answer": 1}))
    assert "the option 'answer' is what the function gets" in said


def test_answers_fit_each_other():
    with pytest.raises(RewardError) as raised:
        Answers(["a"], ["b", "c"], {"x": [1, 2]}, input_ids=np.zeros((3, 2)))
    assert all(part in str(raised.value) for part in ("completions has 2", "columns['x'] has 2", "input_ids has 3"))


# models


CONFIG = """task: reward
model: {path: %s}
method: {name: lora, r: 2}
data: {train: rows.jsonl, format: preference}
output: %s
"""
IDS = np.array([[0, 0, 5, 6, 7, 0], [8, 9, 10, 11, 1, 0]], np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]], np.int32)
SCORED = Answers(["a", "b"], ["c", "d"], input_ids=IDS, attention_mask=MASK)


def save_run(where, name, base):
    """Write the folder of a finished run of a reward model over `base`, by LoRA and a head."""
    model = with_head(jaxft.load(where / "base")[0], ("score",))
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2, target_modules="all-linear"), optax.sgd(1.0), seed=3)
    state = state.replace(trainable=jax.tree.map(lambda x: x + 0.01, state.trainable))  # an adapter that does something
    jaxft.save_adapter(state, where / name / "adapter")
    (where / name / "config.yaml").write_text(CONFIG % (where / base, where / name))
    (where / name / "summary.json").write_text("{}")
    return state.model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a reward run over it, and folders of classifiers of all kinds."""
    where = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    model = jaxft.testing.tiny_llama(vocab_size=300)
    jaxft.save_model(model, where / "base", tokenizer)
    jaxft.save_model(model, where / "same", tokenizer)
    jaxft.save_model(with_head(model, ("score",)), where / "scorer", tokenizer)
    jaxft.save_model(with_head(model, ("a", "b")), where / "two", tokenizer)
    jaxft.save_model(with_head(model, ("score",)), where / "bare")
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    jaxft.save_model(with_head(model, ("score",)), where / "other", other)
    bert = jaxft.testing.tiny_bert(vocab_size=300)
    jaxft.save_model(bert, where / "bert", tokenizer)
    config = json.loads((where / "bert" / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    (where / "bert" / "config.json").write_text(json.dumps(config))
    save_run(where, "reward", "base")
    save_run(where, "elsewhere", "same")
    save_run(where, "open", "base")
    (where / "open" / "summary.json").unlink()
    return where


def arrays(model):
    return {path: x.get_value() for path, x in variables(model).items()}


def test_a_model_scores_at_the_last_token(place, tokenizer):
    """As the classifier does on the row alone, without any padding."""
    reward = make_reward(str(place / "scorer"), tokenizer=tokenizer)
    scores = reward(SCORED)
    model, _ = jaxft.load(place / "scorer")
    alone = [float(model(IDS[i : i + 1, a:b])[0, 0]) for i, a, b in ((0, 2, 5), (1, 0, 5))]
    assert scores.tolist() == pytest.approx(alone, abs=1e-6) and scores[0] != scores[1]
    assert list(reward.each(SCORED)) == ["scorer"]


def test_a_run_over_the_base_of_the_policy_shares_its_arrays(place, tokenizer):
    base, _ = jaxft.load(place / "base")
    reward = make_reward(str(place / "reward"), tokenizer=tokenizer, base=base, base_folder=place / "base")
    ours, theirs = arrays(base), arrays(reward.parts[0].scorer.model)
    shared = [path for path in ours if path in theirs and path.startswith("model.")]
    assert len(shared) > 8 and all(theirs[path] is ours[path] for path in shared)
    apart = make_reward(str(place / "reward"), tokenizer=tokenizer)
    assert reward(SCORED).tolist() == apart(SCORED).tolist()
    assert abs(reward(SCORED)).min() > 1e-4  # head and adapter are there


def test_a_run_over_another_base_is_loaded_by_itself(place, tokenizer):
    base, _ = jaxft.load(place / "base")
    reward = make_reward(str(place / "elsewhere"), tokenizer=tokenizer, base=base, base_folder=place / "base")
    ours, theirs = arrays(base), arrays(reward.parts[0].scorer.model)
    assert not any(theirs[path] is ours[path] for path in ours if path in theirs)


def test_a_run_over_the_base_in_other_bits_is_loaded_by_itself(place, tokenizer):
    """It scores as it was trained, whatever the policy's base is quantised to."""
    base, _ = jaxft.load(place / "base", quantize="nf4")
    reward = make_reward(str(place / "reward"), tokenizer=tokenizer, base=base, base_folder=place / "base")
    ours, theirs = arrays(jaxft.load(place / "reward")[0]), arrays(reward.parts[0].scorer.model)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


def test_a_base_with_adapters_is_refused(place, tokenizer):
    base = jaxft.attach(jaxft.load(place / "base")[0], jaxft.LoRA(r=2), name="policy")
    with pytest.raises(RewardError, match=r"the base carries adapters, \['policy'\]: detach them first"):
        make_reward(str(place / "reward"), tokenizer=tokenizer, base=base, base_folder=place / "base")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base", "its head has no outputs, and a reward is one"),
        ("two", "its head has 2 outputs, and a reward is one"),
        ("bert", "a BertForSequenceClassification is no causal model"),
        ("bare", "holds no tokenizer"),
        ("open", "the run has not finished"),
        ("nothing", "no such folder here"),
    ],
)
def test_a_folder_that_is_no_reward(place, tokenizer, name, what):
    assert what in refused(str(place / name), tokenizer=tokenizer)


def test_another_vocabulary(place, tokenizer):
    said = refused(str(place / "other"), tokenizer=tokenizer)
    assert f"{place / 'other'} has another vocabulary than" in said
    assert f"token {len(tokenizer)} is '<new>' there, nothing in the policy's" in said
    policy = jaxft.load(place / "base")[1]
    assert str(place / "base") in refused(str(place / "other"), tokenizer=policy)


def test_what_a_model_needs(place, tokenizer):
    assert "give make_reward the tokenizer of the policy" in refused(str(place / "scorer"))
    assert "a model takes no options" in refused(Term(str(place / "scorer"), options={"a": 1}), tokenizer=tokenizer)
    reward = make_reward(str(place / "scorer"), tokenizer=tokenizer)
    with pytest.raises(RewardError, match="reward 'scorer': a model reads tokens: give Answers input_ids"):
        reward(answers("a"))
    with pytest.raises(RewardError, match="its model is not loaded"):
        read_rewards(str(place / "scorer"), tokenizer=tokenizer)(SCORED)


def test_more_tokens_than_positions(tmp_path, tokenizer):
    model = jaxft.testing.tiny_gpt2(vocab_size=300, n_positions=4)
    jaxft.save_model(with_head(model, ("score",)), tmp_path / "gpt2", tokenizer)
    with pytest.raises(RewardError, match=r"row 2 \('b'\): 5 tokens, and the model has 4 positions"):
        make_reward(str(tmp_path / "gpt2"), tokenizer=tokenizer)(SCORED)


def test_damaged_weights(place, tokenizer, tmp_path):
    model = with_head(jaxft.testing.tiny_llama(vocab_size=300), ("score",))
    jaxft.save_model(model, tmp_path / "damaged", tokenizer)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    refused(str(tmp_path / "damaged"), tokenizer=tokenizer, error=CheckpointError)
