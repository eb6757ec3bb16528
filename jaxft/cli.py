"""The command line: `jaxft train CONFIG`, and what is done before and after."""

import dataclasses
import io
import json
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import JaxftError, RunError

app = typer.Typer(
    name="jaxft",
    help="Fine-tune models in JAX: a config in, a run folder out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
ConfigFile = Annotated[str, typer.Argument(help="A YAML config.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Another value for a key of the config.", metavar="key.sub=value")
]


class Form(StrEnum):
    """What can be exported."""

    peft = "peft"
    merged = "merged"
    adapters = "adapters"
    serving = "serving"
    sentence_transformers = "sentence-transformers"
    sentence_transformers_adapter = "sentence-transformers-adapter"


@app.command()
def train(
    config: ConfigFile,
    sets: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Another folder for the run.", metavar="DIR")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
) -> None:
    """Train, and leave a run folder."""
    from .run import RunFolder
    from .train.stop import Stop, Stopped

    try:
        with Stop() as stop:
            with stop.at_once():
                read = _config(config, sets, output)
                run = RunFolder(read.output)
                if resume and run.finished:
                    print(f"{run.path}: the run has finished; nothing is left to do")
                    return
                run.check_idle()
                run.check_free(read, resume=resume)
                from .tasks.train import Job, sample_pairs

                job = Job(read, resume=resume, stop=stop)
                rows = f"{read.train.batch_size} {'packs' if read.data.packing else 'rows'}"
                print(f"{job.steps:,} steps of {rows} on {_devices(job.mesh)}, remat {job.remat}")
            summary = job.train()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    except Stopped as stopped:
        said = f"{stopped}; --resume goes on" if stopped.args else "stopped before anything was trained"
        print(said, file=sys.stderr)
        raise typer.Exit(75) from None
    _show(summary, sample_pairs(run))


@app.command()
def validate(config: ConfigFile, sets: Overrides = None) -> None:
    """Check config, data, model and method; train nothing, write nothing."""
    from .tasks.train import Job

    job = Job(_config(config, sets))
    print(f"{config}: good; {job.steps:,} steps")


@app.command()
def evaluate(
    run_or_config: Annotated[str, typer.Argument(help="A run's folder, or a config.", metavar="RUN|CONFIG")],
    sets: Overrides = None,
) -> None:
    """Evaluate a finished run, or the model that a config begins with, on the held-out rows."""
    from .config import load_config
    from .run import CONFIG, RunFolder
    from .tasks import use

    run = RunFolder(run_or_config)
    is_run = run.path.is_dir()
    if is_run and not run.started:
        raise RunError(f"{run.path}: this folder is no run (it holds no {CONFIG})")
    config = load_config(run.path / CONFIG, sets or ()) if is_run else _config(run_or_config, sets)
    for name, value in use.evaluate(config, run=run if is_run else None).items():
        print(f"{name} {value:.6f}")


@app.command()
def generate(
    run_or_model: Annotated[str, typer.Argument(help="A run, a model folder or a hub id.", metavar="RUN_OR_MODEL")],
    prompt: Annotated[list[str], typer.Option(help="A text to answer; may be given several times.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter to load, peft's or ours.", metavar="DIR")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest tokens; above: drawn ones.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the form that the run was trained on.")] = False,
) -> None:
    """Let a run answer, or a model continue, a prompt."""
    from .tasks import use

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for text in use.generate(run_or_model, prompt, adapter=adapter, raw=raw, **options):
        print(text)


@app.command()
def embed(
    run_or_model: Annotated[str, typer.Argument(help="A run, a model folder or a hub id.", metavar="RUN_OR_MODEL")],
    file: Annotated[
        str, typer.Argument(help="Rows with `text`; or images: a folder, npz, idx, table.", metavar="FILE")
    ],
    output: Annotated[str, typer.Option(help="A file for the vectors.", metavar="OUT.npy|OUT.parquet")],
    adapter: Annotated[str | None, typer.Option(help="An adapter to load, peft's or ours.", metavar="DIR")] = None,
    column: Annotated[str | None, typer.Option(help="Another column with the text, or the image.")] = None,
    split: Annotated[str, typer.Option(help="The split, of a hub data set or npz file.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text at most; by default the model's.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Vectors of length 1; by default as the model's folder says, else not.")
    ] = None,
) -> None:
    """Write one vector for each row of a file, in its order: .npy [N, D] float32, or .parquet with the row's place."""
    from .tasks.embed import embed_file

    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "normalize": normalize}
    shape = embed_file(run_or_model, file, output, adapter=adapter, column=column, split=split, **options)
    print(f"{shape[0]:,} vectors of {shape[1]} in {output}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A finished run's folder.", metavar="RUN")],
    format: Annotated[
        Form,
        typer.Option(
            help="peft, adapters: the adapter; serving: as a plain LoRA; merged, sentence-transformers: a whole model."
        ),
    ],
    output: Annotated[str, typer.Option(help="A new folder.", metavar="DIR")],
) -> None:
    """Write what a run has made, for peft, transformers, sentence-transformers or an engine of adapters to load."""
    from .run import CONFIG, RunFolder
    from .tasks import use

    folder = RunFolder(run)
    if not folder.started:
        raise RunError(f"{folder.path}: this is no run's folder (it holds no {CONFIG})")
    print(use.export(folder, format.value, output))


@app.command()
def plan(
    config: ConfigFile,
    topology: Annotated[
        str | None, typer.Option(help="A TPU slice, of which there need be none: v5e:4x4.", metavar="KIND:GRID")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
    sets: Overrides = None,
) -> None:
    """Say what a step will need of each device, and whether it fits; no data, no weights, no TPU."""
    import jax

    from .plan import make_plan

    if topology is not None and not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")  # compiled for a TPU, with no device of this machine

    made = make_plan(_config(config, sets), topology)
    print(json.dumps(dataclasses.asdict(made)) if as_json else made)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[
        str | None, typer.Option(help="Methods, or names of the config's `compare`.", metavar="full,lora,...")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Each at every value of one key: method.r=1,2,4.", metavar="key.sub=value,...")
    ] = None,
    target_loss: Annotated[
        float | None, typer.Option(help="Loss that the time is measured to; by default one that all have reached.")
    ] = None,
    sets: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Another folder for the comparison.", metavar="DIR")] = None,
) -> None:
    """Train methods side by side on the same data, seed and budget; the same command goes on where it was stopped.

    The table is of the runs that the command names; those of an earlier one in the folder stay, and are not in it.
    """
    from . import compare as c
    from .run import write_whole
    from .train.stop import Stopped

    made = c.contestants(config, methods, sweep, [*(sets or ()), *_output(output)])
    try:
        errors = c.run_all(made)
    except (KeyboardInterrupt, Stopped) as left:
        print("stopped; the same command goes on", file=sys.stderr)
        raise typer.Exit(75 if isinstance(left, Stopped) else 130) from None
    key = sweep.partition("=")[0] if sweep else None
    found = c.measure(made, errors, key=key, target=target_loss)
    stem = os.path.join(os.path.dirname(made[0].config.output), f"sweep-{key}" if key else "compare")
    table = c.as_markdown(found)
    write_whole(Path(f"{stem}.json"), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write_whole(Path(f"{stem}.md"), table)
    print(f"\n{table}\n{stem}.json and .md", end="")
    if len(errors) < len(made):
        (c.draw_sweep if key else c.draw_methods)(found, title=config).savefig(f"{stem}.png", dpi=120)
        print(f" hold the figures, {stem}.png the picture")
    else:
        print(" tell why")
    if errors:
        raise typer.Exit(1)


def _config(file: str, sets: list[str] | None, output: str | None = None) -> Any:
    from .config import load_config
    from .tasks.stages import check_stages

    config = load_config(file, [*(sets or ()), *_output(output)])
    check_stages(config, file)
    return config


def _output(folder: str | None) -> list[str]:
    return [f"output={json.dumps(folder)}"] if folder else []


def _devices(mesh: Any) -> str:
    """Say what a run uses of what there is."""
    import jax

    devices = jax.devices()
    if mesh is not None:
        return f"{mesh.size} x {devices[0].device_kind} ({', '.join(f'{a}={n}' for a, n in mesh.shape.items())})"
    more = f" of {len(devices)} (`mesh: {{data: -1}}` uses them all)" if len(devices) > 1 else ""
    return f"1 {devices[0].device_kind}{more}"


def _show(summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Print the end of a run: samples, figures at both ends, and where things lie."""
    for row in samples:
        lines = {name: row[name] for name in ("prompt", "expected", "before", "after") if name in row}
        print("\n" + "\n".join(f"{name:>9} {text.strip()!r}" for name, text in lines.items()))
    print()
    for name, after in summary["after"].items():
        before = summary["before"].get(name)
        print(f"{name:20} {_figure(before)} -> {_figure(after)}")
    print(f"trained {summary['trainable_parameters']:,} parameters ({summary['trainable_percent']:.2f} %)")
    print(f"{summary['steps']:,} steps in {summary['seconds']:.0f} s")
    kind = "adapter" if "adapter" in summary else "model"
    print(f"{kind} in {summary[kind]}, curves in {summary['report']}")


def main() -> None:
    """Run the command; a user's mistake ends with its message and exit code 2, never with a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for its own models
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # orbax logs tracebacks of errors that it raises too
    sys.unraisablehook = _unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a log too, what is said comes in the order it was said
    try:
        app()
    except JaxftError as error:
        sys.exit(_refused(str(error)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_refused(f"{where}{error.strerror or error}"))


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _unraisable(left: Any) -> None:
    """Pass over what orbax's writers leave behind when a write fails; the error itself is told once, in words."""
    if "Event loop is closed" not in str(left.exc_value):
        sys.__unraisablehook__(left)


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
