"""The editor: names stay, origins show, constants are told from defaults."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rewrite.ir.edit import ORIGIN, Editor, array_of, constant_of, only_use, same_shape, scalar_of, shape_of
from rewrite.ir.weights import Scale, Source

TEXT = """<ir_version: 10, opset_import: ["" : 23]> g (float[n,3] x) => (float[n,3] y) <float[3] w = {1, 2, 3}> {
    a = Add(x, w)
    b = Neg(a)
    y = Neg(b)
}"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == name)


def test_a_new_node_carries_its_origin_and_type(model: ir.Model) -> None:
    editor, old = Editor(model, "some-pass"), node(model, "b")
    made = editor.node("Abs", [old.inputs[0]], before=old, name="a", like=old.inputs[0])
    assert made.name == "a_1"
    assert made.producer().metadata_props[ORIGIN] == "some-pass"
    assert same_shape(made, old.inputs[0]) or made.shape == old.inputs[0].shape


def test_taking_over_keeps_the_name_of_an_output(model: ir.Model) -> None:
    editor, old = Editor(model, "p"), node(model, "y")
    made = editor.node("Abs", [old.inputs[0]], before=old, name="new", like=old.outputs[0])
    editor.take_over(old.outputs[0], made)
    editor.clean()
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [n.op_type for n in model.graph] == ["Add", "Neg", "Abs"]
    assert shape_of(made) == ("n", 3)


def test_redirecting_an_output_to_an_input_leaves_an_identity(model: ir.Model) -> None:
    editor, old = Editor(model, "p"), node(model, "y")
    editor.redirect(old.outputs[0], model.graph.inputs[0])
    editor.clean()
    assert [(n.op_type, n.outputs[0].name) for n in model.graph] == [("Identity", "y")]
    assert not model.graph.initializers


def test_redirecting_an_output_to_another_value_renames_that(model: ir.Model) -> None:
    editor = Editor(model, "p")
    editor.redirect(node(model, "y").outputs[0], node(model, "a").outputs[0])
    editor.clean()
    assert [(n.op_type, n.outputs[0].name) for n in model.graph] == [("Add", "y")]


def test_an_initializer_that_is_an_input_is_no_constant(model: ir.Model) -> None:
    weight = model.graph.initializers["w"]
    np.testing.assert_array_equal(array_of(weight), [1, 2, 3])
    model.graph.inputs.append(weight)
    assert constant_of(weight) is None
    assert scalar_of(weight) is None
    Editor(model, "p").clean()
    assert "w" in model.graph.initializers


@pytest.mark.parametrize("attribute", ["value_float = 2.0", "value = float {2.0}", "value = float[1,1] {2.0}"])
def test_a_constant_node_is_a_constant(attribute: str) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 23]> g () => (float y) {{ y = Constant <{attribute}> () }}'
    )
    assert scalar_of(model.graph.outputs[0]) == 2.0


def test_a_weight_stays_an_expression_and_is_made_once(model: ir.Model) -> None:
    editor = Editor(model, "p")
    weight = Source(model.graph.initializers["w"].const_value)
    doubled = Scale(weight, Source(ir.tensor(np.float32(2))))
    one = editor.derived(("doubled", 1), "w_doubled", doubled, ir.DataType.FLOAT)
    assert one is editor.derived(("doubled", 1), "w_doubled", doubled, ir.DataType.FLOAT)
    np.testing.assert_array_equal(one.const_value.numpy(), np.float32([2, 4, 6]))
    with pytest.raises(ValueError, match="dtype"):
        editor.initializer("w_tripled", doubled)


def test_float_attributes_are_what_the_file_will_hold(model: ir.Model) -> None:
    editor, old = Editor(model, "p"), node(model, "b")
    made = editor.node("LeakyRelu", [old.inputs[0]], {"alpha": 0.1}, before=old, name="leaky")
    assert made.producer().attributes["alpha"].value == float(np.float32(0.1))


def test_deduplication_merges_computations_but_not_parameters() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23, "other" : 1]>
        g (float[2] x) => (float[2] y, float[2] z, float[2] u, float[2] v)
        <float[2] gamma = {1, 1}, float[2] delta = {1, 1}, int64[1] i = {0}, int64[1] j = {0}> {
        a = Mul(x, gamma)
        b = Mul(x, delta)
        c = Gather(a, i)
        d = Gather(a, j)
        y = Add(c, b)
        z = Add(d, b)
        u = other.Draw(x)
        v = other.Draw(x)
    }""")
    editor = Editor(model, "p")
    editor.dedupe()
    editor.clean()
    kinds = [n.op_type for n in model.graph]
    assert sorted(kinds) == ["Add", "Draw", "Draw", "Gather", "Identity", "Mul", "Mul"]
    assert sorted(model.graph.initializers) == ["delta", "gamma", "i"]
    assert [value.name for value in model.graph.outputs] == ["y", "z", "u", "v"]


def test_only_use_is_none_for_outputs_and_for_two_readers(model: ir.Model) -> None:
    a, b, y = (node(model, name) for name in "aby")
    assert only_use(a.outputs[0]) is b
    assert only_use(y.outputs[0]) is None
    y.replace_input_with(0, a.outputs[0])
    assert only_use(a.outputs[0]) is None
