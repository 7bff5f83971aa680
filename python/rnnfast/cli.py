"""The command line: `rnnfast train`, `eval`, `generate`, `info` and `plot`.

Here arguments become calls and errors become one line on standard error; what is computed stands in
`rnnfast.training` and below.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .training.settings import RESUMABLE, TrainSettings, resumed_settings

PROGRAM = "rnnfast"
TRACEBACK_VARIABLE = "RNNFAST_TRACEBACK"

app = typer.Typer(
    help="Train, test and use recurrent language models with fast LSTM and RNN layers.",
    epilog=f"An error is one line; with {TRACEBACK_VARIABLE}=1 it comes with its traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT = TrainSettings()


def flags(names: Iterable[str]) -> str:
    """The flags of settings, in words."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
CheckpointOption = Annotated[
    Literal["best", "last"], typer.Option(help="The model that validated best, or the newest.")
]
BackendOption = Annotated[
    Literal["rnnfast", "torch", "reference"] | None,
    typer.Option(help="Who computes the recurrent layers.", show_default="as trained"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="as trained")
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text; may be given several times.", show_default=False),
]


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text to learn; may be given several times.",
            show_default="the Python standard library",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Directory to keep the run in.", show_default="runs/1, 2, ..."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help=f"Continue the run in --save; only {flags(RESUMABLE)} may change.",
        ),
    ] = False,
    model: Annotated[Literal["lstm", "rnn"], typer.Option(help="Kind of layer.")] = DEFAULT.model,
    nonlinearity: Annotated[
        Literal["tanh", "relu"], typer.Option(help="Of --model rnn.")
    ] = DEFAULT.nonlinearity,
    level: Annotated[
        Literal["char", "byte", "word"], typer.Option(help="What a token is.")
    ] = DEFAULT.level,
    vocab_size: Annotated[
        int, typer.Option(help="Most words of a word vocabulary.")
    ] = DEFAULT.vocab_size,
    emsize: Annotated[
        int | None,
        typer.Option(help="Size of the embedding.", show_default="128; with --tied as --nhid"),
    ] = DEFAULT.emsize,
    nhid: Annotated[int, typer.Option(help="Hidden units of a layer.")] = DEFAULT.nhid,
    nlayers: Annotated[int, typer.Option(help="Layers.")] = DEFAULT.nlayers,
    dropout: Annotated[float, typer.Option(help="Probability; 0 for none.")] = DEFAULT.dropout,
    tied: Annotated[
        bool, typer.Option("--tied", help="Embedding and decoder share their weights.")
    ] = DEFAULT.tied,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", hidden=True)] = False,
    bptt: Annotated[
        int, typer.Option(help="Steps that gradients flow back through.")
    ] = DEFAULT.bptt,
    reset_interval: Annotated[
        int, typer.Option(help="Chunks after which a row forgets its state; 0 for never.")
    ] = DEFAULT.reset_interval,
    batch_size: Annotated[
        int, typer.Option(help="Rows of text read side by side, in each process.")
    ] = DEFAULT.batch_size,
    optimizer: Annotated[
        Literal["adam", "sgd"], typer.Option(help="Who takes the steps.")
    ] = DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate at the beginning.")] = DEFAULT.lr,
    schedule: Annotated[
        Literal["plateau", "cosine", "constant"], typer.Option(help="How the learning rate falls.")
    ] = DEFAULT.schedule,
    clip: Annotated[
        float, typer.Option(help="Largest global norm of the gradient; 0 for any.")
    ] = DEFAULT.clip,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = DEFAULT.epochs,
    max_steps: Annotated[
        int, typer.Option(help="Stop after so many steps; 0 for no limit.")
    ] = DEFAULT.max_steps,
    max_minutes: Annotated[
        float, typer.Option(help="Stop after so many minutes of training; 0 for no limit.")
    ] = DEFAULT.max_minutes,
    eval_interval: Annotated[
        int, typer.Option(help="Steps between validations, each with a checkpoint.")
    ] = DEFAULT.eval_interval,
    eval_tokens: Annotated[
        int, typer.Option(help="Most tokens of a validation.")
    ] = DEFAULT.eval_tokens,
    log_interval: Annotated[
        int, typer.Option(help="Steps between log entries.")
    ] = DEFAULT.log_interval,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = DEFAULT.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = DEFAULT.device,
    dtype: Annotated[
        Literal["float32", "float64"], typer.Option(help="Of the parameters.")
    ] = DEFAULT.dtype,
    backend: Annotated[
        Literal["rnnfast", "torch", "reference"],
        typer.Option(help="Who computes the recurrent layers."),
    ] = DEFAULT.backend,
    memory: Annotated[
        Literal["normal", "low"],
        typer.Option(help="Of --model lstm: low keeps less for the way back, and is slower."),
    ] = DEFAULT.memory,
) -> int:
    """Train a language model, test it, and let it write a sample.

    Ctrl-C saves, tests and exits with status 130; --resume goes on from there, bit for bit. Several
    processes: torchrun --nproc-per-node 2 -m rnnfast train ...
    """
    from . import training

    # The parameters above have the names of the settings.
    values = {field.name: context.params[field.name] for field in dataclasses.fields(TrainSettings)}
    values["data"] = tuple(map(str, data or ()))
    if resume:
        if save is None:
            raise ValueError("--resume needs --save RUN: the run to continue")
        stored = training.RunDirectory(save).read_record().settings
        given = {name: value for name, value in values.items() if was_given(context, name)}
        settings = resumed_settings(stored, given)
    else:
        settings = TrainSettings(**values)
    result = training.train(settings, save, resume=resume)
    return 0 if result.signal is None else 128 + result.signal


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line, as opposed to having its default."""
    return context.get_parameter_source(name).name == "COMMANDLINE"


@app.command("eval")
def evaluate(
    run: RunArgument,
    data: DataOption = None,
    checkpoint: CheckpointOption = "best",
    backend: BackendOption = None,
    device: DeviceOption = None,
) -> int:
    """Print how well a model predicts a text: by default the test split of its own."""
    from . import training
    from .text.corpus import build_corpus, encode_split, read_text

    record, model = training.RunDirectory(run).open_model(
        checkpoint, backend=backend, device=device
    )
    if data:
        split = encode_split(read_text(data, record.settings.level), record.vocabulary)
    else:
        corpus = build_corpus(
            record.settings.data, record.settings.level, vocabulary=record.vocabulary
        )
        if corpus.fingerprint != record.fingerprint:
            raise ValueError(f"{corpus.name} is no longer the text that {run} was trained on")
        split = corpus.test
    if len(split.tokens) < 2:
        raise ValueError(f"a text of {len(split.tokens)} tokens predicts nothing; it needs two")
    score = training.evaluate(model, split, bptt=record.settings.bptt)
    unknown = split.unknown_share(record.vocabulary)
    print(f"{score}  tokens {len(split.tokens):,}  unknown {unknown:.2%}")
    return 0


@app.command()
def generate(
    run: RunArgument,
    prime: Annotated[
        str, typer.Option(metavar="TEXT", help="Text to continue.", show_default="a new line")
    ] = "",
    length: Annotated[int, typer.Option(help="Tokens to generate.")] = 1000,
    temperature: Annotated[
        float, typer.Option(help="Below 1: safer; above 1: bolder; 0: always the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens that sum to p.", show_default="all"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed, the same text.", show_default="a new one")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Texts to generate.")] = 1,
    checkpoint: CheckpointOption = "best",
    backend: BackendOption = None,
    device: DeviceOption = None,
) -> int:
    """Write text. On standard output is the text alone, each sample ended by a line end."""
    from . import training
    from .models import sampling

    record, model = training.RunDirectory(run).open_model(
        checkpoint, backend=backend, device=device
    )
    vocabulary = record.vocabulary
    prime_tokens = vocabulary.encode(prime).tolist()
    if unknown := sum(token == vocabulary.unknown for token in prime_tokens):
        note(f"{unknown} of the {len(prime_tokens)} tokens of --prime are unknown to the model")
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
        note(f"seed {seed}")
    samples = sampling.generate(
        model,
        prime_tokens or vocabulary.beginning(),
        length,
        num_samples=num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        excluded=vocabulary.never_generated(),
        seed=seed,
    )
    for number, sample in enumerate(samples.tolist(), start=1):
        if num_samples > 1:
            note(f"sample {number} of {num_samples}")
        text = vocabulary.decode_bytes(prime_tokens + sample)
        typer.echo(text if text.endswith(b"\n") else text + b"\n", nl=False)
        sys.stdout.flush()
    return 0


@app.command()
def info() -> int:
    """Print version, instruction sets, threads and devices."""
    import torch

    import rnnfast

    lines = dict(rnnfast.build_info()) | {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda devices": torch.cuda.device_count(),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) or "none"
        print(f"{name:{width}}  {value}")
    return 0


@app.command()
def plot(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".png, .pdf or .svg.", show_default="RUN/loss.png"),
    ] = None,
) -> int:
    """Draw the loss curve of a run."""
    from .training.plot import plot_run

    print(plot_run(run, output))
    return 0


def note(text: str) -> None:
    """Prints a line on standard error."""
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        the exit status: 0, 1 after an error, 2 after a wrong command line, 128 + n after signal n.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # All of typer's own errors about a command line are subclasses of this one.
    usage_error = typer.BadParameter.__base__
    try:
        status = app(args=arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        return status or 0
    except usage_error as error:
        message = " ".join(error.format_message().split())
        note(f"{message} ({error.ctx.command_path if error.ctx else PROGRAM} --help shows all)")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        note(f"error: {' '.join(str(error).split())}")
        return 1
