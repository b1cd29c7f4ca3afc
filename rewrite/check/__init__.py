"""Numbers: is the rewritten network as close to the exact result as the original is?

A float64 evaluation of the captured graph is the truth, the original's own rounding is the measure, and an error that
does not shrink from float32 to float64 is a bug. A proof says that two networks are equal over the reals; this says
what floats make of it. It imports no torch, and onnxruntime only when a model is run.
"""

from rewrite.check.compare import Comparison, compare
from rewrite.check.diff import Difference, diff_models
from rewrite.check.inputs import generate_inputs, label, load_inputs
from rewrite.check.localize import Localization, localize
from rewrite.check.noise import Noise, noise_ratio, two_precisions
from rewrite.check.reference import evaluate, values_of
from rewrite.check.runtime import Session, run, run_original

__all__ = [
    "Comparison",
    "Difference",
    "Localization",
    "Noise",
    "Session",
    "compare",
    "diff_models",
    "evaluate",
    "generate_inputs",
    "label",
    "load_inputs",
    "localize",
    "noise_ratio",
    "run",
    "run_original",
    "two_precisions",
    "values_of",
]
