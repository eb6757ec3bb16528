"""Configs: every fault at once, each with its line and key; nothing is taken silently."""

import re

import pytest

from jaxft import BitFit, LoRA
from jaxft.config import dump_config, load_config
from jaxft.config.tree import parse
from jaxft.errors import ConfigError

GOOD = """task: sft
model: {path: m, dtype: float32}
method: {name: lora, r: 4, alpha: 8, target_modules: [q_proj, v_proj]}
data: {train: rows.jsonl, eval: held.csv, format: instruction, max_length: 96}
optimizer: {name: adamw, learning_rate: 1e-3}
train: {steps: 3, batch_size: 8, seed: 0}
output: runs/a
"""


def write(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_good_one(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config.make_method() == LoRA(r=4, alpha=8, target_modules=("q_proj", "v_proj"))
    assert [(s.path, s.name, s.format, s.weight) for s in config.data.train] == [
        ("rows.jsonl", "rows", "instruction", 1.0)
    ]
    assert config.optimizer.learning_rate == 1e-3
    assert (config.optimizer.schedule, config.optimizer.weight_decay, config.optimizer.warmup_steps) == (
        *("constant", 0.0),
        0,
    )
    assert config.data.packing is False


def test_what_may_be_left_out(tmp_path):
    config = load_config(
        write(tmp_path, "task: sft\nmodel: {path: m}\ndata: {train: a.csv, format: text}\noutput: o\n")
    )
    assert config.make_method() is None
    assert config.train.steps is config.train.epochs is config.data.eval is None


FAULTS = [
    ("seed: 0", "sede: 0", "c.yaml:6: train.sede: unknown key; nearest: 'seed'"),
    ("output: runs/a", "output: runs/a\ntask: sft", "c.yaml:8: task: the key stands twice; the first is c.yaml:1"),
    ("seed: 0", "seed: 0, seed: 1", "c.yaml:6: train.seed: the key stands twice"),
    ("batch_size: 8", "batch_size: many", "c.yaml:6: train.batch_size: a whole number is expected, this is 'many'"),
    ("batch_size: 8", "batch_size: 8.0", "c.yaml:6: train.batch_size: a whole number is expected, this is 8.0"),
    ("batch_size: 8", "batch_size: true", "c.yaml:6: train.batch_size: a whole number is expected, this is True"),
    ("batch_size: 8", "batch_size: 0", "c.yaml:6: train.batch_size: "),
    ("batch_size: 8", "batch_size: 8, accumulate: 3", "c.yaml:6: train.accumulate: batch_size 8 does not divide by 3"),
    ("steps: 3", "steps: 3, epochs: 1", "c.yaml:6: train.epochs: steps and epochs both say"),
    ("seed: 0", "seed: -1", "c.yaml:6: train.seed: "),
    ("r: 4", "r: -4", "c.yaml:3: method.r: r=-4: a rank is a whole number"),
    ("r: 4", "r: four", "c.yaml:3: method.r: a whole number is expected, this is 'four'"),
    ("r: 4", "r: 8.0", "c.yaml:3: method.r: a whole number is expected, this is 8.0"),
    ("r: 4", "use_rslora: no", "c.yaml:3: method.use_rslora: true or false is expected, this is 'no'"),
    ("alpha: 8", "alpha: true", "c.yaml:3: method.alpha: a number is expected, this is True"),
    ("alpha: 8", "dropout: 2", "c.yaml:3: method.dropout: dropout=2: give a rate"),
    ("q_proj, v_proj]", "q_proj, 5]", "c.yaml:3: method.target_modules: text is expected, this is 5"),
    ("[q_proj, v_proj]", "5", "c.yaml:3: method.target_modules: text or a list is expected, this is 5"),
    ("r: 4", "rank: 4", "c.yaml:3: method.rank: lora has no such option; nearest: "),
    ("name: lora", "name: lorra", "c.yaml:3: method.name: unknown method 'lorra'; nearest: 'lora'"),
    ("name: lora", "name: [lora]", "c.yaml:3: method.name: unknown method ['lora']; nearest: 'lora'"),
    ("name: lora, ", "", "c.yaml:3: method.name: name is missing"),
    ("{name: lora, r: 4, alpha: 8, target_modules: [q_proj, v_proj]}", "[]", "c.yaml:3: method: at least one item"),
    ("{name: lora, r: 4, alpha: 8, target_modules: [q_proj, v_proj]}", "lora", "c.yaml:3: method: a mapping of name"),
    ("1e-3", "'1e-3'", "c.yaml:5: optimizer.learning_rate: a number is expected, this is '1e-3' (text: take the"),
    ("1e-3", "-1e-3", "c.yaml:5: optimizer.learning_rate: "),
    ("1e-3", ".nan", "c.yaml:5: optimizer.learning_rate: "),
    ("1e-3", ".inf", "c.yaml:5: optimizer.learning_rate: "),
    ("1e-3", "1e-3, warmup_steps: 3", "c.yaml:5: optimizer.warmup_steps: 3 of 3 steps"),
    ("1e-3", "1e-3, warmup_steps: 010", "c.yaml:5: optimizer.warmup_steps: 010 is 8 to some readers"),
    ("1e-3", "1e-3, warmup_steps: 1_0", "c.yaml:5: optimizer.warmup_steps: 1_0: write the number without _"),
    ("1e-3", "1e-3, warmup_steps: 1_0.5", "c.yaml:5: optimizer.warmup_steps: 1_0.5: write the number without _"),
    ("1e-3", "fast", "c.yaml:5: optimizer.learning_rate: a number is expected, this is 'fast'\n"),
    ("1e-3", "!!float fast", "c.yaml:5: optimizer.learning_rate: 'fast' cannot be read as float"),
    ("1e-3", "!!bool maybe", "c.yaml:5: optimizer.learning_rate: 'maybe' cannot be read as bool"),
    ("1e-3", "1" + "0" * 5000, "c.yaml:5: optimizer.learning_rate: '1000"),
    ("adamw", "adamv", "c.yaml:5: optimizer.name: 'adamv' is not one of adamw, adam"),
    ("adamw", "no", "c.yaml:5: optimizer.name: 'no' is not one of"),
    ("max_length: 96", "packing: on", "c.yaml:4: data.packing: true or false is expected, this is 'on'"),
    ("max_length: 96", "max_length: 12:30", "c.yaml:4: data.max_length: a whole number is expected"),
    ("format: instruction, ", "", "c.yaml:4: data.train.0.format: it is missing, here and as data.format"),
    (
        "train: rows.jsonl, eval: held.csv, format: instruction",
        "train: {path: a, format: null}",
        "c.yaml:4: data.train.0.f",
    ),
    ("format: instruction", "format: instructions", "c.yaml:4: data.format: 'instructions' is not one of"),
    ("train: rows.jsonl, ", "", "c.yaml:4: data.train: it is missing"),
    ("train: rows.jsonl", "train: []", "c.yaml:4: data.train: "),
    ("train: rows.jsonl", "train: [{path: a, wieght: 2}]", "c.yaml:4: data.train.0.wieght: unknown key; nearest: 'w"),
    ("train: rows.jsonl", "train: [{path: a, weight: 0}]", "c.yaml:4: data.train.0.weight: "),
    ("train: rows.jsonl", "train: {path: a, weight: x}", "c.yaml:4: data.train.0.weight: a number is expected"),
    (
        "train: rows.jsonl",
        "train: [a, {path: b, name: c}, {path: d, name: c}]",
        "c.yaml:4: data.train.2.name: two sources",
    ),
    ("train: rows.jsonl", "train: ''", "c.yaml:4: data.train.0.path: "),
    (
        "max_length: 96",
        "template: {prompt_input: '{input}', prompt_no_input: '{instruction}'}",
        "prompt_input: it must hold",
    ),
    (
        "max_length: 96",
        "template: {prompt_input: '{instruction}{input}', prompt_no_input: '{x}{instruction}'}",
        "no_input: it",
    ),
    ("dtype: float32", "dtype: float8", "c.yaml:2: model.dtype: 'float8' is not one of float32"),
    ("model: {path: m, dtype: float32}", "model: m", "c.yaml:2: model: a mapping is expected, this is 'm'"),
    ("task: sft", "task: stf", "c.yaml:1: task: 'stf' is not one of sft"),
    ("output: runs/a", "", "c.yaml:1: output: it is missing"),
    ("output: runs/a", "output: 5", "c.yaml:7: output: text is expected, this is 5"),
    ("output: runs/a", "output: o\ntrackers: [wandb, mlflow]", "c.yaml:8: trackers.1: 'mlflow' is not one of"),
    ("output: runs/a", "output: {{name}}", "c.yaml:7: output: a key is a plain word"),
    ("output: runs/a", "output: !secret a", "c.yaml:7: output: the tag !secret is not known"),
    ("output: runs/a", "output: a\x07", "c.yaml:7: not valid YAML: special characters are not allowed"),
    ("output: runs/a", "output: >\n \n  ", "c.yaml:10: not valid YAML: more indented"),
    ("steps: 3", "<<: {steps: 3}", "c.yaml:6: train: a key is a plain word"),
    ("{steps: 3", "&x {steps: *x", "c.yaml: nested too deeply, or an alias (*) to what it stands in"),
    ("task: sft", "%YAML 1.1\n---\ntask: sft", "c.yaml:1: not YAML 1.2: take the line %YAML 1.1 away"),
    ("task: sft", "task: [", "c.yaml:3: not valid YAML"),
    ("task: sft", "task: *x", "c.yaml:1: not valid YAML"),
]


def test_as_many_faults_as_there_should_be():
    assert len(FAULTS) == len({(old, new) for old, new, _ in FAULTS}) == 67


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_each_fault_is_named(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    assert message in refused(tmp_path, GOOD.replace(old, new)) + "\n"


def test_lines_of_the_long_form(tmp_path):
    data = "data:\n  train:\n    path: a\n    weight: x\n  eval:\n  - path: b\n    wieght: 2\n  format: text\n"
    said = refused(tmp_path, f"task: sft\nmodel:\n  path: m\nmethod:\n- name: lora\n  r: 0\n{data}output: o\n")
    assert [line.split(": ")[:2] for line in said.splitlines()[1:]] == [
        ["  - c.yaml:6", "method.0.r"],
        ["  - c.yaml:10", "data.train.0.weight"],
        ["  - c.yaml:13", "data.eval.0.wieght"],
    ]


@pytest.mark.parametrize("name", ["c.yml", "c.YAML", "c.txt", "c"])
def test_lines_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / name).write_text(GOOD.replace("seed", "sede"), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"/{name}:6: train.sede: unknown key")):
        load_config(tmp_path / name)


@pytest.mark.parametrize("measured", ["exact_match: true", "scores: [bleu]"])
def test_answers_need_rows(tmp_path, measured):
    text = GOOD.replace("eval: held.csv, ", "") + f"evaluation: {{{measured}}}\n"
    assert "c.yaml:8: evaluation: answers are compared on held-out rows: set data.eval" in refused(tmp_path, text)


def test_no_fault_hides_another(tmp_path):
    """What must fit together is checked also where something else is wrong in the same section."""
    text = GOOD.replace("eval: held.csv, ", "").replace("max_length: 96", "max_length: 1, packing: 2")
    text = text.replace("1e-3", "fast, warmup_steps: 5").replace("steps: 3, ", "steps: 3, epochs: 1, accumulate: 3, ")
    said = refused(tmp_path, text.replace("seed: 0", "seed: x") + "evaluation: {exact_match: true, rows: 0}\n")
    assert [line.split(": ")[1] for line in said.splitlines()[1:]] == [
        *("data.max_length", "data.packing"),
        *("optimizer.learning_rate", "optimizer.warmup_steps"),
        *("train.accumulate", "train.epochs", "train.seed"),
        *("evaluation.rows", "evaluation"),
    ]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ("a.jsonl", ["a"]),
        ("{path: a.jsonl, name: null, format: null}", ["a"]),
        ("[a.jsonl, b/a.jsonl, a.csv]", ["a", "a_2", "a_3"]),
        ("[a.jsonl, b/a.jsonl, a_2.jsonl]", ["a", "a_2", "a_2_2"]),
        ("[x.jsonl, {path: b, name: x}]", ["x_2", "x"]),
    ],
)
def test_each_source_has_its_name(tmp_path, sources, names):
    config = load_config(write(tmp_path, GOOD.replace("rows.jsonl", sources)))
    assert [(s.name, s.format) for s in config.data.train] == [(name, "instruction") for name in names]


def test_all_faults_at_once(tmp_path):
    text = GOOD.replace("sft", "stf").replace("path: m", "pth: m").replace("r: 4", "r: 0").replace("96", "1")
    text = text.replace("1e-3", "fast").replace("seed", "sede") + "more: 1\n"
    said = refused(tmp_path, text, ["train.steps=none", "optimizer.beta=1"])
    assert [re.match(r"  - (.+?): ([\w.]+): ", line).groups() for line in said.splitlines()[1:]] == [
        ("--set optimizer.beta", "optimizer.beta"),
        ("--set train.steps", "train.steps"),
        ("c.yaml:1", "task"),
        ("c.yaml:2", "model.path"),
        ("c.yaml:2", "model.pth"),
        ("c.yaml:3", "method.r"),
        ("c.yaml:4", "data.max_length"),
        ("c.yaml:5", "optimizer.learning_rate"),
        ("c.yaml:6", "train.sede"),
        ("c.yaml:8", "more"),
    ]


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "1.e-4", ".0001", "0.0001", "+1e-4", "1e-04", "1.0E-04"])
def test_every_spelling_of_a_small_number(tmp_path, written):
    assert load_config(write(tmp_path, GOOD.replace("1e-3", written))).optimizer.learning_rate == 1e-4
    assert load_config(write(tmp_path, GOOD), [f"optimizer.learning_rate={written}"]).optimizer.learning_rate == 1e-4


def test_set(tmp_path):
    file = write(tmp_path, GOOD)
    config = load_config(file, ["train.steps=7", "method.r=2", "evaluation.exact_match=true", "output=o/p"])
    assert (config.train.steps, config.method[0]["r"]) == (7, 2)
    assert (config.evaluation.exact_match, config.output) == (True, "o/p")
    several = write(tmp_path, GOOD.replace("rows.jsonl", "[{path: a, weight: 1}, b]"))
    config = load_config(several, ["data.train.0.weight=3"])
    assert [s.weight for s in config.data.train] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: give key.sub=value"),
        ("=3", "give key.sub=value"),
        ("train.stesp=3", "--set train.stesp: train.stesp: unknown key; nearest: 'steps'"),
        ("output.name=3", "--set output.name: output is 'runs/a', which has no 'name' in it"),
        ("train.steps=[", "--set train.steps: not valid YAML"),
        ("train.steps=010", "--set train.steps: train.steps: 010 is 8 to some readers"),
        ("train={seed: 1, seed: 2}", "--set train: train.seed: the key stands twice"),
        ("train={sede: 1}", "--set train: train.sede: unknown key; nearest: 'seed'"),
        ("tracker.yaml=1", "--set tracker.yaml: tracker: unknown key; nearest: 'trackers'"),
        ("method.0.r=2", "--set method.0.r: method.0: lora has no such option"),
        ("data.train.0.weight=2", "--set data.train.0.weight: data.train is 'rows.jsonl', which has no 0 in it"),
        ("method.target_modules.2=x", "method.target_modules is a list of 2; give a number below that"),
    ],
)
def test_set_refuses(tmp_path, override, message):
    assert message in refused(tmp_path, GOOD, [override])


def test_a_written_config_reads_back_the_same(tmp_path):
    sources = "[{path: 数据.csv, weight: 2, columns: {instruction: q}}, {path: a/数据.csv}]"
    text = GOOD.replace("rows.jsonl", sources).replace(
        "{name: lora, r: 4, alpha: 8, target_modules: [q_proj, v_proj]}",
        "[{name: lora, rank_pattern: {q_proj: 2}}, {name: bitfit, create: true}]",
    )
    template = '{prompt_input: "{instruction}\\n{input}:\\n", prompt_no_input: "{instruction}"}'
    text = text.replace("max_length: 96", f"template: {template}")
    config = load_config(write(tmp_path, text))
    assert config.make_method() == LoRA(rank_pattern={"q_proj": 2}) | BitFit(create=True)
    assert [s.name for s in config.data.train] == ["数据", "数据_2"]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    plain = load_config(write(tmp_path, GOOD.replace("method:", "#")))
    again.write_text(dump_config(plain), encoding="utf-8")
    assert load_config(again) == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a config is a mapping of keys"),
        (b"# nothing\n", "a config is a mapping of keys"),
        (b"- a\n", "a config is a mapping"),
        (b"a: \xff", "not UTF-8 (byte 3)"),
        (b"a: " + b"[" * 500, "nested too deeply"),
    ],
)
def test_what_is_no_config(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "c.yaml")


def test_what_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)


def test_words_of_yaml_1_1_are_text():
    tree, _, problems = parse("a: [on, off, yes, no, 12:30, 0o10, 0x1F, true, null, '5']", "c.yaml")
    assert tree == {"a": ["on", "off", "yes", "no", "12:30", 8, 31, True, None, "5"]}
    assert not problems


SIMILAR = """task: contrastive
model: {path: m, pooling: mean}
method: {name: lora}
data: {train: pairs.csv, format: scored_pairs, score_range: [0, 5]}
contrastive: {loss: cosent, temperature: 0.05}
output: runs/a
"""
TASK_FAULTS = [
    ("format: scored_pairs", "format: text", "c.yaml:4: data.train.0.format: task contrastive reads pairs, triplets"),
    ("task: contrastive", "task: classify", "c.yaml:4: data.train.0.format: task classify reads labelled, images"),
    ("task: contrastive", "task: sft", "c.yaml:5: contrastive: this section is for task: contrastive, and the task is"),
    ("loss: cosent", "loss: cosnet", "c.yaml:5: contrastive.loss: 'cosnet' is not one of info_nce, "),
    ("temperature: 0.05", "temperature: 0", "c.yaml:5: contrastive.temperature: "),
    ("temperature: 0.05", "augmentation: {flips: 1}", "c.yaml:5: contrastive.augmentation.flips: unknown key; neare"),
    ("[0, 5]", "[5, 0]", "c.yaml:4: data.score_range: the lowest score and then the highest are expected, these are 5"),
    ("[0, 5]", "[0, 5], packing: true", "c.yaml:4: data.packing: only task: sft packs rows"),
    ("output: runs/a", "output: o\nclassify: {labels: [a]}", "c.yaml:7: classify: this section is for task: classify"),
    ("output: runs/a", "output: o\nevaluation: {exact_match: true}", "c.yaml:7: evaluation.exact_match: it compares"),
    ("pooling: mean", "pooling: first", "c.yaml:2: model.pooling: 'first' is not one of cls, mean, max, last"),
]


@pytest.mark.parametrize(("old", "new", "message"), TASK_FAULTS)
def test_what_does_not_go_with_the_task(tmp_path, old, new, message):
    assert SIMILAR.count(old) == 1
    assert message in refused(tmp_path, SIMILAR.replace(old, new))


def test_a_config_of_another_task_comes_back(tmp_path):
    config = load_config(write(tmp_path, SIMILAR))
    assert config.contrastive.loss == "cosent" and config.data.score_range == (0.0, 5.0)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_the_schema_and_the_tasks_know_the_same_formats():
    from jaxft.config.schema import FORMATS
    from jaxft.tasks.registry import TASKS

    taken = {name: {form for task in tasks for form in task.formats} for name, tasks in TASKS.items()}
    assert taken == {name: set(forms) for name, forms in FORMATS.items()}
