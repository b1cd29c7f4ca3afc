"""Latency of our artifact against the exporter's two, as ratios of medians.

    python benchmarks/latency.py --models bytegpt llama --batch 1 --length 64 --json latency.json

The peer is `transformers.exporters`: its plain export at its default opset, and the same with `ort_fusions="cpu"`. All
three come from one module with random weights, and each runs in a process of its own: sessions that share a process
also share cores with each other's spinning threads, which misleads by up to a factor of two. The processes take turns
in short rounds, so that whatever else the machine does falls on all of them alike. A graph that cannot be built, or
that fails at the batch asked for, is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

ARTIFACTS = ("ours", "plain", "fused")


def gpt2_small(layers: int | None):
    """The shape of GPT-2 small."""
    return _gpt2(layers or 12, width=768, heads=12, vocabulary=50257, positions=1024)


def bytegpt(layers: int | None):
    """A small byte-level language model."""
    return _gpt2(layers or 6, width=256, heads=8, vocabulary=256, positions=512)


def _gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False))


def llama(layers: int | None):
    """A small Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers or 6, hidden_size=256, intermediate_size=688, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def vit(layers: int | None):
    """The shape of ViT tiny at 224 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_hidden_layers=layers or 12, hidden_size=192, intermediate_size=768, num_attention_heads=3)
    return ViTForImageClassification(config)


MODELS: dict[str, Callable] = {"gpt2-small": gpt2_small, "bytegpt": bytegpt, "llama": llama, "vit": vit}


def example(module, batch: int, length: int) -> dict[str, np.ndarray]:
    """Inputs of a module: token ids without padding, or an image."""
    random = np.random.default_rng(0)
    config = module.config
    if hasattr(config, "image_size"):
        return {"pixel_values": random.standard_normal((batch, 3, config.image_size, config.image_size), np.float32)}
    tokens = random.integers(0, config.vocab_size, (batch, length))
    return {"input_ids": tokens, "attention_mask": np.ones((batch, length), np.int64)}


def build(name: str, layers: int | None, folder: Path) -> dict[str, str]:
    """Write the three artifacts of a model under `folder`; returns what went wrong, by artifact."""
    import torch

    torch.manual_seed(0)
    module = MODELS[name](layers).eval()
    inputs = {key: torch.from_numpy(array) for key, array in example(module, 2, 16).items()}
    failures = {}
    for artifact in ARTIFACTS:
        target = folder / artifact
        target.mkdir(parents=True, exist_ok=True)
        try:
            _build_ours(module, inputs, target) if artifact == "ours" else _build_peer(module, inputs, artifact, target)
        except Exception as error:  # noqa: BLE001 — a peer that fails is a result of this benchmark
            failures[artifact] = f"{type(error).__name__}: {error}".splitlines()[0]
    return failures


def _build_ours(module, inputs: dict, target: Path) -> None:
    import rewrite
    from rewrite.capture.canonicalize import canonicalize
    from rewrite.targets import OrtCpu

    program = rewrite.capture(module, inputs)
    canonicalize(program)
    OrtCpu().save(program, target)


def _build_peer(module, inputs: dict, artifact: str, target: Path) -> None:
    from torch.export import Dim
    from transformers.exporters import OnnxConfig, OnnxExporter

    axes = {key: dict.fromkeys(range(1 if tensor.ndim == 4 else 2), Dim.DYNAMIC) for key, tensor in inputs.items()}
    config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu" if artifact == "fused" else None)
    exported = OnnxExporter().export(module, dict(inputs), config=config)
    OnnxExporter.save_program(exported.program, target / "model.onnx")


def opened(folder: Path, threads: int):
    """A session of an artifact: by its `session.json` where it has one, else with the runtime's default options."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    if (folder / "session.json").exists():
        from rewrite.targets import open_session

        return open_session(folder, intra_op_num_threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def serve(folder: Path, inputs: dict[str, np.ndarray], threads: int, connection: Connection, clock: str) -> None:
    """In its own process: open the artifact, then for each count received send that many latencies in seconds."""
    now = getattr(time, clock)
    try:
        session = opened(folder, threads)
        session.run(None, inputs)
    except Exception as error:  # noqa: BLE001 — a graph that does not run is a result of this benchmark
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    connection.send(None)
    while count := connection.recv():
        latencies = []
        for _ in range(count):
            start = now()
            session.run(None, inputs)
            latencies.append(now() - start)
        connection.send(latencies)


def measure(
    folders: dict[str, Path], inputs: dict[str, np.ndarray], threads: int, rounds: int, clock: str = "perf_counter"
) -> tuple[dict, dict]:
    """Latencies in seconds by artifact, in interleaved rounds of about 0.1 s, and failures by artifact.

    clock: a function of `time`; with one thread, "thread_time" leaves out what other processes take of the core.
    """
    context = multiprocessing.get_context("spawn")
    workers, failures, latencies = {}, {}, {}
    for artifact, folder in folders.items():
        ours, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(folder, inputs, threads, theirs, clock), daemon=True)
        worker.start()
        failure = ours.recv()
        if failure is None:
            workers[artifact] = (worker, ours)
            latencies[artifact] = []
        else:
            failures[artifact] = failure
            worker.join()
    counts = {}
    for artifact, (_, connection) in workers.items():
        connection.send(3)
        counts[artifact] = max(1, int(0.1 / statistics.median(connection.recv())))
    for turn in range(rounds):
        for artifact in sorted(workers, reverse=bool(turn % 2)):
            connection = workers[artifact][1]
            connection.send(counts[artifact] + 1)
            # The first run of a turn wakes the threads up and refills the caches the others used.
            latencies[artifact] += connection.recv()[1:]
    for worker, connection in workers.values():
        connection.send(0)
        worker.join()
    return latencies, failures


def compare(name: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """The result for one model, as it goes into the JSON."""
    built = folder / "failures.json"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        built.write_text(json.dumps(build(name, arguments.layers, folder)))
    failures = json.loads(built.read_text())
    module = MODELS[name](1)
    inputs = example(module, arguments.batch, arguments.length)
    folders = {artifact: folder / artifact for artifact in ARTIFACTS if artifact not in failures}
    latencies, failed = measure(folders, inputs, arguments.threads, arguments.rounds)
    medians = {artifact: statistics.median(times) * 1e6 for artifact, times in latencies.items()}
    peers = [medians[artifact] for artifact in ("plain", "fused") if artifact in medians]
    ratio = medians["ours"] / min(peers) if "ours" in medians and peers else None
    return {
        "model": name, "batch": arguments.batch, "length": arguments.length, "threads": arguments.threads,
        "median_us": medians, "ratio_to_best_peer": ratio, "failures": {**failures, **failed},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer or more layers than the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, and use those that are there")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            result = compare(name, arguments, (arguments.folder or Path(temporary)) / name)
            results.append(result)
            times = "  ".join(f"{artifact} {median:,.0f} µs" for artifact, median in result["median_us"].items())
            ratio = result["ratio_to_best_peer"]
            print(f"{name}: {times}  ours/best peer {'–' if ratio is None else f'{ratio:.3f}'}")
            for artifact, failure in result["failures"].items():
                print(f"  {artifact} failed: {failure}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
