"""Conversion: time and peak memory from a checkpoint to a verified artifact, against transformers.exporters.

    python benchmarks/conversion.py [gpt2-small] [llama-1.1b] [--json FILE] [--rounds N]

Random weights, written by the benchmark as a sharded safetensors checkpoint in a temporary folder. Each measurement is
a process of its own; time is wall time, memory the largest resident set that the operating system accounts to it. The
peer loads the checkpoint and exports and saves it the way its documentation does; ours is `rewrite convert --no-check`
(which captures, rewrites, lowers, saves and proves), and beside it `rewrite verify` on the two files, both again with
every rotation (`--recipe rotate`), and the streamed float64 evaluation of the capture. Ratios are ours over the peer's,
of medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "gpt2-small": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}),
    "llama-1.1b": (
        "llama",
        {
            **{"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
            **{"intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 2048},
        },
    ),
}

MAKE = """
import sys, json, torch, transformers
family, shape, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
config = transformers.AutoConfig.for_model(family, **shape)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
model.save_pretrained(out, max_shard_size="1GB")
"""

PEER = """
import sys, torch, transformers
from transformers.exporters import OnnxConfig, OnnxExporter
source, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
model.config.use_cache = False
ids = torch.randint(0, 100, (2, 16))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
config = OnnxConfig(dynamic_shapes={name: free for name in inputs})
OnnxExporter().export(model, inputs, config=config).save_pretrained(out)
"""

REFERENCE = """
import sys, numpy as np
from rewrite.capture.onnx_file import load_onnx
from rewrite.check import evaluate
ids = np.random.default_rng(0).integers(0, 100, (2, 16))
evaluate(load_onnx(sys.argv[1]), {"input_ids": ids, "attention_mask": np.ones_like(ids)})
"""


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of a process, which must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command[:4])} … failed:\n{error.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 2**20


def benchmark(name: str, rounds: int) -> dict[str, object]:
    family, shape = SHAPES[name]
    python = [sys.executable, "-W", "ignore", "-c"]
    cli = [sys.executable, "-m", "rewrite.cli"]
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="conversion-") as scratch:
        checkpoint = str(Path(scratch) / "checkpoint")
        measured([*python, MAKE, family, json.dumps(shape), checkpoint])
        again = ["--no-check", "--force"]
        for turn in range(rounds):
            commands = {
                "peer": [*python, PEER, checkpoint, f"{scratch}/peer"],
                "convert": [*cli, "convert", checkpoint, "-o", f"{scratch}/out", *again],
                "capture": [*cli, "capture", checkpoint, "-o", f"{scratch}/original.onnx", "--force"],
                "verify": [*cli, "verify", f"{scratch}/original.onnx", f"{scratch}/out"],
                "rotate": [*cli, "convert", checkpoint, "-o", f"{scratch}/out", "--recipe", "rotate", *again],
                "verify rotated": [*cli, "verify", f"{scratch}/original.onnx", f"{scratch}/out"],
                "float64": [*python, REFERENCE, f"{scratch}/original.onnx"],
            }
            for what, command in commands.items():
                figures.setdefault(what, []).append(measured(command))
                print(f"{name} round {turn + 1}: {what} {figures[what][-1][0]:.1f} s, "
                      f"{figures[what][-1][1]:.2f} GiB", file=sys.stderr)  # fmt: skip
    medians = {what: tuple(statistics.median(run[i] for run in runs) for i in (0, 1)) for what, runs in figures.items()}
    peer = medians["peer"]
    return {
        "model": name,
        "rounds": rounds,
        "seconds": {what: m[0] for what, m in medians.items()},
        "peak_gib": {what: m[1] for what, m in medians.items()},
        "time_ratio": {what: m[0] / peer[0] for what, m in medians.items()},
        "memory_ratio": {what: m[1] / peer[1] for what, m in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    results = [benchmark(name, given.rounds) for name in given.models]
    for result in results:
        print(f"\n{result['model']} (medians of {result['rounds']})")
        print(f"{'':16}{'seconds':>10}{'÷ peer':>8}{'GiB':>8}{'÷ peer':>8}")
        for what, seconds in result["seconds"].items():
            ratio, memory, share = (result[k][what] for k in ("time_ratio", "peak_gib", "memory_ratio"))
            print(f"{what:16}{seconds:>10.1f}{ratio:>8.2f}{memory:>8.2f}{share:>8.2f}")
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
