"""Brings every source to one vocabulary, so that passes match one form of each thing.

    Gemm → MatMul + Add            reshapes to two axes around a linear map → gone
    Transpose(weight) → weight     Pow/ReduceMean/Sqrt/… → RMSNormalization, LayerNormalization
    Constant → initializer         max(x, 0) → Relu,   repeated keys and values → grouped Attention
    Identity, no-op Cast, Slice, Expand, Reshape, Transpose and Dropout in inference → gone

All of it is inside the proof: the checker relates the raw capture to the result, so every step here is equal over the
reals. A step that cannot see that its condition holds leaves the graph as it is. Only operators of the model's own
opset are used: norms are raised to RMSNormalization from opset 23, LayerNormalization from 17.
"""

from __future__ import annotations

from rewrite.capture.canonicalize_activations import raise_relu
from rewrite.capture.canonicalize_attention import group_repeated_heads
from rewrite.capture.canonicalize_linear import fold_transposes, split_gemms, undo_flattening
from rewrite.capture.canonicalize_norms import raise_norms
from rewrite.capture.canonicalize_structure import (
    complete_shapes,
    constants_to_initializers,
    fold_vectors,
    remove_no_ops,
    replace_sequences,
)
from rewrite.ir.edit import Editor
from rewrite.ir.program import Program

ORIGIN = "canonicalize"

STEPS = (
    constants_to_initializers,
    replace_sequences,
    complete_shapes,
    remove_no_ops,
    Editor.dedupe,
    split_gemms,
    undo_flattening,
    fold_transposes,
    fold_vectors,
    raise_norms,
    raise_relu,
    group_repeated_heads,
    remove_no_ops,
    Editor.dedupe,
    Editor.clean,
)
"""In this order: shapes are completed before they are compared, vectors folded before a norm looks for its scale."""


def canonicalize(program: Program) -> None:
    """Bring `program.model` to the common vocabulary, in place."""
    editor = Editor(program.model, ORIGIN)
    for step in STEPS:
        step(editor)
