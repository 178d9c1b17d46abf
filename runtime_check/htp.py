"""Qualcomm's own compiler and its Hexagon (HTP) emulator as judges of a Q/DQ graph.

The pip package ``onnxruntime-qnn`` (extra ``qnpu[qnn]``, Linux x86-64) compiles a Q/DQ ONNX file
for an HTP architecture without a phone, and executes it on the host. A graph that it accepts is not
yet an integer graph: a Q/DQ group that fits no HTP kernel becomes float16 or float32 operations
without a word. So the compiled graph is read back and every operation's types are looked at.

Source: onnxruntime-qnn 2.7.0, QAIRT 2.51; the fields of the dump follow QnnTypes.h.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.operands import input_operand
from qnpu.compiler.rules import MissingPackage
from qnpu.compiler.target import load_target, target_names
from qnpu.runtime_check.compare import lsb_difference
from qnpu.runtime_check.session import Array, Feeds, Mode, open_session, run

Model = Path | bytes | onnx.ModelProto | ir.Model
"""A file, its bytes, or a model in memory."""

_QNN_TYPES = {
    0x0008: "S8", 0x0016: "S16", 0x0032: "S32", 0x0064: "S64",
    0x0108: "U8", 0x0116: "U16", 0x0132: "U32", 0x0164: "U64",
    0x0216: "F16", 0x0232: "F32", 0x0264: "F64",
    0x0304: "SF4", 0x0308: "SF8", 0x0316: "SF16", 0x0332: "SF32",
    0x0404: "UF4", 0x0408: "UF8", 0x0416: "UF16", 0x0432: "UF32",
    0x0508: "B8",
}  # fmt: skip
"""Qnn_DataType_t → S/U integer, F float, SF/UF signed and unsigned fixed point, B bool."""

_FLOATS = frozenset({"F16", "F32", "F64"})
_DEFINED = 1
_ROLES = {0: "input", 1: "output", 2: "input", 4: "static"}
_BORDER = frozenset({"Quantize", "Dequantize"})
_NO_REASON = "Failed to add node."
_REFUSAL_LENGTH = 300
_PROVIDER_OPTIONS = {"dump_json_qnn_graph": "1", "enable_framework_op_trace": "1"}
_TIMEOUT = 600.0  # seconds: a decoder of a few layers takes minutes on the emulator
_JOBS_PER_PROCESS = 400  # the vendor's library keeps memory of every session


class HtpVerdict(enum.Enum):
    """What became of a graph.

    INT: every operation between the graph's borders has integer types only.
    FLOAT: accepted, but some operation runs in float16 or float32.
    REJECT: refused.
    """

    INT = "int"
    FLOAT = "float"
    REJECT = "reject"


class HtpError(Exception):
    """The compiler is not installed, hung, or refused a model that was to be run or emitted."""


@dataclass(frozen=True, slots=True)
class HtpTensor:
    """A tensor of a compiled graph.

    Attributes:
        name: as in the ONNX graph where it comes from there.
        dtype: SF8, UF16, F32, S64, B8 …: see ``_QNN_TYPES``.
        shape: in the order the NPU uses; convolutions take channels last.
        role: "input" or "output" of the graph, "static", or "native" for one in between.
        encoding: kind of it as Qnn_QuantizationEncoding_t counts: 0 one scale, 1 per axis, 2 and
            3 the same with fewer bits than the type has, 4 and 5 blocks whose scales are integers
            (LPBQ), 11 blocks with float scales; None without any.
        scale: real units per LSB where one scale serves all (0); the dump holds no others.
        zero_point: LSB, real = scale · (q − zero_point).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    encoding: int | None
    scale: float | None
    zero_point: int | None

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def text(self) -> str:
        """Its type and the kind of its encoding, as "SF8e3"; a single scale has no mark."""
        return self.dtype + (f"e{self.encoding}" if self.encoding else "")


@dataclass(frozen=True, slots=True)
class HtpOp:
    """An operation of a compiled graph.

    Attributes:
        name: its own.
        kind: QNN operation, as FullyConnected.
        inputs: tensors read; optional ones that are missing are left out.
        outputs: tensors written.
        sources: names of the ONNX nodes it was made of; empty where the compiler does not say.
    """

    name: str
    kind: str
    inputs: tuple[HtpTensor, ...]
    outputs: tuple[HtpTensor, ...]
    sources: tuple[str, ...]

    @property
    def text(self) -> str:
        """As "FullyConnected(UF16,SF8e3)->UF16"."""
        left = ",".join(tensor.text for tensor in self.inputs)
        right = ",".join(tensor.text for tensor in self.outputs)
        return f"{self.kind}({left})->{right}"

    @property
    def is_float(self) -> bool:
        """Quantize and Dequantize cross the border by nature; their inner float side counts."""
        tensors = (*self.inputs, *self.outputs)
        if self.kind in _BORDER:
            return any(t.is_float and t.role == "native" for t in tensors)
        return any(t.is_float for t in tensors)


@dataclass(frozen=True, slots=True)
class HtpGraph:
    """What the compiler made of a model.

    Attributes:
        arch: architecture compiled for, as v75.
        ops: all operations, in the order they may run; empty where refused.
        refusal: why it was refused, one line; empty where it was accepted.
        unsupported: names of the ONNX nodes it refused, where it names them.
        seconds: time the compilation took.
    """

    arch: str
    ops: tuple[HtpOp, ...]
    refusal: str = ""
    unsupported: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def verdict(self) -> HtpVerdict:
        if self.refusal:
            return HtpVerdict.REJECT
        return HtpVerdict.FLOAT if self.float_ops else HtpVerdict.INT

    @property
    def float_ops(self) -> tuple[HtpOp, ...]:
        """Operations that run in float, and Quantize or Dequantize inside the graph."""
        return tuple(op for op in self.ops if op.is_float)

    @property
    def inserted(self) -> tuple[HtpOp, ...]:
        """Converts and Casts: changes of type that the compiler needed."""
        return tuple(op for op in self.ops if op.kind in {"Convert", "Cast"})

    @property
    def inner_ops(self) -> tuple[HtpOp, ...]:
        """All but Quantize and Dequantize."""
        return tuple(op for op in self.ops if op.kind not in _BORDER)

    @property
    def ops_within(self) -> tuple[HtpOp, ...]:
        """All but what quantizes inputs and dequantizes outputs of the graph."""
        return tuple(op for op in self.ops if op.kind not in _BORDER or op.is_float)


def soc_models() -> dict[str, int]:
    """Architecture, as ``v75`` → the SoC compiled for, as the profiles of this compiler say."""
    vendors = [load_target(name).vendor for name in target_names()]
    return {f"v{v.arch}": v.soc_model for v in vendors if v.oracle == "htp"}


def is_available() -> bool:
    """Whether onnxruntime-qnn is installed. It is not imported: that loads nothing useful here."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def require_htp() -> None:
    """Raises: DiagnosticError: QN114 onnxruntime-qnn is not installed."""
    if not is_available():
        raise DiagnosticError(MissingPackage("onnxruntime-qnn", "'qnpu[qnn]'").at())


class HtpCompiler:
    """A process that compiles and runs graphs, one at a time; started at the first job.

    It lives through many jobs, about 0.15 s each for a small graph, and is replaced when it
    crashes, hangs or has done many. Safe to use from several threads, which then wait for each
    other; take one each to work in parallel.

    Args:
        timeout: seconds that one job may take.
    """

    def __init__(self, timeout: float = _TIMEOUT) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._jobs = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def compile(
        self, model: Model, arch: str, folder: Path | None = None, *, finalize: bool = True
    ) -> HtpGraph:
        """Compiles a model and reads the result back.

        Args:
            model: Q/DQ ONNX with static shapes.
            arch: key of ``soc_models()``.
            folder: where the compiler's dump and its log stay; a temporary one if None.
            finalize: False stops once every operation is validated for the architecture, before
                the binary is made: a third of the time, but a refusal that comes later is missed.

        Returns:
            The graph; a refused one where the compiler crashed on the model.

        Raises:
            HtpError: the compiler is missing or hung.
        """
        with _workplace(model, folder) as place:
            options = _PROVIDER_OPTIONS | {
                "json_qnn_graph_dir": str(place.dump),
                "framework_op_trace_dir": str(place.dump),
            }
            if not finalize:
                options |= _dlc_options(place.dump)
            return _read_graph(arch, place, self._submit(place, arch, options))

    def run(self, model: Model, arch: str, feeds: Feeds) -> dict[str, Array]:
        """Executes a model on the emulator.

        Args:
            model: as for ``compile``.
            arch: key of ``soc_models()``.
            feeds: input name → array.

        Returns:
            Output name → array.

        Raises:
            HtpError: the compiler is missing, hung, crashed or refused the model.
        """
        with _workplace(model, None) as place:
            files = place.dump / "feeds.npz", place.dump / "outputs.npz"
            np.savez(files[0], *feeds.values())
            job = {"names": list(feeds), "feeds": str(files[0]), "outputs": str(files[1])}
            answer = self._submit(place, arch, {}, job=job)
            self._raise_refusal(answer, place)
            with np.load(files[1]) as outputs:
                return {name: outputs[f"arr_{k}"] for k, name in enumerate(answer.outputs)}

    def emit_context(self, model: Model, arch: str, path: Path) -> None:
        """Writes an EPContext model: the compiled binary, for ONNX Runtime on the phone.

        Args:
            model: as for ``compile``.
            arch: key of ``soc_models()``.
            path: ONNX file to write; the binary comes beside it.

        Raises:
            HtpError: as for ``run``.
        """
        path.unlink(missing_ok=True)
        session = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(path.resolve()),
            "ep.context_embed_mode": "0",
        }
        with _workplace(model, None) as place:
            self._raise_refusal(self._submit(place, arch, {}, session=session), place)

    def emit_dlc(self, model: Model, arch: str, path: Path) -> None:
        """Writes a DLC: the graph in Qualcomm's own form, for qnn-context-binary-generator.

        Args:
            model: as for ``compile``.
            arch: key of ``soc_models()``.
            path: file to write.

        Raises:
            HtpError: as for ``run``.
        """
        with _workplace(model, None) as place:
            self._raise_refusal(self._submit(place, arch, _dlc_options(place.dump)), place)
            written = sorted(place.dump.glob("*.dlc"))
            if len(written) != 1:  # the compiler cut the graph into parts
                raise HtpError(f"the graph became {len(written)} DLC files")
            shutil.move(written[0], path)

    @staticmethod
    def _raise_refusal(answer: _Answer, place: _Workplace) -> None:
        if answer.error:
            raise HtpError(_refusal(answer.error, place.log_text()))

    def _submit(
        self,
        place: _Workplace,
        arch: str,
        provider: Mapping[str, str],
        *,
        session: Mapping[str, str] | None = None,
        job: Mapping[str, Any] | None = None,
    ) -> _Answer:
        """Opens one session in the process."""
        chips = soc_models()
        if arch not in chips:
            raise HtpError(f"{arch} is none of {', '.join(chips)}")
        request = {
            "model": str(place.model),
            "log": str(place.log),
            "severity": 0,  # the reason of a refusal is told at this level only
            "session": {"session.disable_cpu_ep_fallback": "1", **(session or {})},
            "provider": {
                "backend_path": _library("libQnnHtp.so"),
                "htp_arch": arch.removeprefix("v"),
                "soc_model": str(chips[arch]),
                **provider,
            },
            **(job or {}),
        }
        with self._lock:
            start = time.perf_counter()
            answer = json.loads(self._exchange(json.dumps(request)))
            seconds = time.perf_counter() - start
        return _Answer(answer["error"], tuple(answer.get("outputs", ())), seconds)

    def _exchange(self, line: str) -> str:
        dead = self._process is None or self._process.poll() is not None
        if dead or self._jobs >= _JOBS_PER_PROCESS:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._jobs += 1
        process.stdin.write(line + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self._timeout)
        answer = process.stdout.readline() if ready else ""
        if not ready:
            self.close()
            raise HtpError(f"the HTP compiler did not answer within {self._timeout:g} s")
        if not answer:
            code = process.wait()
            self.close()
            return json.dumps({"error": f"the HTP compiler died with exit code {code}"})
        return answer

    def _start(self) -> None:
        library = _library("libonnxruntime_providers_qnn.so")
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qnpu.runtime_check.htp_worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._jobs = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the process says of a job: an error or none, names of outputs, time taken in s."""

    error: str
    outputs: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Workplace:
    """Files of one job."""

    model: Path
    dump: Path
    log: Path

    def log_text(self) -> str:
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""


@contextmanager
def _workplace(model: Model, folder: Path | None) -> Iterator[_Workplace]:
    with tempfile.TemporaryDirectory(prefix="qnpu-htp-") as temporary:
        path = Path(temporary, "model.onnx")
        if isinstance(model, Path):
            path = model.resolve()
        elif isinstance(model, ir.Model):
            ir.save(model, path, external_data="model.data")
        else:
            path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        dump = Path(temporary, "dump") if folder is None else folder.resolve()
        dump.mkdir(parents=True, exist_ok=True)
        for old in dump.glob("QNNExecutionProvider_*"):
            old.unlink()
        yield _Workplace(path, dump, dump / "htp.log")


def _library(name: str) -> str:
    """Path of a library of the package, which is found without importing it."""
    spec = importlib.util.find_spec("onnxruntime_qnn")
    if spec is None or spec.origin is None:
        raise HtpError("onnxruntime-qnn is not installed: pip install 'qnpu[qnn]'")
    return str(Path(spec.origin).with_name(name))


def _dlc_options(folder: Path) -> dict[str, str]:
    """The serializer takes the graph instead of the NPU's backend, which still validates."""
    return {
        "dump_qnn_ir_dlc": "1",
        "dump_qnn_ir_dlc_dir": str(folder),
        "qnn_ir_backend_path": _library("libQnnIr.so"),
    }


def _read_graph(arch: str, place: _Workplace, answer: _Answer) -> HtpGraph:
    if answer.error:
        log = place.log_text()
        names = tuple(re.findall(r"\{ name: (.*?), type: ", _last_unsupported(log)))
        return HtpGraph(arch, (), _refusal(answer.error, log), names, answer.seconds)
    traces = [json.loads(path.read_text("utf-8")) for path in place.dump.glob("*trace.json")]
    sources = _sources(traces)
    ops: list[HtpOp] = []
    for path in sorted(place.dump.glob("*.json")):
        if not path.stem.endswith(("_tensor_log", "trace")):
            ops += parse_qnn_graph(json.loads(path.read_text("utf-8")), sources)
    return HtpGraph(arch, tuple(ops), seconds=answer.seconds)


def parse_qnn_graph(
    dump: Mapping[str, Any], sources: Mapping[str, tuple[str, ...]] | None = None
) -> list[HtpOp]:
    """Reads a QNN graph as ``dump_json_qnn_graph`` writes it.

    Args:
        dump: the parsed JSON.
        sources: QNN operation → names of the ONNX nodes it stands for.

    Returns:
        The operations, each after those whose results it reads.
    """
    tensors = {name: _tensor(name, entry) for name, entry in dump["graph"]["tensors"].items()}
    ops = {
        name: HtpOp(
            name=name,
            kind=entry["type"],
            inputs=tuple(tensors[n] for n in entry["input_names"] if n in tensors),
            outputs=tuple(tensors[n] for n in entry["output_names"]),
            sources=(sources or {}).get(name, ()),
        )
        for name, entry in dump["graph"]["nodes"].items()
    }
    makers = {output.name: name for name, op in ops.items() for output in op.outputs}
    order = TopologicalSorter(
        {name: [makers[t.name] for t in op.inputs if t.name in makers] for name, op in ops.items()}
    )
    return [ops[name] for name in order.static_order()]


def _tensor(name: str, entry: Mapping[str, Any]) -> HtpTensor:
    params = entry["quant_params"]
    encoding = params["encoding"] if params["definition"] == _DEFINED else None
    # The dump reads every kind's fields as those of a single scale; for others they mean nothing.
    single = params["scale_offset"] if encoding == 0 else None
    return HtpTensor(
        name=name,
        dtype=_QNN_TYPES.get(entry["data_type"], f"0x{entry['data_type']:04X}"),
        shape=tuple(entry["dims"]),
        role=_ROLES.get(entry["type"], "native"),
        encoding=encoding,
        scale=single["scale"] if single else None,
        zero_point=-single["offset"] if single else None,
    )


def _sources(traces: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    return {
        mapping["dst_name"]: tuple(s["name"] for s in mapping["sources"] if s["type"] == "OP")
        for trace in traces
        for subgraph in trace["subgraph_traces"]
        for mapping in subgraph["op_mappings"]
    }


def _last_unsupported(log: str) -> str:
    lines = [line for line in log.splitlines() if "Unsupported nodes in QNN EP" in line]
    return lines[-1] if lines else ""


def _refusal(error: str, log: str) -> str:
    """Why a node was refused, where the log tells, rather than that fallback is off. One line."""
    if not error:
        return ""
    reasons = re.findall(r"backendValidateOpConfig\(\) failed for (.*)", log)
    reasons += [reason for reason in re.findall(r"REASON : (.*)", log) if reason != _NO_REASON]
    return " · ".join(dict.fromkeys(reasons))[:_REFUSAL_LENGTH] or error.splitlines()[0]


def compare_on_emulator(
    htp: HtpCompiler, model: ir.Model, arch: str, feeds: Feeds
) -> dict[str, NDArray[np.int64]]:
    """Runs a Q/DQ graph on the emulator and, as written, on the CPU.

    Args:
        htp: what to run it on.
        model: Q/DQ ONNX with static shapes.
        arch: key of ``soc_models()``.
        feeds: input name → array.

    Returns:
        Output name → emulator minus CPU, in LSB, shaped as the output. Outputs that are neither
        integers nor come from DequantizeLinear with one scale are left out.

    Raises:
        HtpError: as for ``HtpCompiler.run``.
    """
    session = open_session(model, Mode.REFERENCE)
    names = [output.name for output in session.get_outputs()]
    reference = dict(zip(names, run(session, names, feeds), strict=True))
    emulated = htp.run(model, arch, feeds)
    return {
        name: lsb_difference(reference[name], emulated[name], scale)
        for name, scale in output_scales(model).items()
    }


def output_scales(model: ir.Model) -> dict[str, float]:
    """Output → real units per code."""
    scales: dict[str, float] = {}
    for output in model.graph.outputs:
        node = output.producer()
        if output.dtype is not None and output.dtype.is_integer():
            scales[name_of(output)] = 1.0
        elif node is not None and node.op_type == "DequantizeLinear":
            scale = constant_array(node.inputs[1])
            if scale is not None and scale.size == 1:
                scales[name_of(output)] = float(scale.item())
    return scales


def output_type(output: ir.Value) -> str:
    """The type of an output's codes as profiles write it, ``u16``; ``float`` where it has none."""
    dtype = input_operand(output).dtype
    return re.sub(r"^(u?)int", lambda found: found[1] or "s", dtype)
