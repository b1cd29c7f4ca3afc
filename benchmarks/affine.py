"""Latency of networks whose norms and branches are folded, against the exporter's graph and onnxsim's, as ratios.

    python benchmarks/affine.py --models repvgg-160 vit-un --rounds 20 --json affine.json

The networks are those of `affine_networks.py`. Batch 1, one thread. Each artifact of a network is of the same module:

    ours        `rewrite convert` with the default recipe, opened by its session.json
    none        the same with recipe "none": canonical form and lowering, no pass
    plain       `torch.onnx.export` as it is by default, where its optimizer already folds a BatchNormalization behind
                a convolution; run with the runtime's default options, so with all of the runtime's own fusions
    unfolded    the same with `optimize=False`: what is fused is fused by the runtime
    onnxsim     what onnxsim (a package of its own, `pip install onnxsim`) makes of plain
    plain+, onnxsim+    these two with the options of our session.json, so that what is left is the rewriting's

Before anything is timed, each artifact's outputs in that very session are compared with the module's in float64, and
judged by the noise of the module in float32; what is wrong is reported and not timed. Timing is `latency.py`'s: a
process for each artifact, turns of about 0.1 s, medians. Networks of one image size are timed in the same rounds.
`--cpu-time` takes the thread's time in place of the wall's: where other processes want the cores it moves less.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from affine_networks import NETWORKS, made, side_of
from latency import measure, opened

PEERS = ("none", "plain", "unfolded", "onnxsim", "plain+", "onnxsim+")


def build(network: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Write a network's artifacts under `folder`; returns what is known of them before they are timed."""
    import onnx
    import torch

    from rewrite import convert

    model = made(network, quick)
    image = image_for(network)
    example = {name: torch.randn(2, *array.shape[1:]) for name, array in image.items()}
    facts: dict[str, Any] = {"network": network, "parameters": sum(p.numel() for p in model.parameters())}
    makers = {
        "ours": partial(convert, model, example_inputs=example, check=False),
        "none": partial(convert, model, example_inputs=example, check=False, recipe="none"),
        "plain": partial(_exported, model, example, True),
        "unfolded": partial(_exported, model, example, False),
        "onnxsim": partial(_simplified, folder / "plain"),
        "plain+": partial(_with_our_options, folder / "plain", folder / "ours"),
        "onnxsim+": partial(_with_our_options, folder / "onnxsim", folder / "ours"),
    }
    failures, facts["operators"] = {}, {}
    for artifact, make in makers.items():
        try:
            report = make(folder / artifact)
            if artifact == "ours":
                facts["verdict"] = report.verdict
            judge(model, image, folder / artifact)
            graph = onnx.load(folder / artifact / "model.onnx", load_external_data=False).graph
            facts["operators"][artifact] = dict(Counter(node.op_type for node in graph.node).most_common())
        except Exception as error:  # noqa: BLE001 — an artifact that fails, or is wrong, is a result of this benchmark
            failures[artifact] = f"{type(error).__name__}: {error}".splitlines()[0]
            shutil.rmtree(folder / artifact, ignore_errors=True)
    return facts | {"failures": failures}


def _exported(model, example: dict, optimize: bool, target: Path) -> None:
    import torch

    axes = {name: {0: torch.export.Dim.DYNAMIC} for name in example}
    program: Any = torch.onnx.export(
        model, (), kwargs=example, dynamo=True, optimize=optimize, dynamic_shapes=axes, verbose=False
    )
    target.mkdir(parents=True)
    program.save(target / "model.onnx")


def _simplified(plain: Path, target: Path) -> None:
    import onnx
    import onnxsim

    model, checked = onnxsim.simplify(onnx.load(plain / "model.onnx"))
    if not checked:
        raise ValueError("onnxsim's own check of its result failed")
    target.mkdir(parents=True)
    onnx.save(model, target / "model.onnx")


def _with_our_options(peer: Path, ours: Path, target: Path) -> None:
    shutil.copytree(peer, target)
    shutil.copy(ours / "session.json", target)


def answer(folder: Path, image: dict[str, np.ndarray]) -> np.ndarray:
    """What an artifact gives, in the session that is timed; for a process of its own, whose denormals it may flush."""
    return np.asarray(opened(folder, 1).run(None, image)[0])


def judge(model, image: dict[str, np.ndarray], folder: Path) -> None:
    """Raise ValueError where an artifact is further from the module in float64 than the noise of float32 allows."""
    import torch

    from rewrite.check import Noise, compare

    inputs = {name: torch.from_numpy(array) for name, array in image.items()}
    with torch.inference_mode():
        reference = copy.deepcopy(model).double()(**{name: x.double() for name, x in inputs.items()}).numpy()
        noise = Noise.of(model(**inputs).numpy(), reference)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        given = pool.submit(answer, folder, image).result()
    judged = compare(given, reference, np.float32, noise)
    if not judged.accepted:
        raise ValueError(str(judged))


def image_for(network: str) -> dict[str, np.ndarray]:
    """The input of batch 1, the same each time."""
    side = side_of(network)
    return {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)}


def timed(networks: list[str], arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The results of networks of one image size, as they go into the JSON."""
    results = []
    for network in networks:
        facts = folder / network / "facts.json"
        if not facts.exists():
            facts.parent.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(build(network, arguments.quick, facts.parent)))
        results.append(json.loads(facts.read_text()))
    keys = [f"{result['network']}/{artifact}" for result in results for artifact in result["operators"]]
    clock = "thread_time" if arguments.cpu_time else "perf_counter"
    latencies, failed = measure({key: folder / key for key in keys}, image_for(networks[0]), 1, arguments.rounds, clock)
    for result in results:
        own = {artifact: f"{result['network']}/{artifact}" for artifact in result["operators"]}
        result["failures"] |= {artifact: failed[key] for artifact, key in own.items() if key in failed}
        times = {artifact: np.array(latencies[key]) * 1e6 for artifact, key in own.items() if key in latencies}
        result["quartiles_us"] = {artifact: np.percentile(each, (25, 75)).tolist() for artifact, each in times.items()}
        medians = result["median_us"] = {artifact: float(np.median(each)) for artifact, each in times.items()}
        result["ours_to"] = {peer: medians["ours"] / medians[peer] for peer in PEERS if {"ours", peer} <= set(medians)}
        result |= {"rounds": arguments.rounds, "clock": clock}
    return results


def show(results: list[dict[str, Any]]) -> None:
    """The table, and the transformers without LayerNorm as ratios of the one with it."""
    print(f"{'':16}{'ours µs':>9}" + "".join(f"{'÷ ' + peer:>12}" for peer in PEERS) + "  verdict")
    for result in results:
        ratios = "".join(f"{result['ours_to'].get(peer, float('nan')):>12.3f}" for peer in PEERS)
        latency = result["median_us"].get("ours", float("nan"))
        print(f"{result['network']:16}{latency:>9.0f}{ratios}  {result.get('verdict', 'none')}")
    base = next((result["median_us"] for result in results if result["network"] == "vit-layernorm"), {})
    for result in results:
        if result["network"] in ("vit-prepbn", "vit-un"):
            shares = [f"{a} {latency / base[a]:.3f}" for a, latency in result["median_us"].items() if a in base]
            print(f"{result['network']} ÷ vit-layernorm: {', '.join(shares)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="of the one thread: for a machine that is not idle")
    parser.add_argument("--quick", action="store_true", help="fewer blocks: to see that it works")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, and use those that are there")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for _, group in groupby(sorted(arguments.models, key=side_of), side_of):
            results += timed(list(group), arguments, arguments.folder or Path(temporary))
    for result in results:
        for artifact, failure in result["failures"].items():
            print(f"{result['network']}: {artifact} failed: {failure}", file=sys.stderr)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
