"""Quality, size and latency of quantized networks: our recipes against the quantizers of others, in one run.

    python benchmarks/quantize.py --networks bytegpt bytegpt+outliers --folder OUT --json quantize.json
    python benchmarks/quantize.py --latency --folder OUT --json latency.json

Every method gets the same calibration data, all of it training data, and a float model: others get two, the exporter's
(`plain`, opset 18, attention written out) and our rewritten one (`ours`, so that what is left is the quantizing).
Quality is measured on held-out data: bits per byte of a language model, accuracy and bits per image (cross-entropy)
of a classifier. Latency is one sequence of 128 or one image, one thread, no spinning, all sessions of a network in turn
in one process, and that in several processes; the median over all turns of the ratio to the faster float artifact. Both
clocks are kept: the wall's, and the thread's own time, which moves less where other processes want the cores and is
what verdicts are of. Where a recipe of ours quantizes nothing, as it says, its artifact is the float network.

A verdict is on a network and a format, as the recipes name it. Each of others' artifacts must be matched by one of ours
of that format: not worse by more than two standard errors of the paired difference over the held-out items, and not
slower by more than `SLOWER`. One that is not worse than the float network by more than that is not worse than anything,
since what has fewer bits than float has them by chance. What is not matched is listed.

`--latency` measures a network in the shape of GPT-2 small with random weights instead, of which there is no quality:
at 128 tokens, and at one, as a decoder with a cache has it at every step. Captures have no cache, so one token here
attends to itself alone, and what is timed is the matrices, the logits' included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import quantize_networks as networks
from quantize_peers import METHODS

FORMATS = ("int8-dynamic", "int8-static", "int4-weight", "int4-weight-int8-activation")
PREPARATIONS = ("", "rotate+", "smooth+", "rotate+smooth+")
BLOCKS_OF_128 = "-128"
"""Behind a name: with blocks of 128 instead of 32, as others have them too."""
RECIPES = (
    *(prepare + form for form in FORMATS for prepare in PREPARATIONS),
    *(f"{prepare}integer+int8-static" for prepare in PREPARATIONS),
    *(f"{form}{BLOCKS_OF_128}" for form in FORMATS if form.startswith("int4")),
)
SLOWER = 1.05
"""Identical graphs differ by up to 4 % here, so less than this is no difference in latency."""
NETWORKS = (
    "bytegpt",
    "bytellama",
    "digits-vit",
    "digits-resnet",
    "digits-repvgg",
    "digits-densenet",
    "digits-mobilenet",
)

# ---------------------------------------------------------------------------------------------------- what is compared


def build(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every artifact of a network, made where it is not there yet: what it is, where, and what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    source = networks.checkpoint(name, folder)
    sets = networks.calibration(name, arguments.calibration)
    np.savez(folder / "calibration.npz", **{f"{i}/{key}": a for i, one in enumerate(sets) for key, a in one.items()})  # pyright: ignore[reportArgumentType]
    program = cache(lambda: networks.program(source))
    made = [
        _float("plain", folder, lambda out: export(source, out)),
        _float("ours", folder, lambda out: _convert(program(), out)),
    ]
    for given in [one for one in made if "failure" not in one]:
        made += peers(given, folder, arguments)
    for name in arguments.recipes:
        target, recipe = folder / "recipes" / name, _recipe(name, folder)
        answer = _once(target, lambda out, recipe=recipe: _convert(program(), out, recipe=recipe, inputs=sets))
        answer |= {"float": _reasons(target)} if "failure" not in answer else {}
        form = name.removesuffix(BLOCKS_OF_128).split("+")[-1]
        made.append({"method": name, "source": "recipe", "format": form} | answer)
    return made


def _recipe(name: str, folder: Path) -> str:
    """A recipe's name, or the file of one with other blocks."""
    from rewrite.recipes import RECIPES as KNOWN

    if not name.endswith(BLOCKS_OF_128):
        return name
    steps = KNOWN[name.removesuffix(BLOCKS_OF_128)]
    path = folder / f"{name}.recipe.json"
    path.write_text(json.dumps([step if isinstance(step, str) else {**step, "block": 128} for step in steps]))
    return str(path)


def _float(name: str, folder: Path, make: Callable[[Path], None]) -> dict[str, Any]:
    return {"method": "float", "source": name, "format": "float"} | _once(folder / name, make)


def _reasons(target: Path) -> str:
    """Why the artifact of a recipe approximates nothing, as its report says; empty where it does."""
    report = json.loads((target / "report.json").read_text())
    if report["verdict"].startswith("EQUAL_MODULO"):
        return ""
    reasons = [site["reason"] for site in report["sites"] if site["pass_name"].startswith("quantize")]
    return "; ".join(list(dict.fromkeys(reason for reason in reasons if reason))[:3])


def _once(target: Path, make: Callable[[Path], None]) -> dict[str, Any]:
    """The folder of an artifact, or its failure, from an earlier run where it had come so far."""
    said = target.with_name(f"{target.name}.json")
    if not said.exists():
        begin, answer = time.perf_counter(), {}
        shutil.rmtree(target, ignore_errors=True)
        try:
            make(target)
        except Exception as error:  # noqa: BLE001 — what cannot be made is a result of this benchmark
            answer = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(json.dumps(answer | {"seconds": time.perf_counter() - begin}))
    return {"folder": str(target), **json.loads(said.read_text())}


def _convert(program: Any, out: Path, **options: Any) -> None:
    from rewrite import convert

    convert(program, out, check=False, **options)


def export(source: Path, out: Path, opset: int = 18) -> None:
    """The exporter's graph: transformers' own for its networks, torch's for others; weights inside the file."""
    import onnx
    import torch
    from torch.export import Dim

    model, inputs = networks.module(source)
    axes = {key: dict.fromkeys(range(1 if tensor.ndim == 4 else 2), Dim.DYNAMIC) for key, tensor in inputs.items()}
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        if hasattr(model, "config"):
            from transformers.exporters import OnnxConfig, OnnxExporter

            if hasattr(model.config, "num_attention_heads") or hasattr(model.config, "n_head"):
                model.set_attn_implementation("eager")
            exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic_shapes=axes, opset_version=opset))
            OnnxExporter.save_program(exported.program, path)
        else:
            program: Any = torch.onnx.export(
                model, (), kwargs=inputs, dynamo=True, dynamic_shapes=axes, opset_version=opset, verbose=False
            )
            program.save(path)
        onnx.save(onnx.load(path), out / "model.onnx")


def peers(given: dict[str, Any], folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What others make of a float artifact: each package under its interpreter, all its methods in one process."""
    import onnx

    start = folder / f"of-{given['source']}"
    start.mkdir(exist_ok=True)
    if not (start / "model.onnx").exists():
        onnx.save(onnx.load(Path(given["folder"]) / "model.onnx"), start / "model.onnx")
    interpreters = {
        "ort": sys.executable,
        "inc": arguments.inc_python,
        "onc": arguments.onc_python,
        "olive": arguments.olive_python,
    }
    chosen = [name for name in METHODS if any(part in name for part in arguments.methods)]
    answers: dict[str, dict[str, Any]] = {}
    for package, interpreter in interpreters.items():
        wanted = [name for name in chosen if METHODS[name].package == package]
        if interpreter is None:
            answers |= {name: {"failure": f"--{package}-python was not given"} for name in wanted}
            continue
        kept = {name: json.loads(path.read_text()) for name in wanted if (path := start / f"{name}.json").exists()}
        answers |= kept
        answers |= _asked(interpreter, start, folder / "calibration.npz", [name for name in wanted if name not in kept])
    for name in answers:
        options = Path(given["folder"]) / "session.json"
        if options.exists() and (start / name).is_dir():
            shutil.copy(options, start / name)
    return [
        {
            "method": name,
            "source": given["source"],
            "format": METHODS[name].format,
            "folder": str(start / name),
            **answers[name],
        }
        for name in chosen
    ]


def _asked(interpreter: str, start: Path, calibration: Path, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Run methods in one process; one that ends the process has failed, and the rest go on in another."""
    script = Path(__file__).with_name("quantize_peers.py")
    answers: dict[str, dict[str, Any]] = {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    while rest := [name for name in wanted if name not in answers]:
        command = [interpreter, str(script), str(start / "model.onnx"), str(start), str(calibration), *rest]
        with tempfile.TemporaryFile("w+") as said:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as process:
                for line in process.stdout or ():
                    one = json.loads(line)
                    answers[name := one.pop("method")] = one
                    (start / f"{name}.json").write_text(json.dumps(one))
            said.seek(0)
            reason = f"its process ended with {process.returncode}: {' '.join(said.read().split())[-300:]}"
        for name in [name for name in rest if name not in answers][:1]:
            answers[name] = {"failure": reason}
            (start / f"{name}.json").write_text(json.dumps(answers[name]))
    return answers


# ----------------------------------------------------------------------------------------------------- what is measured


def session_of(folder: Path) -> Any:
    """A session on one thread that does not spin, with the options of the folder's `session.json`, if it has one.

    Denormals are flushed for all: the runtime sets that once for a whole process.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    if (folder / "session.json").exists():
        from rewrite.targets import session_options

        options = session_options(folder)
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def quality(folder: Path, name: str, windows: int) -> dict[str, Any]:
    """Bits per byte, or bits per image and accuracy, of an artifact; and the bits of every held-out item."""
    session = session_of(folder)
    taken = {given.name for given in session.get_inputs()}
    bits, right = [], []
    for inputs, labels in networks.held_out(name, windows):
        logits = session.run(None, {key: array for key, array in inputs.items() if key in taken})[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        nats = np.log(np.exp(logits).sum(-1)) - chosen
        bits.append(nats.mean(-1) if nats.ndim == 2 else nats)
        right.append(logits.argmax(-1) == labels)
    items = np.concatenate(bits) / np.log(2)
    accuracy = float(np.concatenate([each.reshape(-1) for each in right]).mean())
    return {"bits": float(items.mean()), "accuracy": accuracy, "items": items.tolist()}


TURN = 0.05
"""Seconds of one artifact's turn."""
Turns = dict[str, dict[str, list[float]]]
"""For each artifact the median µs of every turn, by both clocks."""


def timings(folders: dict[str, str], inputs: dict[str, np.ndarray], rounds: int, seed: int) -> Turns:
    """Each artifact in turn in one process, in an order by chance, since neighbours change the processor's pace."""
    sessions = {key: session_of(Path(folder)) for key, folder in folders.items()}
    taken = {key: {given.name for given in session.get_inputs()} for key, session in sessions.items()}
    sets = {key: {name: array for name, array in inputs.items() if name in taken[key]} for key in sessions}
    counts: dict[str, int] = {}
    for key, session in sessions.items():
        session.run(None, sets[key])
        begin = time.perf_counter()
        session.run(None, sets[key])
        counts[key] = max(1, int(TURN / (time.perf_counter() - begin)))
    found: Turns = {key: {"wall": [], "cpu": []} for key in sessions}
    order = np.random.default_rng(seed)
    for _ in range(rounds):
        for key in order.permutation(list(sessions)):
            sessions[key].run(None, sets[key])
            walls, threads = [], []
            for _ in range(counts[key]):
                wall, thread = time.perf_counter(), time.thread_time()
                sessions[key].run(None, sets[key])
                threads.append(time.thread_time() - thread)
                walls.append(time.perf_counter() - wall)
            found[key]["wall"].append(statistics.median(walls) * 1e6)
            found[key]["cpu"].append(statistics.median(threads) * 1e6)
    return found


def latency(
    running: dict[str, dict[str, Any]], inputs: dict[str, np.ndarray], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """µs of each artifact, and its ratio to the faster float one in the same turn: medians over all turns.

    Several processes take turns: one alone may be unlucky with where its memory lies, or with its neighbours. So may
    one session: artifacts of one structure, which differ in numbers alone, have the median of their ratios.
    """
    folders = {key: one["folder"] for key, one in running.items()}
    turns: Turns = {key: {"wall": [], "cpu": []} for key in folders}
    for process in range(arguments.processes):
        for key, found in _in_a_process(folders, inputs, arguments.rounds, process).items():
            for clock, each in found.items():
                turns[key][clock] += each
    floats = [key for key, one in running.items() if one["format"] == "float"]
    base = min(floats, key=lambda key: statistics.median(turns[key]["cpu"]))
    alike: dict[str, list[str]] = {}
    for key, folder in folders.items():
        alike.setdefault(structure(Path(folder)), []).append(key)
    measured: dict[str, dict[str, float]] = {}
    for keys in alike.values():
        shared: dict[str, float] = {}
        for clock in ("wall", "cpu"):
            ratios = [[mine / its for mine, its in zip(turns[key][clock], turns[base][clock])] for key in keys]
            shared[f"{clock}_ratio"] = statistics.median(statistics.median(each) for each in ratios)
        for key in keys:
            measured[key] = {f"{clock}_us": statistics.median(each) for clock, each in turns[key].items()} | shared
    return measured


def structure(folder: Path) -> str:
    """What a session's pace rests on: operators, what they read of each other, shapes, types, attributes, options."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    names = {each.name: f"{each.data_type}{list(each.dims)}" for each in graph.initializer}
    names |= {each.name: str(index) for index, each in enumerate(graph.input)}
    lines = []
    for node in graph.node:
        attributes = [onnx.helper.printable_attribute(each) for each in node.attribute if node.op_type != "Constant"]
        lines.append(f"{node.op_type} {[names.get(name, '') for name in node.input]} {sorted(attributes)}")
        names |= {name: f"%{len(lines)}.{index}" for index, name in enumerate(node.output)}
    options = folder / "session.json"
    return "\n".join([*lines, options.read_text() if options.exists() else ""])


def _in_a_process(folders: dict[str, str], inputs: dict[str, np.ndarray], rounds: int, seed: int) -> Turns:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timings, folders, inputs, rounds, seed).result()


TARGETS = (("int8-dynamic", 128, 1.8), ("int8-static", 128, 1.8), ("int4-weight", 1, 2.0))
"""How many times faster than the faster float artifact a format is to be, at how many tokens."""


def latencies(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """GPT-2's artifacts with their latency at 128 tokens and at one; prints them and how the targets are met."""
    name = networks.GPT2
    made = build(name, arguments.folder / name, arguments)
    running = {str(index): one for index, one in enumerate(made) if "failure" not in one}
    for one in running.values():
        one["bytes"] = size_of(Path(one["folder"]))
    for length in (128, 1):
        for key, found in latency(running, networks.one_input(name, length), arguments).items():
            for clock in ("wall", "cpu"):
                running[key][f"{clock}_us_{length}"] = found[f"{clock}_us"]
                running[key][f"{clock}_times_{length}"] = 1 / found[f"{clock}_ratio"]
    titles = [f"{length} token{'s' * (length > 1)}, CPU ms | float ÷ it | wall: float ÷ it" for length in (128, 1)]
    print(f"| format | method | of | MB | {' | '.join(titles)} |")
    print("|" + "---|" * 10)
    for one in running.values():
        cells = [one["format"], one["method"], one["source"], f"{one['bytes'] / 1e6:.1f}"]
        for length in (128, 1):
            cells += [f"{one[f'cpu_us_{length}'] / 1e3:.2f}", f"{one[f'cpu_times_{length}']:.2f}"]
            cells += [f"{one[f'wall_times_{length}']:.2f}"]
        print(f"| {' | '.join(cells)} |")
    for form, length, target in TARGETS:
        ours = [one for one in running.values() if one["format"] == form and one["source"] == "recipe"]
        reached = max((one[f"cpu_times_{length}"] for one in ours), default=0.0)
        said = "holds" if reached >= target else "DOES NOT HOLD"
        print(f"{form} at {length} tokens: {reached:.2f} times float, {target} wanted: {said}")
    return made


def size_of(folder: Path) -> int:
    """Bytes of a model and its weights."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def measured(name: str, made: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The artifacts of a network with their quality, size and latency; one that does not run has failed."""
    for one in made:
        if "failure" in one:
            continue
        folder = Path(one["folder"])
        kept = folder.with_name(f"{folder.name}.quality.{arguments.windows}.json")
        try:
            if not kept.exists():
                kept.write_text(json.dumps(quality(folder, name, arguments.windows)))
            one |= json.loads(kept.read_text()) | {"bytes": size_of(folder)}
        except Exception as error:  # noqa: BLE001 — a file that the runtime refuses is a result of this benchmark
            one["failure"] = f"does not run: {' '.join(str(error).split())}"[:400]
    running = {str(index): one for index, one in enumerate(made) if "failure" not in one}
    for key, found in latency(running, networks.one_input(name), arguments).items():
        running[key] |= found
    return made


# ------------------------------------------------------------------------------------------------------------- verdicts


def worse_by(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """By how many bits an item `one` is worse than `other`, and the standard error of that."""
    differences = np.array(one["items"]) - np.array(other["items"])
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def no_worse(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `one` has no more bits than `other`, or more by at most two standard errors."""
    mean, error = worse_by(one, other)
    return mean <= 2 * error


def unmatched(made: Iterable[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """The artifacts of others, of a format, that none of ours is as good as and as fast."""
    running = [one for one in made if "failure" not in one]
    exact = [one for one in running if one["format"] == "float"]
    ours = [one for one in running if one["format"] == form and one["source"] == "recipe"]

    def matches(one: dict[str, Any], other: dict[str, Any]) -> bool:
        as_good = no_worse(one, other) or any(no_worse(one, float_one) for float_one in exact)
        return as_good and one["cpu_ratio"] <= SLOWER * other["cpu_ratio"]

    theirs = [one for one in running if one["format"] == form and one["source"] != "recipe"]
    return [other for other in theirs if not any(matches(one, other) for one in ours)]


def best(made: Iterable[dict[str, Any]], form: str, ours: bool) -> dict[str, Any] | None:
    """The artifact of a format with the fewest bits an item, of ours or of others."""
    found = [
        one for one in made if one["format"] == form and "failure" not in one and (one["source"] == "recipe") == ours
    ]
    return min(found, key=lambda one: one["bits"], default=None)


def label(one: dict[str, Any] | None) -> str:
    if one is None:
        return "none"
    if one["source"] == "recipe":
        return f"{one['method']}{' (float)' if one.get('float') else ''}"
    return f"{one['method']} of {one['source']}"


def table(name: str, made: list[dict[str, Any]]) -> str:
    """A Markdown table of one network: a row for each artifact that runs, best first within its format."""
    unit = "bits per byte" if networks.is_language(name) else "accuracy | bits per image"
    lines = [f"\n### {name}\n", f"| format | artifact | {unit} | ÷ float | MB | CPU ÷ float | wall ÷ float |"]
    lines.append("|" + "---|" * (lines[-1].count("|") - 1))
    floats = [one for one in made if one["format"] == "float" and "failure" not in one]
    base = min(one["bits"] for one in floats)
    for form in ("float", *FORMATS):
        rows = [one for one in made if one["format"] == form and "failure" not in one]
        for one in sorted(rows, key=lambda row: row["bits"]):
            value = f"{one['bits']:.4f}" if networks.is_language(name) else f"{one['accuracy']:.4f} | {one['bits']:.4f}"
            lines.append(
                f"| {form} | {label(one)} | {value} | {one['bits'] / base:.4f} "
                f"| {one['bytes'] / 1e6:.2f} | {one['cpu_ratio']:.2f} | {one['wall_ratio']:.2f} |"
            )
    return "\n".join(lines)


def verdicts(name: str, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each format: our best artifact, others' best, and those of theirs that none of ours matches."""
    found = []
    for form in FORMATS:
        mine, theirs, left = best(made, form, True), best(made, form, False), unmatched(made, form)
        entry: dict[str, Any] = {"network": name, "format": form, "ours": label(mine), "theirs": label(theirs)}
        for who, one in (("ours", mine), ("theirs", theirs)):
            if one is not None:
                entry |= {f"{who}_{key}": one[key] for key in ("bits", "accuracy", "bytes", "cpu_ratio", "wall_ratio")}
        found.append(entry | {"unmatched": [label(one) for one in left]})
    return found


def show(entry: dict[str, Any]) -> str:
    def part(who: str) -> str:
        if f"{who}_bits" not in entry:
            return "none"
        return f"{entry[who]} {entry[f'{who}_bits']:.4f} bits at {entry[f'{who}_cpu_ratio']:.2f}"

    left = entry["unmatched"]
    said = "holds" if not left else f"DOES NOT HOLD: {len(left)} not matched: {', '.join(left[:4])}"
    return f"{entry['network']:24} {entry['format']:28} ours {part('ours')}; theirs {part('theirs')}; {said}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, *(name + networks.OUTLIERS for name in NETWORKS)])
    parser.add_argument("--latency", action="store_true", help="of a network in GPT-2 small's shape, and no quality")
    parser.add_argument("--methods", nargs="+", default=[""], help="others' methods whose names contain one of these")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="our recipes")
    parser.add_argument("--calibration", type=int, default=16, help="sets of inputs: windows, or eight images each")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 256 bytes")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process that measures latency")
    parser.add_argument("--processes", type=int, default=5, help="processes that measure latency, one after the other")
    parser.add_argument("--inc-python", help="interpreter that has neural-compressor 2.x")
    parser.add_argument("--onc-python", help="interpreter that has onnx-neural-compressor")
    parser.add_argument("--olive-python", help="interpreter that has olive-ai")
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, and use those that are there")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        for name in () if arguments.latency else arguments.networks:
            folder = arguments.folder / name
            made = measured(name, build(name, folder, arguments), arguments)
            results.append({"network": name, "artifacts": made, "verdicts": verdicts(name, made)})
            for one in made:
                if "failure" in one:
                    print(f"{name}: {label(one)} failed: {one['failure']}", file=sys.stderr)
            print(table(name, made), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
        if arguments.latency:
            found = latencies(arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))
            return 0
    lines = [show(entry) for result in results for entry in result["verdicts"]]
    print("\n" + "\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([*(table(r["network"], r["artifacts"]) for r in results), "", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
