"""Latency of one model, or of two in turn: each in its own session without spinning threads, medians of many rounds.

Idle sessions whose threads spin on the same cores mislead by up to a factor of two, so spinning is off for both.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Median latencies in milliseconds per set of inputs, and b's as a ratio of a's where there are two."""

    inputs: tuple[str, ...]
    a_ms: tuple[float, ...]
    b_ms: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        ratios = [b / a for a, b in zip(self.a_ms, self.b_ms)]
        return {"inputs": list(self.inputs), "a_ms": list(self.a_ms), "b_ms": list(self.b_ms), "ratio": ratios}

    def __str__(self) -> str:
        width = max(len(name) for name in self.inputs)
        lines = []
        for index, name in enumerate(self.inputs):
            line = f"{name:<{width}}  A {self.a_ms[index]:9.3f} ms"
            if self.b_ms:
                line += f"  B {self.b_ms[index]:9.3f} ms  B/A {self.b_ms[index] / self.a_ms[index]:.3f}"
            lines.append(line)
        return "\n".join(lines)


def time_models(a: str, b: str | None, inputs: str | None, rounds: int) -> Timing:
    """Time `a`, or `a` and `b` in turn, on given or generated inputs."""
    from rewrite import pipeline
    from rewrite.check.runtime import Session

    model = pipeline._model(a)
    sets = pipeline._inputs(model, inputs)
    if inputs is None:
        sets = [one for index, one in enumerate(sets) if index < 3]
    sessions = [Session(_file(source), _options(source)) for source in (a, b) if source is not None]
    names = [", ".join(f"{k} {'×'.join(map(str, v.shape))}" for k, v in one.items()) for one in sets]
    medians = [_in_turn(sessions, one, rounds) for one in sets]
    return Timing(
        tuple(names), tuple(m[0] for m in medians), tuple(m[1] for m in medians) if len(sessions) == 2 else ()
    )


def _in_turn(sessions: list[Any], one: dict[str, np.ndarray], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(one)
    for _ in range(rounds):
        for index, session in enumerate(sessions):
            begin = time.perf_counter()
            session.run(one)
            times[index].append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(each) for each in times]


def _file(source: str) -> Any:
    from rewrite import pipeline
    from rewrite.artifact import MODEL

    path = Path(source)
    if path.suffix == ".onnx":
        return path
    return path / MODEL if (path / MODEL).is_file() else pipeline._model(source)


def _options(source: str) -> Any:
    import onnxruntime

    from rewrite.targets import session_options

    options = session_options(Path(source)) if Path(source).is_dir() else onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
