"""Every thread of every operator, evaluated: a transform of the role's class goes through it, in float64.

A MOVE is tried with a dense matrix and a shift, linear roles with a dense matrix, others with the widest class that
they let pass. The cases cover every operator of `OPERATORS`.
"""

import numpy as np
import onnx_ir as ir
import pytest
from networks import network

from rewrite.check.reference import evaluate
from rewrite.ir.axes import OPERATORS, Role, Thread, follow
from rewrite.ir.edit import constant_of

UNARY = """n (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = OP (x) }"""
CASES = {
    **{
        name: UNARY.replace("OP", name)
        for name in (
            *("Identity", "Dropout", "Neg", "Relu", "Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
            *("HardSwish", "Mish", "Reciprocal", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "LeakyRelu", "Log"),
            *("Sqrt", "Softmax"),
        )
    },
    "Cast": "n (float[2, 3, 4] x) => (double[2, 3, 4] y) { y = Cast <to = 11> (x) }",
    "CastLike": "n (float[2, 3, 4] x, float[1] l) => (float[2, 3, 4] y) { y = CastLike (x, l) }",
    "Transpose": "n (float[2, 3, 4] x) => (float[4, 2, 3] y) { y = Transpose <perm = [2, 0, 1]> (x) }",
    "Transpose by default": "n (float[2, 3, 4] x) => (float[4, 3, 2] y) { y = Transpose (x) }",
    "Reshape": """n (float[2, 3, 4] x) => (float[6, 4] y)
        { s = Constant <value_ints = [6, 4]> () y = Reshape (x, s) }""",
    "Reshape in the middle": """n (float[2, 3, 4, 5] x) => (float[2, 3, 20] y)
        { s = Constant <value_ints = [2, 3, 20]> () y = Reshape (x, s) }""",
    "Reshape that splits": """n (float[3, 8] x) => (float[3, 2, 4] y)
        { s = Constant <value_ints = [3, 2, 4]> () y = Reshape (x, s) }""",
    "Flatten": "n (float[2, 3, 4] x) => (float[6, 4] y) { y = Flatten <axis = 2> (x) }",
    "Squeeze": """n (float[2, 1, 4] x) => (float[2, 4] y)
        { a = Constant <value_ints = [1]> () y = Squeeze (x, a) }""",
    "Unsqueeze": """n (float[2, 4] x) => (float[2, 1, 4, 1] y)
        { a = Constant <value_ints = [1, -1]> () y = Unsqueeze (x, a) }""",
    "Expand": """n (float[1, 4] x) => (float[2, 3, 4] y)
        { s = Constant <value_ints = [2, 3, 4]> () y = Expand (x, s) }""",
    "Slice": """n (float[2, 5, 4] x) => (float[2, 2, 4] y) {
        b = Constant <value_ints = [1, 0]> () e = Constant <value_ints = [5, 9]> ()
        a = Constant <value_ints = [1, 2]> () s = Constant <value_ints = [2, 1]> () y = Slice (x, b, e, a, s) }""",
    "Split": """n (float[2, 6, 4] x) => (float[2, 3, 4] y, float[2, 3, 4] z)
        { y, z = Split <axis = 1, num_outputs = 2> (x) }""",
    "Concat": "n (float[2, 3, 4] x, float[2, 5, 4] z) => (float[2, 8, 4] y) { y = Concat <axis = 1> (x, z) }",
    "Gather": "n (float[7, 4] x, int64[2, 3] i) => (float[2, 3, 4] y) { y = Gather (x, i) }",
    "Gather in the middle": "n (float[2, 7, 4] x, int64[3] i) => (float[2, 3, 4] y) { y = Gather <axis = 1> (x, i) }",
    "Gather of one": "n (float[2, 7, 4] x, int64 i) => (float[2, 4] y) { y = Gather <axis = 1> (x, i) }",
    "GatherND": "n (float[3, 3, 4] x, int64[5, 2, 1] i) => (float[5, 2, 3, 4] y) { y = GatherND (x, i) }",
    "GatherND in batches": """n (float[3, 3, 4] x, int64[3, 2, 1] i) => (float[3, 2, 4] y)
        { y = GatherND <batch_dims = 1> (x, i) }""",
    "Pad": """n (float[2, 3, 4] x) => (float[2, 5, 4] y)
        { a = Constant <value_ints = [0, 1, 0, 0, 1, 0]> () y = Pad (x, a) }""",
    "Pad by reflection": """n (float[2, 3, 4] x) => (float[2, 5, 4] y)
        { a = Constant <value_ints = [0, 1, 0, 0, 1, 0]> () y = Pad <mode = "reflect"> (x, a) }""",
    "ConstantOfShape": """n (float[2, 4] x) => (float[2, 4] y)
        { s = Constant <value_ints = [2, 4]> () z = ConstantOfShape (s) y = Add (x, z) }""",
    "Add": "n (float[2, 3, 4] x, float[4] b) => (float[2, 3, 4] y) { y = Add (x, b) }",
    "Sub": "n (float[2, 1, 4] x, float[3, 4] b) => (float[2, 3, 4] y) { y = Sub (x, b) }",
    "Sum": "n (float[2, 3, 4] x, float[3, 4] b, float[2, 3, 4] z) => (float[2, 3, 4] y) { y = Sum (x, b, z) }",
    "Mul by a row": "n (float[2, 3, 4] x, float[2, 3, 1] r) => (float[2, 3, 4] y) { y = Mul (x, r) }",
    "Mul": "n (float[2, 3, 4] x, float[2, 3, 4] u) => (float[2, 3, 4] y) { y = Mul (x, u) }",
    "Mul by constants": """n (float[3, 2] x) => (float[3, 2] y)
        { v = Constant <value = float[2] {2.0, -3.0}> () y = Mul (v, x) }""",
    "Div by a row": "n (float[2, 3, 4] x, float[3, 1] r) => (float[2, 3, 4] y) { y = Div (x, r) }",
    "Div": "n (float[1, 1, 1] r, float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Div (r, x) }",
    "Where": """n (float[2, 3, 4] x, float[2, 3, 4] z, float[2, 3, 1] c) => (float[2, 3, 4] y)
        { zero = Constant <value_float = 0.5> () k = Greater (c, zero) y = Where (k, x, z) }""",
    "Where zero": """n (float[2, 3, 4] x, float[2, 3, 1] c) => (float[2, 3, 4] y) {
        h = Constant <value_float = 0.5> () z = Constant <value_float = 0.0> ()
        k = Greater (c, h) y = Where (k, z, x) }""",
    "MatMul": "n (float[2, 3, 4] x, float[4, 5] w) => (float[2, 3, 5] y) { y = MatMul (x, w) }",
    "MatMul of batches": "n (float[2, 3, 4] x, float[2, 4, 5] w) => (float[2, 3, 5] y) { y = MatMul (x, w) }",
    "Conv": """n (float[2, 3, 5, 5] x, float[4, 3, 2, 2] w, float[4] b) => (float[2, 4, 4, 4] y)
        { y = Conv <pads = [0, 0, 0, 0], kernel_shape = [2, 2]> (x, w, b) }""",
    "Conv in groups": """n (float[2, 4, 5] x, float[4, 1, 2] w) => (float[2, 4, 4] y)
        { y = Conv <group = 4, kernel_shape = [2]> (x, w) }""",
    "ConvTranspose": """n (float[2, 3, 5] x, float[3, 4, 2] w, float[4] b) => (float[2, 4, 6] y)
        { y = ConvTranspose <kernel_shape = [2]> (x, w, b) }""",
    **{
        f"{name} to {shape}": f"""n (float[2, 3, 4] x) => (float{shape} y)
            {{ a = Constant <value_ints = [1]> () y = {name} <keepdims = {keep}> (x, a) }}"""
        for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin")
        for keep, shape in ((1, "[2, 1, 4]"), (0, "[2, 4]"))
    },
    **{
        name: f"n (float[2, 3, 4, 4] x) => (float[2, 3, 3, 3] y) {{ y = {name} <kernel_shape = [2, 2]> (x) }}"
        for name in ("AveragePool", "MaxPool")
    },
    **{
        name: f"n (float[2, 3, 4, 4] x) => (float[2, 3, 1, 1] y) {{ y = {name} (x) }}"
        for name in ("GlobalAveragePool", "GlobalMaxPool")
    },
    "LayerNormalization": """n (float[2, 3, 4] x, float[4] g, float[4] b) => (float[2, 3, 4] y)
        { y = LayerNormalization (x, g, b) }""",
    "LayerNormalization of two axes": """n (float[2, 3, 4] x, float[3, 4] g) => (float[2, 3, 4] y)
        { y = LayerNormalization <axis = 1> (x, g) }""",
    "RMSNormalization": "n (float[2, 3, 4] x, float[4] g) => (float[2, 3, 4] y) { y = RMSNormalization (x, g) }",
    "Attention": """n (float[2, 3, 4, 5] q, float[2, 3, 6, 5] k, float[2, 3, 6, 7] v) => (float[2, 3, 4, 7] y)
        { y = Attention (q, k, v) }""",
    "Clip": "n (float[3, 4] x, float l, float h) => (float[3, 4] y) { y = Clip (x, l, h) }",
    **{
        name: f"n (float[2, 3, 4] x, float[3, 4] z) => (float[2, 3, 4] y) {{ y = {name} (x, z) }}"
        for name in ("Max", "Min", "Pow")
    },
    "Swish": "",  # opset 24; the text helper writes 23
}

LINEAR_ROLES = {Role.MOVE, Role.SUM, Role.LINEAR, Role.SCALE}


def transform_for(role: Role, size: int, generator: np.random.Generator) -> tuple[np.ndarray, float | np.ndarray]:
    """The widest transform that a role lets through: a matrix, and a shift for a MOVE."""
    if role in LINEAR_ROLES:
        return generator.normal(size=(size, size)), generator.normal(size=size) if role is Role.MOVE else 0.0
    if role is Role.CHANNEL_SCALE:
        return np.diag(generator.normal(size=size)), 0.0
    if role is Role.HOMOGENEOUS:
        return np.diag(np.exp(generator.normal(size=size))), 0.0
    return np.eye(size)[generator.permutation(size)], 0.0


def along(array: np.ndarray, axis: int, matrix: np.ndarray, shift: float | np.ndarray = 0.0) -> np.ndarray:
    return np.moveaxis(np.moveaxis(array, axis, -1) @ matrix + shift, -1, axis)


def check(model: ir.Model, node: ir.Node, thread: Thread, feeds: dict[str, np.ndarray]) -> None:
    position, axis = (thread.inputs or thread.outputs)[0]
    size = (node.inputs if thread.inputs else node.outputs)[position].shape[axis]
    matrix, shift = transform_for(thread.role, size, np.random.default_rng(1))
    changed = dict(feeds)
    for place, (operand, axis) in enumerate(thread.inputs):
        name = node.inputs[operand].name
        if name not in feeds:
            return  # an operand computed inside the case: reached from its other side
        if thread.role is Role.CONTRACT and place == 1:
            changed[name] = along(feeds[name], axis, np.linalg.inv(matrix).T)
        else:
            changed[name] = along(feeds[name], axis, matrix, shift)
    before, after = evaluate(model, feeds), evaluate(model, changed)
    places = dict(thread.outputs)
    for index, value in enumerate(node.outputs):
        if value.name not in before:
            continue
        expected = before[value.name]
        if thread.role is not Role.CONTRACT:
            assert index in places, f"{node.op_type} result {index} is not on the thread"
            expected = along(expected, places[index], matrix, shift)
        rounding = np.finfo(float).eps * 1e3 * np.linalg.cond(matrix) * np.abs(expected).max()
        assert np.abs(expected - after[value.name]).max() <= rounding, thread


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("Swish", "Conv in groups")])
def test_threads_let_their_role_through(case: str) -> None:
    text = CASES[case]
    names = [part.split()[-1] for part in text[text.index("(") + 1 : text.index(")")].split(",") if " " in part.strip()]
    program = network(text, [name.rstrip(")") for name in names if "]" not in name])
    generator = np.random.default_rng(0)
    feeds = {
        value.name: generator.integers(0, 3, tuple(value.shape))
        if value.dtype.is_integer()
        else generator.uniform(0.2, 1.5, tuple(value.shape))
        for value in program.model.graph.inputs
    }
    tried = 0
    for node in program.model.graph:
        for thread in OPERATORS.get(node.op_type, lambda node: ())(node):
            if thread.role is not Role.OPAQUE and not any(
                constant_of(node.inputs[position]) is not None for position, _ in thread.inputs
            ):
                check(program.model, node, thread, feeds)
                tried += 1
    assert tried, f"{case} has no thread that lets anything through"


def test_every_operator_has_a_case() -> None:
    covered = {case.split()[0] for case in CASES}
    assert covered == set(OPERATORS)


OPAQUE = {
    "Reshape splits the axis": ("Reshape that splits", 0, 1, "axis 1 of [3, 8] does not survive Reshape to [3, 2, 4]"),
    "Concat along the axis": ("Concat", 0, 1, "Concat joins channels"),
    "Split along the axis": ("Split", 0, 1, "Split parts the channels"),
    "Slice along the axis": ("Slice", 0, 1, "Slice takes some channels"),
    "Gather along the axis": ("Gather in the middle", 0, 1, "Gather picks some channels"),
    "Pad along the axis": ("Pad", 0, 1, "Pad adds channels"),
    "a sum over the axis": ("ReduceSum to [2, 4]", 0, 1, "sums it up"),
    "a norm over two axes": ("LayerNormalization of two axes", 0, 2, "normalizes over the 2 last axes together"),
    "GatherND of the axis": ("GatherND", 0, 0, "picks single channels"),
    "groups of channels": ("Conv in groups", 0, 1, "4 groups of channels"),
}


@pytest.mark.parametrize("case", OPAQUE)
def test_what_does_not_keep_the_axis_says_so(case: str) -> None:
    name, position, axis, reason = OPAQUE[case]
    text = CASES[name]
    program = network(text, ("x", "z", "w", "g", "i"))
    node = list(program.model.graph)[-1]
    thread = follow(node, position, axis)
    assert thread.role is Role.OPAQUE
    assert reason in thread.reason


def test_an_unlisted_operator_is_opaque() -> None:
    program = network("n (float[3, 4] x) => (float[3, 4] y) { a = Constant <value_int = 0> () y = CumSum (x, a) }")
    thread = follow(list(program.model.graph)[-1], 0, 1)
    assert thread == Thread(Role.OPAQUE, (), (), "nothing is known of CumSum along an axis")


def test_a_symbolic_size_may_be_one_and_broadcast() -> None:
    program = network("n (float[B, 4] x, float[B, C] z) => (float[B, 4] y) { y = Add (x, z) }", ("x", "z"))
    assert follow(program.model.graph[0], 0, 1).role is Role.OPAQUE


def test_a_product_of_names_is_not_their_expression() -> None:
    from rewrite.ir.axes import volume

    assert volume(("a*b + 1",)) != volume(("a", "b + 1"))
    assert volume(("2*a", "b")) == volume(("a*b", 2))
