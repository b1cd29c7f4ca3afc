if __name__ == "targets":
    raise ImportError(
        "imported as 'targets', expected 'rewrite.targets': write `import rewrite.targets` and take the repository "
        "root off sys.path"
    )

__doc__ = """Where a rewritten network runs: one deployment, one file.

A target lowers a program to the kernels its runtime has and runs fastest, as measured (`ort_cpu.py` has the figures),
and says which session options go with the model and what they may change numerically. Lowering is inside the proof:
the file it gives is what the checker relates to the capture, so the fused operators a target emits are few and listed.
`TARGETS` is all there are; nothing is discovered.
"""

from rewrite.targets.ort_cpu import OrtCpu
from rewrite.targets.ort_cuda import OrtCuda
from rewrite.targets.target import Target, open_session, session_options

TARGETS: tuple[Target, ...] = (OrtCpu(), OrtCuda())

__all__ = ["TARGETS", "OrtCpu", "OrtCuda", "Target", "open_session", "session_options"]
