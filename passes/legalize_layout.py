"""Rewrites of legalize-target: operators that move codes, which keep their encoding."""

from __future__ import annotations

from qnpu.compiler.operands import Operand, Operation
from qnpu.compiler.qdq_edit import (
    QdqEditor,
    encoding_of,
    equal,
    same_numbers,
    spec_of,
)
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.target import OpRule


def requantize_before(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Moves a change of encoding out of an operator that moves codes.

    Before → after, a and b encodings::

        DQ(a) → Reshape → Q(b)
        DQ(a) → Q(b) → DQ(b) → Reshape → Q(b)

    Rounding each element and moving it commute, so the numbers stay the same. A constant (the table
    of a Gather) gets new codes. The change goes behind the operator where the results differ among
    each other (Split), and where a constant has another type, since a table of wider codes is a
    larger file.

    Must not fire where an operand has more than one scale.
    """
    inputs = {
        index: encoding_of(operand)
        for index, operand in enumerate(operation.inputs)
        if operand is not None and operand.quantized
    }
    outputs = [encoding_of(output) for output in operation.outputs]
    sources = [encoding for encoding in inputs.values() if encoding is not None]
    results = [encoding for encoding in outputs if encoding is not None]
    if not sources or len(sources) < len(inputs) or not results or len(results) < len(outputs):
        return False
    if len(inputs) == 1:
        (index,) = inputs
        if _behind(operation.inputs[index], sources[0], results):
            return _requantize_behind(editor, operation, index, sources[0])
    if any(not equal(result, results[0]) for result in results):
        return _requantize_behind(editor, operation, next(iter(inputs)), sources[0])
    changed = [editor.requantize_input(operation.node, i, results[0]) for i in inputs]
    return any(changed)


def _behind(operand: Operand | None, source: Encoding, results: list[Encoding]) -> bool:
    """Whether the change of encoding belongs behind the operator."""
    if any(not equal(result, results[0]) for result in results):
        return True
    constant = operand is not None and operand.constant
    return constant and source.spec.dtype != results[0].spec.dtype


def _requantize_behind(
    editor: QdqEditor, operation: Operation, index: int, source: Encoding
) -> bool:
    """Writes every result at the encoding of an operand; 4-bit codes go through eight bits."""
    if source.spec.bits < 8:
        source = same_numbers(source, spec_of("s8" if source.spec.signed else "u8"))
    changed = editor.requantize_input(operation.node, index, source)
    for output in operation.outputs:
        result = encoding_of(output)
        if result is not None and not equal(result, source):
            editor.requantize_output(output.value, source)
            changed = True
    return changed


def keep_apart(editor: QdqEditor, operation: Operation, rule: OpRule) -> bool:
    """Puts a pair of another type between two that a runtime would merge.

    Before → after, a and b encodings of one type::

        Q(a) → DQ(a) → Q(b) → DQ(b) → Reshape
        Q(a) → DQ(a) → Q(a as s16) → DQ(a as s16) → Q(b) → DQ(b) → Reshape

    The type holds every code of a, so the numbers stay the same. Merged, the pairs would have
    neither encoding, and the Reshape two: see ``QdqEditor.apart``.
    """
    value, encoding = operation.node.inputs[0], encoding_of(operation.outputs[0])
    if operation.op_type not in ("Convert", "Identity") or value is None or encoding is None:
        return False
    other = editor.apart(value, encoding)
    if other is value:
        return False
    operation.node.replace_input_with(0, other)
    return True
