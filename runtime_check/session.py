"""The one place that opens ONNX Runtime sessions, with every numeric option pinned.

ONNX Runtime changes the numbers of a Q/DQ graph silently: it turns DequantizeLinear → MatMul into
MatMulNBits with int8 activations, and u8 × s8 products saturate on CPUs without VNNI. A session
opened here says which of those it allows.
"""

from __future__ import annotations

import enum
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.integer_cpu import MARK, Cpu
from qnpu.compiler.rules import CpuSaturates, GraphDoesNotRun, UnreadableMark

_PAGE = 4096
_LOGGER = logging.getLogger(__name__)

Array = NDArray[Any]
Feeds = dict[str, Array]


class Mode(enum.Enum):
    """How a session may change the graph.

    REFERENCE runs node by node as written: what a QDQ graph means.
    OPTIMIZED fuses Q/DQ groups into integer kernels, but keeps float activations float.
    STOCK sets nothing: what a user gets who opens the file without options.
    """

    REFERENCE = "reference"
    OPTIMIZED = "optimized"
    STOCK = "stock"


def session_options(mode: Mode) -> ort.SessionOptions:
    """Options of a mode; a thread per core, or as many as OMP_NUM_THREADS says, as for torch."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = _wanted_threads()
    options.log_severity_level = 4  # a failure is raised as well, no need to print it too
    if mode is Mode.STOCK:
        return options
    # Freed activations go back to the system: peak memory then shows what is really needed.
    options.enable_cpu_mem_arena = False
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if mode is Mode.REFERENCE:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _wanted_threads() -> int:
    """What OMP_NUM_THREADS asks for at the outermost level; 0: one per core."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(int(first), os.cpu_count() or 1) if first.isdecimal() else 0


def open_session(
    model: Path | onnx.ModelProto | ir.Model,
    mode: Mode = Mode.REFERENCE,
    weights: Mapping[str, ir.TensorProtocol] = MappingProxyType({}),
    *,
    pack: bool = True,
) -> ort.InferenceSession:
    """Opens a CPU session.

    Args:
        model: a path (external data is found beside it), or a model in memory. One of 2 GB or more
            goes through a temporary file.
        mode: see ``Mode``.
        weights: of a model in memory, initializers that it only names, of whole bytes. They go
            through a temporary file, which ONNX Runtime maps.
        pack: let kernels order initializers anew, once; sums then have another order as well.

    Raises:
        DiagnosticError: QN116 where ONNX Runtime refuses the graph, QN403 where it would multiply
            wrongly on this CPU, QN119 the mark of its CPU is none.
    """
    options = session_options(mode)
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        if isinstance(model, Path):
            session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        elif isinstance(model, ir.Model):
            session = _open_in_memory(model, options)
        elif weights:
            session = _open_with_weights(model, weights, options)
        else:
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
    except _ORT_ERRORS as error:
        raise DiagnosticError(GraphDoesNotRun(first_line(error)).at()) from error
    known = session.get_modelmeta().custom_metadata_map
    check_cpu(_cpu_of(known.get(MARK, Cpu.ANY.value)))
    return session


def _cpu_of(mark: str) -> Cpu:
    try:
        return Cpu(mark)
    except ValueError as error:
        raise DiagnosticError(UnreadableMark(MARK, str(error)).at()) from error


def check_cpu(cpu: Cpu) -> None:
    """Whether a graph for such CPUs is right on this one.

    Raises:
        DiagnosticError: QN403 it is not.
    """
    if cpu is Cpu.VNNI and not adds_in_32_bits():
        raise DiagnosticError(CpuSaturates().at())


@cache
def adds_in_32_bits() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are right on this CPU: it is asked."""
    one, other = np.full((4, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    graph = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]>
        g (uint8[4, 64] a, int8[64, 32] b) => (int32[4, 32] y) { y = MatMulInteger(a, b) }"""
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"a": one, "b": other})
    return bool((sums == 64 * 255 * 127).all())


def run(session: ort.InferenceSession, names: Sequence[str] | None, feeds: Feeds) -> list[Array]:
    """Runs a session.

    Args:
        session: from ``open_session``.
        names: outputs to return; None for all.
        feeds: input name → array.

    Raises:
        DiagnosticError: QN116 where ONNX Runtime fails on these inputs.
    """
    try:
        return list(session.run(names, feeds))
    except _ORT_ERRORS as error:
        raise DiagnosticError(GraphDoesNotRun(first_line(error)).at()) from error


def _open_in_memory(model: ir.Model, options: ort.SessionOptions) -> ort.InferenceSession:
    with tempfile.TemporaryDirectory(prefix="qnpu-") as folder:
        path = Path(folder, "model.onnx")
        ir.save(model, path, external_data="model.data")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _open_with_weights(
    model: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], options: ort.SessionOptions
) -> ort.InferenceSession:
    """One weight is in memory at a time; of a serialized model there would be several copies."""
    with tempfile.TemporaryDirectory(prefix="qnpu-") as folder:
        path, data = Path(folder, "model.onnx"), Path(folder, "model.data")
        with data.open("wb") as file:
            for initializer in model.graph.initializer:
                if initializer.name not in weights:
                    continue
                file.seek(-(-file.tell() // _PAGE) * _PAGE)
                place = {"location": data.name, "offset": file.tell()}
                array = weights[initializer.name].numpy()
                place["length"] = file.write(np.ascontiguousarray(array).data)
                del array  # its pages go before the next one's come
                initializer.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    initializer.external_data.add(key=key, value=str(value))
        path.write_bytes(model.SerializeToString())
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def cpu_flags() -> list[str]:
    """Instruction sets that decide how products are summed, as this CPU reports them."""
    integers = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    wanted = (*integers, "avx512_bf16", "amx_bf16")
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    present = set(text.split())
    flags = [flag for flag in wanted if flag in present]
    _LOGGER.info("CPU flags: %s; threads: %s", ", ".join(flags), os.cpu_count())
    return flags


def input_dtypes(session: ort.InferenceSession) -> dict[str, np.dtype[Any]]:
    """Input name → NumPy type."""
    kinds = {
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
        "tensor(bool)": np.bool_,
    }
    return {i.name: np.dtype(kinds[i.type]) for i in session.get_inputs()}


_ORT_ERRORS = tuple(
    getattr(ort.capi.onnxruntime_pybind11_state, name)
    for name in (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "NotImplemented",
        "RuntimeException",
        "InvalidProtobuf",
        "NoSuchFile",
    )
)
