"""The command line: arguments, exit codes, and one line per error. No logic lives here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rewrite.errors import RewriteError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Rewrite a trained network into the fastest one that computes the same function, and prove it.\n\n"
    "SOURCE, A and B are a Hugging Face checkpoint folder, an .onnx or .pt2 file, a folder with "
    "model.pt2, a factory package.module:function, "
    "or a folder that convert wrote. Exit codes: 0 done and proved, 1 the answer is no, 2 unusable request or input.",
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="What to read.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Names = Annotated[list[str] | None, typer.Option("--pass", metavar="NAME", help="A pass to run; may be repeated.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="default, compress, rotate, smooth, int8-dynamic, int8-static, integer, int4-weight, "
        "int4-weight-int8-activation, none, several joined by +, or a JSON file.",
    ),
]
Given = Annotated[str | None, typer.Option("--inputs", metavar="FILE.npz", help="Inputs to check and calibrate on.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        metavar="PATH",
        help="What to calibrate on instead: a file or folder of .npz, of text that the tokenizer in SOURCE reads, or "
        "of images.",
    ),
]
Samples = Annotated[
    int, typer.Option("--calibration-samples", metavar="N", help="How many of its rows, images or sets, at most.")
]


@app.command()
def convert(
    source: Source,
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.")],
    target: Annotated[str, typer.Option(help="ort-cpu or ort-cuda.")] = "ort-cpu",
    passes: Names = None,
    recipe: Recipe = None,
    inputs: Given = None,
    calibration: Calibration = None,
    calibration_samples: Samples = 128,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    to: Annotated[str, typer.Option(help="onnx, or hf: a checkpoint of the same architecture.")] = "onnx",
    no_check: Annotated[bool, typer.Option("--no-check", help="Prove, but run nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if a pass asked for applied nowhere.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert SOURCE and write model, certificate and report into OUT."""
    from rewrite import pipeline
    from rewrite.errors import RequestError
    from rewrite.report import print_report

    if to not in ("onnx", "hf"):
        raise RequestError(f"cannot write {to!r}", where="--to", remedy="onnx or hf")
    if to == "hf" and dtype is not None:
        raise RequestError("a checkpoint keeps its type", where="--dtype", remedy="leave it out with --to hf")
    with progress() as tell:
        if to == "hf":
            from rewrite.export_hf import convert_checkpoint

            report = convert_checkpoint(
                source,
                out,
                passes=passes,
                recipe=recipe,
                inputs=inputs,
                calibration=calibration,
                calibration_samples=calibration_samples,
                check=not no_check,
                force=force,
                progress=tell,
            )
        else:
            report = pipeline.convert(
                source,
                out,
                target=target,
                passes=passes,
                recipe=recipe,
                inputs=inputs,
                calibration=calibration,
                calibration_samples=calibration_samples,
                dtype=dtype,
                check=not no_check,
                force=force,
                progress=tell,
            )
    idle = [name for name in passes or () if not any(row.pass_name == name for row in report.applied)]
    for name in idle:
        print(f"warning: {name} applied nowhere", file=sys.stderr)
    if as_json:
        print(report.to_json())
    else:
        print_report(report)
    proved = report.verdict.startswith(("EQUAL", "BITWISE"))
    right = report.numerical in ("", "within noise", "approximate as declared")
    raise typer.Exit(0 if proved and right and not (strict and idle) else 1)


@app.command()
def capture(
    source: Source,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE.onnx", help="The file to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Capture SOURCE as it is: the ORIGINAL that verify and diff refer to."""
    from rewrite.artifact import new_file
    from rewrite.capture import capture as captured
    from rewrite.ir.program import save_model

    with progress() as tell, new_file(Path(out), force) as path:
        tell("capture")
        program = captured(source, dtype=dtype)
        tell("saving")
        save_model(program.original, path)
    print(program)


@app.command()
def explain(source: Source, passes: Names = None, recipe: Recipe = None, as_json: AsJson = False) -> None:
    """Say for every site of every pass of the recipe whether it applies, and what is in the way where it does not."""
    from rewrite import pipeline
    from rewrite.recipes import passes_of
    from rewrite.report import SiteRow, print_sites

    with progress() as tell:
        tell("capture and passes")
        outcomes = pipeline.explain(source, passes_of(passes, recipe))
    if as_json:
        show([outcome.to_json() for outcome in outcomes], None)
    else:
        print_sites([SiteRow.of(outcome.to_json()) for outcome in outcomes])


@app.command()
def verify(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL")],
    rewritten: Annotated[str, typer.Argument(metavar="REWRITTEN")],
    certificate: Annotated[str | None, typer.Option(metavar="FILE", help="A certificate to check too.")] = None,
    refutation: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where to write what refutes; beside REWRITTEN unless given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that REWRITTEN computes ORIGINAL; on files this needs neither torch nor ONNX Runtime.

    If it does not, the smallest part of both networks in which they differ is written, with inputs that show it.
    """
    from rewrite import pipeline

    beside = Path(rewritten) if Path(rewritten).exists() else Path(Path(rewritten).name)
    folder = Path(refutation) if refutation is not None else beside.resolve().with_suffix(".refuted")
    with progress() as tell:
        tell("proof")
        answer = pipeline.verify(original, rewritten, certificate, refutation=folder)
    show(answer.to_json() if as_json else None, answer)
    raise typer.Exit(0 if answer.verdict.holds else 1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A")],
    b: Annotated[str, typer.Argument(metavar="B")],
    inputs: Given = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare every value on the way.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare the outputs of A and B on inputs, judged against float64 and the noise of A."""
    from rewrite import pipeline

    with progress() as tell:
        tell("comparing")
        difference = pipeline.diff(a, b, inputs, layers=layers)
    show(difference.to_dict() if as_json else None, difference)
    raise typer.Exit(0 if difference.equal else 1)


@app.command()
def passes() -> None:
    """List the passes, what each does and what it requires."""
    from rewrite.passes import APPROXIMATIONS, PASSES

    for each in (*PASSES, *APPROXIMATIONS):
        print(f"{each.name}  {((each.__module__ and sys.modules[each.__module__].__doc__) or '').splitlines()[0]}")
        for requirement in each.requires:
            print(f"    {requirement.id}  {requirement.text}")


@app.command()
def bench(
    a: Annotated[str, typer.Argument(metavar="A")],
    b: Annotated[str | None, typer.Argument(metavar="B")] = None,
    inputs: Given = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Time A, or A against B in turn: median milliseconds, and the ratio of the medians."""
    from rewrite.bench import time_models

    with progress() as tell:
        tell("timing")
        timing = time_models(a, b, inputs, rounds)
    show(timing.to_json() if as_json else None, timing)


# ── What all commands share ─────────────────────────────────────────────────────────────────────────────────────────


def show(plain: Any, readable: Any) -> None:
    """The result on stdout: JSON where asked for, else text."""
    print(json.dumps(plain, ensure_ascii=False, indent=1) if plain is not None else readable)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is going on; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda stage: status.update(stage)


def main() -> NoReturn:
    """Entry point: errors of ours are one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except RewriteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # the parser has its own copies of its classes; anything else is raised again
        if type(error).__module__.partition(".")[0] not in ("click", "typer"):
            raise
        explain = getattr(error, "format_message", None)
        message = explain() if explain is not None else str(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
