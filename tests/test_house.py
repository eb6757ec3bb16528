"""The house itself: imports point up the list, files stay small, public names are what they are."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxft

ROOT = Path(jaxft.__file__).parent
ROWS = [
    ["errors"],
    ["parallel"],
    ["quant"],
    ["models"],
    ["methods"],
    ["losses"],
    ["generation"],
    ["data"],
    ["embedding"],
    ["train"],
    ["interop"],
    ["config"],
    ["run"],
    ["loading"],
    ["scores"],
    ["rewards"],
    ["calibration"],
    ["similarity"],
    ["probes"],
    ["report", "embedding_picture", "calibration_picture", "learning_picture"],
    ["tasks"],
    ["flops"],
    ["plan"],
    ["compare"],
    ["testing"],
    ["__init__"],
    ["cli"],
]
MODELS = [
    "seams",
    "layers",
    "cache",
    "attention",
    "stack",
    "config",
    "rope",
    "virtual",
    "pooling",
    "base",
    "causal",
    "encoder",
    "bert",
    "roberta",
    "vit",
    "gpt2",
    "llama",
    "mistral",
    "qwen",
    "gemma",
    "heads",
    "__init__",
    "names",
]
INSIDE = {
    "parallel": ["rules", "mesh", "topology", "__init__"],
    "quant": ["leaf", "tables", "halves", "nf4", "int8", "product", "model", "report", "__init__"],
    "models": [*MODELS, "placement", "tensors", "packed", "ways", "assemble", "sentence_folder", "hub", "sharing"],
    "methods": [
        "linear",
        "stacking",
        "checks",
        "heads",
        "method",
        "matching",
        "copies",
        "low_rank",
        "bottleneck",
        "encoders",
        "virtual",
        "dora",
        "pissa",
        "embedding",
        "tokens",
        "options",
        "full",
        "bitfit",
        "lora",
        "ia3",
        "adapter",
        "prefix_tuning",
        "prompt_tuning",
        "p_tuning",
        "p_tuning_v2",
        "temperature",
        "__init__",
        "switch",
        "partition",
    ],
    "losses": [
        "entropy",
        "chunked",
        "language",
        "cached",
        "vectors",
        "contrastive",
        "graded",
        "masks",
        "classification",
        "pairs",
        "log_probs",
        "preference",
        "ppo",
        "grpo",
        "comparisons",
        "__init__",
    ],
    "generation": ["sampling", "generate", "rollout", "__init__"],
    "data": ["rows", "templates", "tokens", "chat", "formats", "source", "batches", "packing"],
    "config": ["tree", "section", "preferences", "schema", "load", "__init__"],
    "tasks": ["__init__", "start", "task", "sft", "texts", "pictures", "classify", "contrastive"],
    "interop": [
        "entries",
        "adapters",
        "peft_lora",
        "peft_ia3",
        "peft_virtual",
        "peft",
        "folder",
        "serving",
        "padding",
        "export",
        "__init__",
    ],
    "testing": ["tiny", "laws", "__init__"],
}
INSIDE["methods"] += ["report", "lost", "merge", "average", "combine", "weighted"]
INSIDE["train"] = ["batch", "state", "step", "optimizer", "digests", "checkpoint", "evaluate", "loop", "progress"]
INSIDE["interop"] += ["export", "sentence_transformers", "__init__"]
INSIDE["data"] += ["labels", "columns", "prompts", "preference"]
INSIDE["data"] += ["pixels", "image_files", "images", "augment", "regions", "__init__"]
INSIDE["train"] += ["trackers", "stop", "lock", "memory", "policy", "scoring", "experience", "ppo", "grpo", "__init__"]
INSIDE["tasks"] += ["images", "comparisons", "reward", "dpo", "rollouts", "prompts", "ppo", "grpo"]
INSIDE["tasks"] += ["stages", "registry", "fingerprints", "train", "embed", "use"]
INSIDE["rewards"] = ["answers", "named", "functions", "models", "make", "__init__"]
INSIDE["compare"] = ["contestants", "runs", "table", "picture", "__init__"]
FILES = sorted(ROOT.rglob("*.py"))


def imports(file):
    """Yield the modules of jaxft that a file imports, as (row, file) names."""
    here = file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            target = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                inner = (*target, alias.name)
                yield (
                    inner
                    if (ROOT.joinpath(*inner).with_suffix(".py")).exists() or ROOT.joinpath(*inner).is_dir()
                    else target
                )
        if isinstance(node, ast.Import):
            assert not any(a.name.split(".")[0] == "jaxft" for a in node.names), f"{file}: import relatively"


def place(parts):
    row = next(i for i, names in enumerate(ROWS) if (parts[0] if parts else "__init__") in names)
    inside = INSIDE.get(parts[0] if parts else "", [])
    name = parts[1] if len(parts) > 1 else "__init__"
    return row, inside.index(name) if inside else 0


def test_imports_point_up_the_list():
    seen = 0
    for file in FILES:
        here = file.relative_to(ROOT).with_suffix("").parts
        for target in imports(file):
            seen += 1
            assert place(target) < place(here), f"{'.'.join(here)} imports {'.'.join(target)}, which stands below it"
    assert seen > 80


def test_files_are_small():
    lengths = sorted(len(f.read_text().splitlines()) for f in FILES)
    assert len(lengths) > 30
    assert lengths[len(lengths) // 2] <= 150
    assert lengths[-1] <= 400


def test_public_names():
    assert sorted(jaxft.__all__, key=lambda name: (not name.isupper(), name)) == jaxft.__all__
    assert all(hasattr(jaxft, name) for name in jaxft.__all__)
    assert set(jaxft.__all__) == {
        *("BatchError", "CheckpointError", "GenerationError", "JaxftError", "MethodError", "OptimizerError"),
        *("ConfigError", "DataError", "MeshError", "RunError", "data", "make_mesh"),
        *("PartitionError", "SelectionError", "Method", "ParameterReport", "TrainState"),
        *("Adapter", "BitFit", "Full", "LoRA"),
        *("adapters", "attach", "combine", "decay_mask", "detach", "generate", "generate_ids", "leaves", "load"),
        *("load_adapter", "losses", "make_train_step", "merge", "parameter_report", "partition", "save_adapter"),
        *("PTuning", "PTuningV2", "PrefixTuning", "PromptTuning"),
        *("IA3", "save_serving", "save_model", "select", "set_adapter", "testing", "trainable_mask", "unmerge"),
        *("RewardError", "quant", "rewards"),
        *("add_weighted_adapter", "average_adapters", "embed", "save_sentence_transformer"),
    }


def test_every_public_docstring_has_an_example():
    lacking = [
        name
        for name in jaxft.__all__
        if callable(getattr(jaxft, name))
        and not name.endswith(("Error", "Report"))
        and ">>>" not in getattr(jaxft, name).__doc__
    ]
    assert not lacking


def test_import_is_light():
    heavy = [
        "transformers",
        "datasets",
        "orbax",
        "grain",
        "matplotlib",
        "torch",
        "huggingface_hub",
        "pydantic",
        "pyarrow",
        "PIL",
    ]
    code = f"import sys, jaxft; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), f"import jaxft imports: {done.stdout}{done.stderr[-300:]}"


def test_nothing_that_is_loaded_can_run_code():
    """No pickle, no eval, no trust: what is read is safetensors and JSON."""
    seen = 0
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            names += [node.arg] if isinstance(node, ast.keyword) else []
            seen += len(names)
            bad = {"pickle", "trust_remote_code", "torch", "allow_pickle"} & set(names)
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            bad |= {"eval", "exec"} & {called}  # `data.eval` is a key of a config
            assert not bad, f"{file}: {bad}"
    assert seen > 1000
