"""Subgraphs: If and Loop."""

from __future__ import annotations

import numpy as np

from rewrite.check.operators.registry import Call, Operand, dense, operator


@operator("If")
def if_(call: Call, condition: np.ndarray) -> tuple[Operand, ...]:
    branch = "then_branch" if bool(np.reshape(condition, ())) else "else_branch"
    return tuple(call.run_graph(call.attribute(branch), ()))


@operator("Loop", lazy=True)
def loop(call: Call, count: Operand, condition: Operand, *carried: Operand) -> tuple[Operand, ...]:
    """`body(i, condition, *carried) -> condition, *carried, *scans`; scan outputs are stacked over the iterations."""
    body = call.attribute("body")
    limit = None if count is None else int(np.reshape(dense(count, call.precision), ()))
    running = condition is None or bool(np.reshape(dense(condition, call.precision), ()))
    values, scans, i = list(carried), [[] for _ in body.outputs[1 + len(carried) :]], 0
    while running and (limit is None or i < limit):
        results = call.run_graph(body, (np.array(i, np.int64), np.array(True), *values))
        running = bool(np.reshape(dense(results[0], call.precision), ()))
        values = results[1 : 1 + len(carried)]
        for scan, item in zip(scans, results[1 + len(carried) :]):
            scan.append(dense(item, call.precision))
        i += 1
    if any(not scan for scan in scans):
        raise call.unsupported("ran no iteration, so the shape of its scan outputs is unknown")
    return (*values, *(np.stack(scan) for scan in scans))
