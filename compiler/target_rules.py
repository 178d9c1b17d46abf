"""Rules on what a target's compiler accepts (QN51x, QN52x); see ``qnpu.compiler.rules``.

Each states one kind of fault; the profile says what the vendor's compiler does about it and how to
put it right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qnpu.compiler.diagnostics import Rule, Severity


@dataclass(frozen=True, slots=True)
class TargetRule(Rule):
    """Base of the rules about one node.

    Attributes:
        operation: operator with the types it computes on.
        target: id of the profile.
        does: what the vendor's compiler does, half a sentence.
        fix: half a sentence.
    """

    operation: str
    target: str
    does: str
    fix: str

    def message(self) -> str:
        return f"`{self.operation}`: {self.target} {self.does}"

    def help(self) -> str:
        return self.fix


@dataclass(frozen=True, slots=True)
class UnsupportedOperator(TargetRule):
    """What it checks
        The target has the operator, for some types at least.

    Why it matters
        One refused node fails the whole graph, or moves it to a processor that is slower tenfold.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (uint8[2, 8] a, int8[8, 4] b) => (int32[2, 4] y) { y = MatMulInteger(a, b) }
        ```

    How to fix
        Express it by operators that the target has. ``legalize-target`` does so where it knows how:
        compile with ``--target``.
    """

    code: ClassVar[str] = "QN510"
    name: ClassVar[str] = "unsupported-operator"


@dataclass(frozen=True, slots=True)
class UnsupportedTypes(TargetRule):
    """What it checks
        The target has the operator for this combination of input types.

    Why it matters
        Vendors accept few of the possible combinations, and document fewer.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 4] y)
        <float s = {0.1}, uint8 z = {128},
         int16[8, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
                          1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
         int16 zw = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear(w, s, zw)
            p = MatMul(xd, wd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Give the operand another width or sign: see the help line, or compile with ``--target``.
    """

    code: ClassVar[str] = "QN511"
    name: ClassVar[str] = "unsupported-types"


@dataclass(frozen=True, slots=True)
class UnsupportedGranularity(TargetRule):
    """What it checks
        Scales are per tensor, per channel or per block as the target takes them.

    Why it matters
        Plain blocked int4 weights, as most 4-bit exporters write them, run in floating point on
        Hexagon, and are refused on its older versions.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 4] x) => (float[2, 1] y)
        <float s = {0.1}, uint16 z = {32768}, float[2, 1] t = {0.1, 0.2},
         int8[4, 1] w = {1, 2, 3, 4}, int8[2, 1] zw = {0, 0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear<axis: int = 0, block_size: int = 2>(w, t, zw)
            p = MatMul(xd, wd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        One scale per output channel; or, where the target has it, blocks whose scales are integers
        too (low-power block quantization).
    """

    code: ClassVar[str] = "QN512"
    name: ClassVar[str] = "unsupported-granularity"


@dataclass(frozen=True, slots=True)
class UnsupportedOutputType(TargetRule):
    """What it checks
        The result has a type that the operator can write, most often that of its first input.

    Why it matters
        A result of another width is computed in floating point and converted, or refused.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s = {0.1}, uint16 z = {32768}, float t = {0.00390625}, uint8 zt = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Softmax(xd)
            pq = QuantizeLinear(p, t, zt)
            y = DequantizeLinear(pq, t, zt)
        }
        ```

    How to fix
        Write the type of the input, and requantize behind the operator.
    """

    code: ClassVar[str] = "QN513"
    name: ClassVar[str] = "unsupported-output-type"


@dataclass(frozen=True, slots=True)
class UnsupportedAttribute(TargetRule):
    """What it checks
        Axes, exponents and other attributes are among those that the target implements.

    Why it matters
        The operator exists, but not this way of using it.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2, 4, 8] x) => (float[2, 4, 8] y)
        <float s = {0.1}, uint16 z = {32768}, float t = {0.1}, uint8 zt = {0},
         uint8[4, 8] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8,
                          1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            g = DequantizeLinear(w, t, zt)
            p = RMSNormalization<axis: int = 1>(xd, g)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Transpose so that the last axis is meant, or rewrite as the help line says.
    """

    code: ClassVar[str] = "QN514"
    name: ClassVar[str] = "unsupported-attribute"


@dataclass(frozen=True, slots=True)
class RankAboveLimit(TargetRule):
    """What it checks
        Tensors have no more dimensions than the target's kernels take.

    Why it matters
        Leading dimensions of one, which cost nothing on a CPU, get a graph refused.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 1, 1, 1, 2, 8] x) => (float[1, 1, 1, 1, 2, 8] y)
        <float s = {0.1}, uint8 z = {128}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Add(xd, xd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Reshape: merge dimensions that lie side by side.
    """

    code: ClassVar[str] = "QN515"
    name: ClassVar[str] = "rank-above-limit"


@dataclass(frozen=True, slots=True)
class UnsharedEncoding(TargetRule):
    """What it checks
        Operators that only move codes have one encoding on both sides.

    Why it matters
        Codes cannot be moved and changed at once; the compiler computes the move in floating point.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[8, 2] y)
        <float s = {0.1}, float t = {0.2}, uint8 z = {128}, int64[2] shape = {8, 2}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Reshape(xd, shape)
            pq = QuantizeLinear(p, t, z)
            y = DequantizeLinear(pq, t, z)
        }
        ```

    How to fix
        Share the encoding, and requantize before the operator. ``unify-encodings`` does so.
    """

    code: ClassVar[str] = "QN516"
    name: ClassVar[str] = "unshared-encoding"


@dataclass(frozen=True, slots=True)
class ChangedEncoding(TargetRule):
    """What it checks
        The target computes with the types and encodings that the file states.

    Why it matters
        Some are replaced without a word: the device then gives other numbers than any simulation of
        the file, and no log says so.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s = {0.1}, uint16 z = {32768}, float t = {0.00002}, uint16 zt = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Sigmoid(xd)
            pq = QuantizeLinear(p, t, zt)
            y = DequantizeLinear(pq, t, zt)
        }
        ```

    How to fix
        State what the target uses anyway, so that the file and the device agree.
    """

    code: ClassVar[str] = "QN517"
    name: ClassVar[str] = "changed-encoding"
    severity: ClassVar[Severity] = Severity.WARNING


@dataclass(frozen=True, slots=True)
class IgnoredBiasScale(Rule):
    """What it checks
        The scale of an int32 bias is that of the input times that of the weight, zero point 0.

    Why it matters
        The codes of the bias are added to the accumulator as they are; another declared scale is
        ignored, which was seen to move results by 51,200 LSB.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 2] x) => (float[2, 2] y)
        <float s = {0.1}, uint8 z = {128}, int8[2, 2] w = {1, 2, 3, 4}, int8 zw = {0},
         int32[2] b = {5, 6}, float t = {0.5}, int32 zb = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear(w, s, zw)
            bd = DequantizeLinear(b, t, zb)
            p = Gemm(xd, wd, bd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Quantize the bias again with the product of the two scales.
    """

    code: ClassVar[str] = "QN518"
    name: ClassVar[str] = "ignored-bias-scale"
    severity: ClassVar[Severity] = Severity.WARNING
    factor: float
    target: str

    def message(self) -> str:
        return (
            f"{self.target} adds the bias's codes at the scale of input times weight, up to "
            f"{self.factor:g} times the declared one"
        )

    def help(self) -> str:
        return "quantize the bias at the product of the two scales, zero point 0"


@dataclass(frozen=True, slots=True)
class AccumulatorOverflow(Rule):
    """What it checks
        No input can drive a sum of products, bias included, past the target's accumulator. The
        bound comes from the actual weights: Σ|w| · max|x - z| of each output channel.

    Why it matters
        A sum that wraps gives a result of the wrong sign, for rare inputs only.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 8] x) => (float[1, 1] y)
        <float s = {0.1}, uint16 z = {32768}, int16 zw = {0},
         int16[8, 1] w = {32767, 32767, 32767, 32767, 32767, 32767, 32767, 32767}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear(w, s, zw)
            p = MatMul(xd, wd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Fewer bits for input or weight, or a weight split along its inputs.
    """

    code: ClassVar[str] = "QN519"
    name: ClassVar[str] = "accumulator-overflow"
    bits: int
    needed: float
    target: str

    def message(self) -> str:
        return f"a sum needs {self.needed:.1f} bits; {self.target} accumulates in {self.bits}"

    def help(self) -> str:
        return "use fewer bits for the input or the weight"


@dataclass(frozen=True, slots=True)
class FloatIsland(TargetRule):
    """What it checks
        Every node between quantized inputs and outputs computes on codes: each of its float inputs
        is dequantized, each of its float outputs quantized.

    Why it matters
        A node without encodings is accepted and run in floating point, or refused where the chip
        has none. Accepted is not integer.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s = {0.1}, uint8 z = {128}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Sigmoid(xd)
            r = Relu(p)
            rq = QuantizeLinear(r, s, z)
            y = DequantizeLinear(rq, s, z)
        }
        ```

    How to fix
        Give every tensor an encoding: compile with qnpu, or add Q/DQ pairs.
    """

    code: ClassVar[str] = "QN520"
    name: ClassVar[str] = "float-island"


@dataclass(frozen=True, slots=True)
class ModelTooLarge(Rule):
    """What it checks
        The model, weights as stored, fits what the target can load at once.

    Why it matters
        A context binary past the limit is refused on the device, after a long compile.

    Example
        ```console
        qnpu-check eight-billion.qdq.onnx --target qnn-htp-v75
        ```

    How to fix
        Split the model into parts of several layers each, or use 4-bit weights.
    """

    code: ClassVar[str] = "QN521"
    name: ClassVar[str] = "model-too-large"
    megabytes: int
    limit: int
    target: str

    def message(self) -> str:
        return f"weights of {self.megabytes} MB; {self.target} loads at most {self.limit} MB"

    def help(self) -> str:
        return "split the model by layers, or use weights of fewer bits"


@dataclass(frozen=True, slots=True)
class OpsetAboveLimit(Rule):
    """What it checks
        The opset is one that the target's converter reads.

    Why it matters
        A converter that meets a newer opset fails, or reads operators by their older meaning.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s = {0.1}, int8 z = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Relu(xd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Export at the lower opset; 16-bit and 4-bit Q/DQ need opset 21.
    """

    code: ClassVar[str] = "QN522"
    name: ClassVar[str] = "opset-above-limit"
    opset: int
    limit: int
    target: str

    def message(self) -> str:
        return f"opset {self.opset}; {self.target} reads up to {self.limit}"

    def help(self) -> str:
        return f"export at opset {self.limit}"


@dataclass(frozen=True, slots=True)
class UnknownToProfile(TargetRule):
    """What it checks
        The target's profile has a source that says what becomes of the node.

    Why it matters
        What is not known is said to be so, rather than guessed.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s = {0.1}, int8 z = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            p = Mish(xd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Try the vendor's compiler on it; for Qualcomm's, ``--oracle htp``.
    """

    code: ClassVar[str] = "QN523"
    name: ClassVar[str] = "unknown-to-profile"
    severity: ClassVar[Severity] = Severity.WARNING


@dataclass(frozen=True, slots=True)
class UnsupportedForm(Rule):
    """What it checks
        A quantized graph is written in a form that the target reads: Q/DQ pairs, QLinear operators,
        or plain integer operators.

    Why it matters
        Compilers that match Q/DQ pairs do not see a scale in integer arithmetic, and the reverse.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (uint8[2, 8] a, int8[8, 4] b) => (int32[2, 4] y) { y = MatMulInteger(a, b) }
        ```

    How to fix
        Hand over the form that the target reads; ``qnpu-compile`` writes model.qdq.onnx.
    """

    code: ClassVar[str] = "QN524"
    name: ClassVar[str] = "unsupported-form"
    form: str
    accepted: str
    target: str

    def message(self) -> str:
        return f"the graph is in {self.form} form; {self.target} reads {self.accepted}"

    def help(self) -> str:
        return "hand over model.qdq.onnx, where Q/DQ pairs state every encoding"


@dataclass(frozen=True, slots=True)
class NotQuantized(Rule):
    """What it checks
        A model that is to run on an integer target holds encodings.

    Why it matters
        Without any, the whole graph runs in floating point, or not at all.

    Example
        ```console
        qnpu-check float.onnx --target qnn-htp-v75
        ```

    How to fix
        ``qnpu-compile float.onnx --target qnn-htp-v75``, and check what it writes.
    """

    code: ClassVar[str] = "QN525"
    name: ClassVar[str] = "not-quantized"
    target: str

    def message(self) -> str:
        return f"the graph holds no encodings, so {self.target} has nothing to compute in integers"

    def help(self) -> str:
        return "compile it with qnpu-compile, and check model.qdq.onnx"


@dataclass(frozen=True, slots=True)
class RescaledBlocks(Rule):
    """What it checks
        A weight in blocks with float scales was given block scales of few bits over one float scale
        per channel, and its codes were rounded anew.

    Why it matters
        The target multiplies such blocks in integers and others not, but the weight changes a
        little: the message states by how much.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 4] x) => (float[1, 2] y)
        <float s = {0.1}, uint16 z = {32768}, int4[4, 2] w = {1, 2, 3, 4, 5, 6, 7, -7},
         float[2, 2] t = {0.1, 0.2, 0.03, 0.5}, int4[2, 2] zw = {0, 0, 0, 0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear<axis: int = 0, block_size: int = 2>(w, t, zw)
            p = MatMul(xd, wd)
            pq = QuantizeLinear(p, s, z)
            y = DequantizeLinear(pq, s, z)
        }
        ```

    How to fix
        Nothing is wrong. Compare perplexities, or use one scale per output channel.
    """

    code: ClassVar[str] = "QN526"
    name: ClassVar[str] = "rescaled-blocks"
    severity: ClassVar[Severity] = Severity.NOTE
    sqnr: float
    scales: str

    def message(self) -> str:
        return (
            f"block scales were rounded to {self.scales} over a scale per channel: "
            f"{self.sqnr:g} dB signal over error against the weight before"
        )

    def help(self) -> str:
        return "nothing needs to be done; one scale per output channel is taken as it is"


@dataclass(frozen=True, slots=True)
class RefusedByCompiler(Rule):
    """What it checks
        With ``--oracle``: the vendor's own compiler accepts the graph.

    Why it matters
        It has the last word; our profile only repeats what it was seen to say.

    Example
        ```console
        qnpu-check foreign.qdq.onnx --target qnn-htp-v75 --oracle htp
        ```

    How to fix
        See the faults that the profile names for the same node. Where there is none, the profile
        has a gap: please report the graph.
    """

    code: ClassVar[str] = "QN530"
    name: ClassVar[str] = "refused-by-compiler"
    target: str
    reason: str

    def message(self) -> str:
        return f"the compiler for {self.target} refuses the graph: {self.reason}"

    def help(self) -> str:
        return "see the faults that the profile names; where there is none, please report the graph"


@dataclass(frozen=True, slots=True)
class CompiledToFloat(Rule):
    """What it checks
        With ``--oracle``: no operation of the compiled graph computes in floating point.

    Why it matters
        The compiler says nothing of it; on the phone it costs time and power, or fails.

    Example
        ```console
        qnpu-check foreign.qdq.onnx --target qnn-htp-v75 --oracle htp
        ```

    How to fix
        See the faults that the profile names for the same node.
    """

    code: ClassVar[str] = "QN531"
    name: ClassVar[str] = "compiled-to-float"
    operation: str
    target: str

    def message(self) -> str:
        return f"the compiler for {self.target} made `{self.operation}` of it"

    def help(self) -> str:
        return "give the node types and encodings that the target has"


@dataclass(frozen=True, slots=True)
class EmulatorDiffers(Rule):
    """What it checks
        With ``--oracle --run``: each output on the vendor's emulator is within the profile's
        tolerance of ONNX Runtime's, in LSB of that output.

    Why it matters
        A simulation that the chip does not follow proves nothing.

    Example
        ```console
        qnpu-check model.qdq.onnx --target qnn-htp-v75 --oracle htp --run
        ```

    How to fix
        Cut the graph in two and compare again, until the node is found; state its encoding as the
        target forces it.
    """

    code: ClassVar[str] = "QN532"
    name: ClassVar[str] = "emulator-differs"
    severity: ClassVar[Severity] = Severity.WARNING
    lsb: int
    tolerance: int
    target: str

    def message(self) -> str:
        return (
            f"{self.target} is up to {self.lsb} LSB from ONNX Runtime; "
            f"{self.tolerance} LSB were expected at most"
        )

    def help(self) -> str:
        return "cut the graph in two and compare again, until the node that differs is found"


@dataclass(frozen=True, slots=True)
class OracleFailed(Rule):
    """What it checks
        With ``--oracle``: the vendor's compiler or emulator comes to an end.

    Why it matters
        It is a program of its own, which can crash or hang on a graph; that is no verdict.

    Example
        ```console
        qnpu-check enormous.qdq.onnx --target qnn-htp-v75 --oracle htp --run
        ```

    How to fix
        Try a part of the model, or check without ``--oracle``.
    """

    code: ClassVar[str] = "QN533"
    name: ClassVar[str] = "oracle-failed"
    reason: str

    def message(self) -> str:
        return f"the vendor's compiler gave no answer: {self.reason}"

    def help(self) -> str:
        return "try a part of the model, or check without --oracle"
