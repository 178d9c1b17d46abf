"""Which CPUs an integer graph is right on, where ONNX Runtime's kernels differ."""

from __future__ import annotations

import enum

import onnx_ir as ir

MARK = "qnpu.cpu"


class Cpu(enum.Enum):
    """How a graph multiplies bytes.

    On x86 CPUs without VNNI, ONNX Runtime adds two products of uint8 and int8 in 16 bits, which
    saturate. Its products of two uint8 are right everywhere, but at most half as fast with VNNI.

    ANY: uint8 · uint8; int8 codes are turned into uint8 as the file is loaded.
    VNNI: uint8 · int8; right on x86 with VNNI or AMX, and on Arm. Such a graph is there for ONNX
        Runtime's sake, and may use its own QLinearMul and QLinearSigmoid, which are fast.
    """

    ANY = "any"
    VNNI = "vnni"


def mark_cpu(model: ir.Model, cpu: Cpu) -> None:
    """Notes in the metadata that a graph is not right on every CPU."""
    if cpu is not Cpu.ANY:
        model.metadata_props[MARK] = cpu.value
