"""Wrong right-hand sides: each function corrupts a correctly rewritten program as a real tool once did.

Every mutant takes a rewritten `Program` and returns a clone that computes another function; it raises `LookupError`
where the program has nothing to corrupt in that way. A checker must reject each, and accept what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import Editor, is_operator, only_use
from rewrite.ir.program import Program
from rewrite.ir.weights import Add, Center, Constant, MaterializedTensor, Scale, Weight, weight_of

Mutant = Callable[[Program], Program]


def _initializers(program: Program, kind: type[Weight], suffix: str, rank: int | None = None) -> list[ir.Value]:
    """Initializers whose outermost expression is `kind` and whose name ends in `suffix`."""
    found = [
        value
        for value in program.model.graph.initializers.values()
        if isinstance(value.const_value, MaterializedTensor)
        and isinstance(value.const_value.weight, kind)
        and suffix in (value.name or "").rsplit(".", 1)[-1]
        and (rank is None or len(value.const_value.shape) == rank)
    ]
    if not found:
        raise LookupError(f"no {kind.__name__} initializer named *.{suffix}")
    return found


def _expression(value: ir.Value) -> Weight:
    assert value.const_value is not None
    return weight_of(value.const_value)


def _set(value: ir.Value, weight: Weight) -> None:
    assert value.dtype is not None
    value.const_value = MaterializedTensor(weight, value.dtype, value.name)


def _norms(program: Program, *op_types: str) -> list[ir.Node]:
    found = [node for node in program.model.graph if is_operator(node, *op_types)]
    if not found:
        raise LookupError(f"no {' or '.join(op_types)}")
    return found


def _is_read_by(value: ir.Value, op_type: str) -> bool:
    return any(use.node.op_type == op_type for use in value.uses())


# ---------------------------------------------------------------------------------------------------- center-residual


def matrix_not_centred(program: Program) -> Program:
    """One matrix that writes the stream is as it was."""
    mutant = program.clone()
    for value in _initializers(mutant, Center, "centred", 2):
        if _is_read_by(value, "MatMul"):
            _set(value, _expression(value).inner)
            return mutant
    raise LookupError("no centred matrix")


def matrix_centred_along_its_inputs(program: Program) -> Program:
    """PW instead of WP."""
    mutant = program.clone()
    for value in _initializers(mutant, Center, "centred", 2):
        if _is_read_by(value, "MatMul"):
            centred = _expression(value)
            _set(value, Center(centred.inner, 1 - centred.axis))
            return mutant
    raise LookupError("no centred matrix")


def bias_not_centred(program: Program) -> Program:
    """A bias that writes the stream is as it was."""
    mutant = program.clone()
    value = _initializers(mutant, Center, "centred", 1)[0]
    _set(value, _expression(value).inner)
    return mutant


def embedding_not_centred(program: Program) -> Program:
    """The token table is as it was, everything else is centred."""
    mutant = program.clone()
    for value in _initializers(mutant, Center, "centred", 2):
        if _is_read_by(value, "Gather"):
            _set(value, _expression(value).inner)
            return mutant
    raise LookupError("no centred table")


def stale_tied_head(program: Program) -> Program:
    """The tie is kept: the head reads the centred table."""
    mutant = program.clone()
    for table in _initializers(mutant, Center, "centred", 2):
        inner = _expression(table).inner
        for value in list(mutant.model.graph.initializers.values()):
            weight = None if value is table or value.const_value is None else weight_of(value.const_value)
            while isinstance(weight, Scale):
                weight = weight.inner
            if weight is not None and getattr(weight, "tensor", 0) is getattr(inner, "tensor", 1):
                rescaled = _expression(value)
                rescaled = (
                    Scale(_expression(table), rescaled.factor, rescaled.axis) if isinstance(rescaled, Scale) else None
                )
                _set(value, rescaled or _expression(table))
                return mutant
    raise LookupError("no table was untied")


def epsilon_scaled(program: Program) -> Program:
    """ε of the first norm is ten times too large."""
    mutant = program.clone()
    norm = _norms(mutant, "RMSNormalization")[0]
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10.0 * norm.attributes.get_float("epsilon", 1e-5))
    return mutant


def unbiased_variance(program: Program) -> Program:
    """A norm divides by √(Σx²/(d − 1)) instead of √(Σx²/d)."""
    mutant = program.clone()
    norm = _norms(mutant, "RMSNormalization")[0]
    scale = norm.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert scale.dtype is not None
    size = scale.const_value.size
    weight = Scale(_expression(scale), Constant(np.array(((size - 1) / size) ** 0.5)))
    norm.replace_input_with(1, Editor(mutant.model, "mutant").initializer(f"{scale.name}.biased", weight, scale.dtype))
    return mutant


def shift_dropped(program: Program) -> Program:
    """β of a norm is forgotten."""
    mutant = program.clone()
    for norm in _norms(mutant, "RMSNormalization"):
        added = only_use(norm.outputs[0])
        if is_operator(added, "Add") and any(value is not None and value.is_initializer() for value in added.inputs):
            added.outputs[0].replace_all_uses_with(norm.outputs[0])
            return mutant
    raise LookupError("no RMSNormalization with a shift")


def rmsnorm_model_centred(program: Program) -> Program:
    """The embedding of an RMSNorm network is centred, as several released tools do."""
    mutant = program.clone()
    for node in mutant.model.graph:
        table = node.inputs[0] if is_operator(node, "Gather") else None
        if table is None or table.const_value is None or table.dtype is None or len(table.const_value.shape) != 2:
            continue
        weight = Center(_expression(table), 1)
        node.replace_input_with(
            0, Editor(mutant.model, "mutant").initializer(f"{table.name}.centred", weight, table.dtype)
        )
        return mutant
    raise LookupError("no embedding")


# ---------------------------------------------------------------------------------------------------------- fold-norm


def one_reader_unscaled(program: Program) -> Program:
    """γ went into all readers but one."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 2)[0]
    _set(value, _expression(value).inner)
    return mutant


def scale_on_the_outputs(program: Program) -> Program:
    """W·diag(γ) instead of diag(γ)·W, where W is square; else γ reversed."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 2)[0]
    scaled = _expression(value)
    if scaled.inner.shape[0] == scaled.inner.shape[1]:
        _set(value, Scale(scaled.inner, scaled.factor, 1 - scaled.axis))
    else:
        _set(value, Scale(scaled.inner, Constant(scaled.factor.numpy()[::-1].copy()), scaled.axis))
    return mutant


def scale_inverted(program: Program) -> Program:
    """diag(1/γ)·W instead of diag(γ)·W."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 2)[0]
    scaled = _expression(value)
    _set(value, Scale(scaled.inner, Constant(1 / scaled.factor.numpy()), scaled.axis))
    return mutant


def scale_twice(program: Program) -> Program:
    """γ went into the readers and stayed in the norm."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 2)[0]
    factor = _expression(value).factor
    for norm in _norms(mutant, "LayerNormalization", "RMSNormalization"):
        scale = norm.inputs[1]
        if scale is not None and scale.name == f"ones.{factor.shape[0]}" and scale.dtype is not None:
            norm.replace_input_with(1, Editor(mutant.model, "mutant").initializer("gamma", factor, scale.dtype))
            return mutant
    raise LookupError("no norm without a scale")


def folded_shift_dropped(program: Program) -> Program:
    """βW is missing in one bias."""
    mutant = program.clone()
    value = _initializers(mutant, Add, "shifted", 1)[0]
    _set(value, _expression(value).parts[0])
    return mutant


# --------------------------------------------------------------------------------------------------------- fold-scale


def bias_unscaled(program: Program) -> Program:
    """The factor went into the matrix and not into its bias."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 1)[0]
    _set(value, _expression(value).inner)
    return mutant


def factor_squared(program: Program) -> Program:
    """The factor went into a matrix twice."""
    mutant = program.clone()
    value = _initializers(mutant, Scale, "scaled", 2)[0]
    scaled = _expression(value)
    _set(value, Scale(scaled, scaled.factor, scaled.axis))
    return mutant


MUTANTS: dict[str, tuple[Mutant, ...]] = {
    "center-residual": (
        *(matrix_not_centred, matrix_centred_along_its_inputs, bias_not_centred, embedding_not_centred),
        *(stale_tied_head, epsilon_scaled, unbiased_variance, shift_dropped),
    ),
    "fold-norm": (*(one_reader_unscaled, scale_on_the_outputs, scale_inverted, scale_twice, folded_shift_dropped),),
    "fold-scale": (one_reader_unscaled, scale_inverted, bias_unscaled, factor_squared),
    "a network that must be refused": (rmsnorm_model_centred,),
}
