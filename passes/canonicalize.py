"""canonicalize: one spelling for what exporters write in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.version_converter
from onnx_ir.passes import common

from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, first_line
from qnpu.compiler.graph_checks import (
    control_flow,
    unknown_operators,
    unsupported_float_types,
)
from qnpu.compiler.graph_edit import (
    add_initializer,
    constant_array,
    keeps_name,
    name_of,
    replace_value,
    shape_of,
    static_shape,
)
from qnpu.compiler.op_traits import is_standard
from qnpu.compiler.pass_base import Compilation, Pass, Stage
from qnpu.compiler.rules import UnsupportedOpset
from qnpu.compiler.stored_tensors import transposed_tensor
from qnpu.runtime_check.session import open_session

OPSET = 23
_IR_VERSION = 11
# Folding reads and writes at most this many elements per node: a mask or rotary table of a long
# context, but not an expanded embedding.
_FOLD_ELEMENTS = 2**24
# Up to so many elements initializers are compared by all their bytes at once.
_SMALL_ELEMENTS = 2**14
_SAMPLE_ELEMENTS = 256
_MAX_ROUNDS = 8
_NEUTRAL = {"Add": 0.0, "Mul": 1.0, "Max": -np.inf, "Min": np.inf}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites a float graph to opset 23 with constants folded and exporter residue removed.

    Before → after::

        functions, nested calls            → inlined
        Shape → Gather → … on static dims  → folded
        Transpose(weight) → MatMul         → weight stored transposed (a view, no copy)
        Softmax → IsNaN → Where(·, 0, ·)   → Softmax (a row is never wholly masked at -50)
        Concat(empty past, k)              → k
        MatMul + Add(bias)                 → Reshape → Gemm → Reshape (the bias joins the
                                             accumulator; added later it would see a coarser scale)
        Identity, Dropout, Cast to itself  → gone

    Must not fire on its own result. Raises QN106 for an operator without a schema, QN108 for half
    or double precision, QN109 for control flow that is left, QN112 for an opset that cannot be
    raised, QN116 where types do not work out.
    """

    name: ClassVar[str] = "canonicalize"
    consumes: ClassVar[Stage] = Stage.FLOAT
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, compilation: Compilation) -> int:
        model = compilation.model
        changes = int(bool(common.InlinePass()(model).modified))
        changes += int(bool(common.RemoveInitializersFromInputsPass()(model).modified))
        _raise_any(unknown_operators(model))
        changes += raise_opset(model)
        _name_nodes(model.graph)
        for _ in range(_MAX_ROUNDS):
            round_changes = _simplify(model)
            changes += round_changes
            if not round_changes:
                break
        _raise_any([*control_flow(model.graph), *unsupported_float_types(model.graph)])
        if any(value.dtype is None for node in model.graph for value in node.outputs if value.name):
            open_session(model)  # fails where the graph is at fault, and says why
        return changes


def _simplify(model: ir.Model) -> int:
    """One round of all local rewrites.

    Returns:
        Rewrites done, plus nodes that folding and elimination removed.
    """
    graph = model.graph
    changes = 0
    for rewrite in _REWRITES:
        for node in list(graph):
            changes += rewrite(graph, node)
    before = graph.num_nodes()
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_ELEMENTS,
        output_size_limit=_FOLD_ELEMENTS,
        should_fold=_should_fold,
    )
    _forget_dead_branches(graph)
    for clean in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=_SMALL_ELEMENTS),
        _ShareLargeInitializers(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        clean(model)
    for value in graph.initializers.values():
        if value.const_value is not None:  # a folded value keeps the symbols it was inferred with
            value.shape = shape_of(value.const_value)
    common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    return changes + before - graph.num_nodes()


_Held = tuple[ir.Value, ir.TensorProtocol]


class _ShareLargeInitializers(ir.passes.InPlacePass):
    """Makes one of initializers of equal bytes, without holding the bytes of all."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        shared = [_share_large(graph) for graph in model.graphs()]
        return ir.passes.PassResult(model, any(shared))


def _share_large(graph: ir.Graph) -> bool:
    """All of a sample's bytes come first; only where they are equal the others do."""
    known: dict[tuple[ir.DataType, tuple[int, ...], bytes], list[_Held]] = {}
    before = len(graph.initializers)
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not _SMALL_ELEMENTS < tensor.size <= _FOLD_ELEMENTS:
            continue
        if tensor.dtype.is_string() or value.is_graph_input() or value.is_graph_output():
            continue
        sample = tensor.numpy().flat[:_SAMPLE_ELEMENTS].tobytes()
        alike = known.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), sample), [])
        same = (
            kept for kept, held in alike if held is tensor or held.tobytes() == tensor.tobytes()
        )
        twin = next(same, None)
        if twin is None:
            alike.append((value, tensor))
        else:
            value.replace_all_uses_with(twin)
            del graph.initializers[name]
    return len(graph.initializers) < before


def _forget_dead_branches(graph: ir.Graph) -> None:
    """Folding an If leaves nodes of the branch not taken among the users of what it read."""
    alive = {graph, *graph.subgraphs()}
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    for value in values:
        for user, index in list(value.uses()):
            if user.graph not in alive:
                user.replace_input_with(index, None)


def _should_fold(node: ir.Node) -> bool | None:
    """onnxscript keeps ConstantOfShape by default; shapes are static here, so fold it."""
    return True if node.op_type == "ConstantOfShape" and is_standard(node) else None


def _raise_any(faults: list[Diagnostic]) -> None:
    if faults:
        raise DiagnosticError(faults)


def raise_opset(model: ir.Model) -> int:
    """To opset 23; returns 1 where it was lower. Raises DiagnosticError: QN112."""
    version = model.graph.opset_imports.get("", OPSET)
    if version >= OPSET:
        return 0
    try:
        onnxscript.version_converter.convert_version(model, OPSET, fallback=True)
    except Exception as error:  # the onnx converter raises bare RuntimeError and its own kinds
        raise DiagnosticError(UnsupportedOpset(version, first_line(error)).at()) from error
    reached = model.graph.opset_imports.get("", version)
    if reached < OPSET:
        raise DiagnosticError(UnsupportedOpset(version, f"conversion stops at {reached}").at())
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return 1


def _name_nodes(graph: ir.Graph) -> None:
    """Names nodes that have none after their first output, so that diagnostics can say where."""
    for node in graph:
        if not node.name:
            node.name = f"{node.op_type}_{node.outputs[0].name}"


def _transpose_weight(graph: ir.Graph, node: ir.Node) -> int:
    """Transpose(initializer) → initializer, by stride when it is read: no bytes move."""
    if node.op_type != "Transpose" or not is_standard(node):
        return 0
    source, output = node.inputs[0], node.outputs[0]
    if source is None or source.const_value is None or not source.is_initializer():
        return 0
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(source.const_value.shape)))))
    name = name_of(output)
    tensor = transposed_tensor(source.const_value, list(order), name)
    output.name = None
    value = ir.Value(name=name, type=output.type, shape=shape_of(tensor), const_value=tensor)
    graph.register_initializer(value)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return 1


def _drop_nan_guard(graph: ir.Graph, node: ir.Node) -> int:
    """Where(IsNaN(p), 0, p) → p for p = Softmax(·)."""
    if node.op_type != "Where" or not is_standard(node):
        return 0
    condition, replacement, kept = node.inputs
    zero = constant_array(replacement)
    if zero is None or zero.any():
        return 0
    test = condition.producer() if condition is not None else None
    if test is None or test.op_type != "IsNaN" or test.inputs[0] is not kept or kept is None:
        return 0
    softmax = kept.producer()
    if softmax is None or softmax.op_type != "Softmax":
        return 0
    replace_value(graph, node.outputs[0], kept)
    graph.remove(node, safe=True)
    return 1


def _drop_empty_concat_input(graph: ir.Graph, node: ir.Node) -> int:
    """Concat(empty, k) → k."""
    if node.op_type != "Concat" or not is_standard(node):
        return 0
    kept = [v for v in node.inputs if v is not None and 0 not in (static_shape(v) or (1,))]
    if len(kept) == len(node.inputs) or not kept:
        return 0
    if len(kept) == 1:
        replace_value(graph, node.outputs[0], kept[0])
        graph.remove(node, safe=True)
        return 1
    node.resize_inputs(len(kept))
    for index, value in enumerate(kept):
        node.replace_input_with(index, value)
    return 1


def _drop_no_op(graph: ir.Graph, node: ir.Node) -> int:
    """Identity, Dropout in inference, Cast to the type it has, Add of zero, Mul by one."""
    source = node.inputs[0] if node.inputs else None
    if source is None or not is_standard(node):
        return 0
    if node.op_type == "Identity":
        # between two names that callers know it must stay
        idle = not (node.outputs[0].is_graph_output() and keeps_name(source))
    elif node.op_type == "Cast":
        idle = source.dtype is not None and source.dtype == node.outputs[0].dtype
    elif node.op_type in _NEUTRAL and len(node.inputs) == 2:
        source, idle = _neutral_operand(node)
    else:
        idle = node.op_type == "Dropout" and not node.outputs[1:]
    if not idle or source is None:
        return 0
    replace_value(graph, node.outputs[0], source)
    graph.remove(node, safe=True)
    return 1


def _neutral_operand(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The operand that comes through unchanged, where its shape is the result's."""
    neutral = _NEUTRAL[node.op_type]
    for kept, constant in (node.inputs, node.inputs[::-1]):
        array = constant_array(constant)
        shape = static_shape(kept) if kept is not None else None
        if (
            array is not None
            and array.size <= _FOLD_ELEMENTS
            and shape is not None
            and shape == static_shape(node.outputs[0])
            and bool((array == neutral).all())
        ):
            return kept, True
    return None, False


def bias_into_gemm(graph: ir.Graph, node: ir.Node) -> int:
    """Add(MatMul(x, W), b) → Reshape(Gemm(Reshape(x), W, b)) for a constant W and 1-D b."""
    if node.op_type != "Add" or not is_standard(node):
        return 0
    for product, bias in (node.inputs, node.inputs[::-1]):
        matmul = product.producer() if product is not None else None
        if product is None or matmul is None or matmul.op_type != "MatMul":
            continue
        if len(product.uses()) > 1 or product.is_graph_output():
            continue
        source, weight = matmul.inputs
        if source is None or weight is None or bias is None:
            continue
        weight_shape, source_shape = static_shape(weight), static_shape(source)
        if (
            not weight.is_initializer()
            or not bias.is_initializer()
            or weight_shape is None
            or source_shape is None
            or len(weight_shape) != 2
            or static_shape(bias) != (weight_shape[1],)
        ):
            continue
        _emit_gemm(graph, node, source, weight, bias)
        graph.remove([node, matmul], safe=True)
        return 1
    return 0


def _emit_gemm(
    graph: ir.Graph, add: ir.Node, source: ir.Value, weight: ir.Value, bias: ir.Value
) -> None:
    output = add.outputs[0]
    name = name_of(output)
    source_shape, weight_shape = static_shape(source) or (), static_shape(weight) or ()
    rows = int(np.prod(source_shape[:-1]))
    new_nodes: list[ir.Node] = []
    if len(source_shape) != 2:
        flat = np.array([rows, source_shape[-1]], np.int64)
        shape = add_initializer(graph, f"{name}_flat_shape", flat)
        reshape = ir.node("Reshape", [source, shape], name=f"{name}_flatten")
        _describe(reshape.outputs[0], f"{name}_flat", output, (rows, source_shape[-1]))
        new_nodes.append(reshape)
        source = reshape.outputs[0]
    gemm = ir.node("Gemm", [source, weight, bias], name=f"{name}_gemm")
    _describe(gemm.outputs[0], f"{name}_rows", output, (rows, weight_shape[1]))
    new_nodes.append(gemm)
    result = gemm.outputs[0]
    if len(source_shape) != 2:
        full = np.array([*source_shape[:-1], weight_shape[1]], np.int64)
        shape = add_initializer(graph, f"{name}_shape", full)
        reshape = ir.node("Reshape", [result, shape], name=f"{name}_unflatten")
        _describe(
            reshape.outputs[0], f"{name}_biased", output, (*source_shape[:-1], weight_shape[1])
        )
        new_nodes.append(reshape)
        result = reshape.outputs[0]
    graph.insert_before(add, new_nodes)
    replace_value(graph, output, result)


def _describe(value: ir.Value, name: str, similar: ir.Value, shape: tuple[int, ...]) -> None:
    value.name, value.type, value.shape = name, similar.type, ir.Shape(shape)


_REWRITES: tuple[Callable[[ir.Graph, ir.Node], int], ...] = (
    _transpose_weight,
    _drop_nan_guard,
    _drop_empty_concat_input,
    _drop_no_op,
    bias_into_gemm,
)
