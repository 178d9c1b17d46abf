"""Every rule qnpu can report, in code order.

Families: QN1xx input graph and files, QN2xx rotation, QN3xx calibration and encodings, QN5xx bit
plan, target and configuration (those on a target's operators are in ``target_rules``), QN9xx output
and internal. A name states the fault, never the fix.
The docstring of a rule is its manual page (``qnpu-check --explain CODE``).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import ceil, exp
from typing import ClassVar

from qnpu.compiler import target_rules
from qnpu.compiler.diagnostics import Rule, Severity


@dataclass(frozen=True, slots=True)
class DynamicDimension(Rule):
    """What it checks
        Every dimension of every graph input is a number once shapes are frozen.

    Why it matters
        An NPU compiles one fixed shape; a scale measured at one length says nothing of another.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }
        ```

    How to fix
        Bind the name: ``--freeze-dim N=128``.
    """

    code: ClassVar[str] = "QN101"
    name: ClassVar[str] = "dynamic-dimension"
    dimension: str
    value: str

    def message(self) -> str:
        return f"dimension `{self.dimension}` of `{self.value}` is not static"

    def help(self) -> str:
        return f"pass --freeze-dim {self.dimension}=<size>"


@dataclass(frozen=True, slots=True)
class MissingFile(Rule):
    """What it checks
        A file named on the command line, or by the configuration, exists and can be read.

    Why it matters
        Nothing can be compiled from it.

    Example
        ```console
        qnpu-compile no-such-model.onnx
        ```

    How to fix
        Check the path and its permissions.
    """

    code: ClassVar[str] = "QN102"
    name: ClassVar[str] = "missing-file"
    path: str

    def message(self) -> str:
        return f"`{self.path}` does not exist or cannot be read"

    def help(self) -> str:
        return "check the path and its permissions"


@dataclass(frozen=True, slots=True)
class NotOnnx(Rule):
    """What it checks
        The model file parses as an ONNX protobuf with a graph.

    Why it matters
        A download cut short, a Git LFS pointer or another format cannot be compiled.

    Example
        ```console
        head -c 1000 model.onnx > cut.onnx && qnpu-compile cut.onnx
        ```

    How to fix
        Fetch or export the file again; ``onnx.checker.check_model(path)`` must pass.
    """

    code: ClassVar[str] = "QN103"
    name: ClassVar[str] = "not-onnx"
    reason: str

    def message(self) -> str:
        return f"not a complete ONNX model: {self.reason}"

    def help(self) -> str:
        return "fetch or export the file again; it may be cut short or in another format"


@dataclass(frozen=True, slots=True)
class MissingExternalData(Rule):
    """What it checks
        Each external weight file exists beside the model and is long enough.

    Why it matters
        Large models keep weights in a second file, which is easily left behind in a copy.

    Example
        ```console
        cp model.onnx elsewhere/ && qnpu-compile elsewhere/model.onnx
        ```

    How to fix
        Copy the data file next to the model.
    """

    code: ClassVar[str] = "QN104"
    name: ClassVar[str] = "missing-external-data"
    path: str
    reason: str

    def message(self) -> str:
        return f"external data `{self.path}` {self.reason}"

    def help(self) -> str:
        return "copy the whole data file next to the model, under the name the model expects"


@dataclass(frozen=True, slots=True)
class ExternalDataOutsideFolder(Rule):
    """What it checks
        External data stays inside the model's own folder, links resolved.

    Why it matters
        A model from elsewhere could otherwise read any file of yours.

    Example
        ```console
        qnpu-compile evil.onnx    # an initializer whose location is ../../secret
        ```

    How to fix
        Move the data file into the model's folder and re-save the model.
    """

    code: ClassVar[str] = "QN105"
    name: ClassVar[str] = "external-data-outside-folder"
    path: str

    def message(self) -> str:
        return f"external data `{self.path}` lies outside the model's folder"

    def help(self) -> str:
        return "move the data file into the model's folder and save the model again"


@dataclass(frozen=True, slots=True)
class UnknownOperator(Rule):
    """What it checks
        Each node's operator is one qnpu knows how to run and quantize.

    Why it matters
        An operator without a known meaning has no encoding rule; guessing would be silent error.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23, "acme" : 1]>
        g (float[1, 4] x) => (float[1, 4] y) { y = acme.Mystery(x) }
        ```

    How to fix
        Export with standard ONNX operators, or give the operator as a model-local function.
    """

    code: ClassVar[str] = "QN106"
    name: ClassVar[str] = "unknown-operator"
    operator: str

    def message(self) -> str:
        return f"operator `{self.operator}` is not known"

    def help(self) -> str:
        return "export with standard ONNX operators or add it as a model-local function"


@dataclass(frozen=True, slots=True)
class NonFiniteWeight(Rule):
    """What it checks
        No weight holds NaN or infinity, once attention masks are made finite.

    Why it matters
        One such element makes the scale of its whole channel infinite.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 1] x) => (float[1, 1] y)
        <float[1, 1] w = {inf}>
        { y = MatMul(x, w) }
        ```

    How to fix
        Repair the weight; an overflow in a float16 conversion is the usual cause.
    """

    code: ClassVar[str] = "QN107"
    name: ClassVar[str] = "non-finite-weight"
    count: int

    def message(self) -> str:
        return f"{self.count} elements are NaN or infinite"

    def help(self) -> str:
        return "repair the weight; a float16 overflow during export is the usual cause"


@dataclass(frozen=True, slots=True)
class UnsupportedFloatType(Rule):
    """What it checks
        Float tensors are float32.

    Why it matters
        The float graph is the reference that quantized results are compared with; half precision
        would add an error of its own, and ONNX Runtime lacks many float16 kernels on CPU.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float16[1, 4] x) => (float16[1, 4] y) { y = Relu(x) }
        ```

    How to fix
        Export the model in float32.
    """

    code: ClassVar[str] = "QN108"
    name: ClassVar[str] = "unsupported-float-type"
    dtype: str

    def message(self) -> str:
        return f"tensor is {self.dtype}, only float32 graphs are compiled"

    def help(self) -> str:
        return "export the model in float32"


@dataclass(frozen=True, slots=True)
class ControlFlow(Rule):
    """What it checks
        No If, Loop or Scan is left after constants are folded.

    Why it matters
        An NPU graph is a straight line of operators.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (bool c, float[1, 4] x) => (float[1, 4] y) {
            y = If (c) <then_branch = t () => (float[1, 4] a) { a = Relu(x) },
                        else_branch = e () => (float[1, 4] b) { b = Neg(x) }>
        }
        ```

    How to fix
        Export with static shapes, so that the branch is decided at export time.
    """

    code: ClassVar[str] = "QN109"
    name: ClassVar[str] = "control-flow"
    operator: str

    def message(self) -> str:
        return f"`{self.operator}` depends on run-time data"

    def help(self) -> str:
        return "export with static shapes so that the branch is decided at export time"


@dataclass(frozen=True, slots=True)
class InputBound(Rule):
    """What it checks
        Reports an input that was replaced by a constant while freezing shapes.

    Why it matters
        The compiled file no longer takes that input; callers must know.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[1, 4] attention_mask, float[1, 4] x) => (float[1, 4] y) {
            m = Cast<to = 1>(attention_mask)
            y = Mul(x, m)
        }
        ```

    How to fix
        Nothing is wrong; ``--keep-input NAME`` keeps the input.
    """

    code: ClassVar[str] = "QN110"
    name: ClassVar[str] = "input-bound"
    severity: ClassVar[Severity] = Severity.NOTE
    value: str
    content: str

    def message(self) -> str:
        return f"input `{self.value}` is now the constant {self.content}"

    def help(self) -> str:
        return f"pass --keep-input {self.value} to keep it"


@dataclass(frozen=True, slots=True)
class MaskReplaced(Rule):
    """What it checks
        Reports an attention mask constant that was replaced by a small one.

    Why it matters
        A mask of -65504 or -inf would take the whole range of the score tensor, and every real
        score would fall on one code.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 2] x) => (float[1, 2] y)
        <float[1, 2] mask = {0.0, -65504.0}>
        { s = Add(x, mask)  y = Softmax(s) }
        ```

    How to fix
        Nothing is wrong; ``--mask-value`` sets another constant.
    """

    code: ClassVar[str] = "QN111"
    name: ClassVar[str] = "mask-replaced"
    severity: ClassVar[Severity] = Severity.NOTE
    old: float
    new: float

    def message(self) -> str:
        return f"attention mask constant {self.old:g} replaced by {self.new:g}"

    def help(self) -> str:
        return "pass --mask-value to choose another constant"


@dataclass(frozen=True, slots=True)
class UnsupportedOpset(Rule):
    """What it checks
        The default-domain opset can be read by onnx and raised to the one qnpu writes.

    Why it matters
        16-bit and 4-bit QuantizeLinear need opset 21, RMSNormalization opset 23.

    Example
        ```onnx
        <ir_version: 3, opset_import: ["" : 5]>
        g (float[1, 4] x) => (int32[1, 4] y) { y = Cast<to = "INT32">(x) }
        ```

    How to fix
        Export the model again at opset 13 or later.
    """

    code: ClassVar[str] = "QN112"
    name: ClassVar[str] = "unsupported-opset"
    version: int
    reason: str

    def message(self) -> str:
        return f"opset {self.version} cannot be raised: {self.reason}"

    def help(self) -> str:
        return "export the model again at opset 13 or later"


@dataclass(frozen=True, slots=True)
class UnknownModel(Rule):
    """What it checks
        The model argument is an .onnx or .gguf file, a Hugging Face folder or id, or a built-in.

    Why it matters
        Nothing can be loaded from it.

    Example
        ```console
        qnpu-compile smollm3
        ```

    How to fix
        Use a path, a Hugging Face id, or one of the built-in names in ``--help``.
    """

    code: ClassVar[str] = "QN113"
    name: ClassVar[str] = "unknown-model"
    model: str
    reason: str

    def message(self) -> str:
        return f"cannot load `{self.model}`: {self.reason}"

    def help(self) -> str:
        return "give an .onnx or .gguf file, a Hugging Face folder or id, or a built-in name"


@dataclass(frozen=True, slots=True)
class MissingPackage(Rule):
    """What it checks
        The Python package that a chosen input needs is installed.

    Why it matters
        Exporters are an optional extra; an ONNX file needs none of them.

    Example
        ```console
        qnpu-export smollm2-135m    # without qnpu[export]
        ```

    How to fix
        Install the extra or package that the message names.
    """

    code: ClassVar[str] = "QN114"
    name: ClassVar[str] = "missing-package"
    package: str
    install: str

    def message(self) -> str:
        return f"package `{self.package}` is not installed"

    def help(self) -> str:
        return f"run: pip install {self.install}"


@dataclass(frozen=True, slots=True)
class ExportFailed(Rule):
    """What it checks
        The exporter turned the torch model into ONNX.

    Why it matters
        Nothing can be compiled without it.

    Example
        ```console
        qnpu-export org/model-with-custom-cuda-code
        ```

    How to fix
        Try the other exporter (``--exporter optimum``), or export by hand.
    """

    code: ClassVar[str] = "QN115"
    name: ClassVar[str] = "export-failed"
    exporter: str
    reason: str

    def message(self) -> str:
        return f"{self.exporter} could not export the model: {self.reason}"

    def help(self) -> str:
        return "try the other exporter (--exporter dynamo|optimum) or pass an .onnx file"


@dataclass(frozen=True, slots=True)
class GraphDoesNotRun(Rule):
    """What it checks
        ONNX Runtime opens and runs the float graph.

    Why it matters
        What does not run cannot be calibrated, nor compared with its quantized form.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 4] x) => (float[1, 3] y)
        <float[5, 3] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
        { y = MatMul(x, w) }
        ```

    How to fix
        Check the model with ``onnx.checker.check_model(path, full_check=True)``.
    """

    code: ClassVar[str] = "QN116"
    name: ClassVar[str] = "graph-does-not-run"
    reason: str

    def message(self) -> str:
        return f"ONNX Runtime refuses the graph: {self.reason}"

    def help(self) -> str:
        return "check it with onnx.checker.check_model(path, full_check=True)"


@dataclass(frozen=True, slots=True)
class UnsupportedOperatorForm(Rule):
    """What it checks
        Each operator of ONNX Runtime's own domain has a form that standard operators can express:
        float weights, no option that changes the softmax, lengths known at compile time.

    Why it matters
        A decomposition that leaves an option out would compute something else.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1, 32] x) => (float[1, 1] y)
        <uint8[1, 1, 16] w = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, float[1] s = {1}>
        { y = com.microsoft.MatMulNBits<K: int = 32, N: int = 1, bits: int = 4,
                                        block_size: int = 32>(x, w, s) }
        ```

    How to fix
        Export a float model without the option that the message names; with the model builder of
        onnxruntime-genai: ``-p fp32 -e cpu``.
    """

    code: ClassVar[str] = "QN117"
    name: ClassVar[str] = "unsupported-operator-form"
    operator: str
    reason: str

    def message(self) -> str:
        return f"`{self.operator}` cannot be taken apart: {self.reason}"

    def help(self) -> str:
        return "export a float model without it; the onnxruntime-genai builder: -p fp32 -e cpu"


@dataclass(frozen=True, slots=True)
class CacheInputMissing(Rule):
    """What it checks
        A graph to be compiled with a cache takes the usual inputs: ``input_ids``,
        ``attention_mask``, ``position_ids`` and ``past_key_values.N.key`` and ``.value``, and
        returns ``present.N.key`` and ``.value``, each a Concat of the past and new entries.

    Why it matters
        Entries slide through the cache, so only the mask tells which of them are there, and only
        positions that are fed tell how far apart they are.

    Example
        ```console
        qnpu-compile prefill-only.onnx --context 1024
        ```

    How to fix
        Export with ``qnpu-export --cache``.
    """

    code: ClassVar[str] = "QN118"
    name: ClassVar[str] = "cache-input-missing"
    value: str
    reason: str

    def message(self) -> str:
        return f"the graph cannot be run with a cache: `{self.value}` {self.reason}"

    def help(self) -> str:
        return "export it with qnpu-export --cache, or with optimum and position ids"


@dataclass(frozen=True, slots=True)
class UnreadableMark(Rule):
    """What it checks
        Metadata under ``qnpu.…`` are as a pass of qnpu writes them.

    Why it matters
        They say which caches are rotated, which tokens a graph holds as constants, and which codes
        its inputs and outputs are: misread, results would be wrong.

    Example
        ```python
        model.metadata_props["qnpu.prefix"] = "none"
        ```

    How to fix
        Compile the float model again, or delete the entry if no pass of qnpu has written it.
    """

    code: ClassVar[str] = "QN119"
    name: ClassVar[str] = "unreadable-mark"
    mark: str
    reason: str

    def message(self) -> str:
        return f"metadata `{self.mark}` are not what qnpu writes there: {self.reason}"

    def help(self) -> str:
        return "compile the float model again, or delete that entry if qnpu has not written it"


@dataclass(frozen=True, slots=True)
class StreamNotRotated(Rule):
    """What it checks
        The residual stream can be rotated: embeddings and linears write to it, norms followed by
        linears read it, and nothing else touches it.

    Why it matters
        Without the rotation R1 a few channels keep their outliers, and 8-bit activations lose much.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[1, 2] ids) => (float[1, 2, 4] logits, float[1, 2, 4] tapped)
        <float[3, 4] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float[4] gain = {1, 2, 3, 4},
         float[4, 4] head = {1, 2, 3, 4, 2, 3, 4, 1, 3, 4, 1, 2, 4, 1, 2, 3}>
        {
            tapped = Gather(table, ids)
            n = RMSNormalization(tapped, gain)
            logits = MatMul(n, head)
        }
        ```

    How to fix
        Remove what the message names, such as an extra graph output, or export without it. A norm
        that writes to the stream (Gemma's post-norms) blocks R1 for good; R2 is fused all the same.
    """

    code: ClassVar[str] = "QN201"
    name: ClassVar[str] = "stream-not-rotated"
    severity: ClassVar[Severity] = Severity.WARNING
    reason: str

    def message(self) -> str:
        return f"rotation R1 is left out: {self.reason}"

    def help(self) -> str:
        return "remove what the message names, or export without it"


@dataclass(frozen=True, slots=True)
class ValuesNotRotated(Rule):
    """What it checks
        The path from the linear that makes an attention's values to the linear that takes its heads
        is reshapes and transposes alone, and no one else reads it.

    Why it matters
        Without the rotation R2 the values keep their outliers in the 8-bit cache.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[1, 2] ids) => (float[1, 2, 2] logits)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[2, 2] w = {1, 2, 3, 4},
         float[2, 2] o = {1, 2, 2, 1}>
        {
            x = Gather(table, ids)
            p = Softmax(x)
            v = MatMul(x, w)
            r = Relu(v)
            a = MatMul(p, r)
            logits = MatMul(a, o)
        }
        ```

    How to fix
        Nothing is wrong; that attention stays as it is.
    """

    code: ClassVar[str] = "QN202"
    name: ClassVar[str] = "values-not-rotated"
    severity: ClassVar[Severity] = Severity.WARNING
    reason: str

    def message(self) -> str:
        return f"rotation R2 is left out: {self.reason}"

    def help(self) -> str:
        return "nothing is wrong; that attention stays as it is"


@dataclass(frozen=True, slots=True)
class NoHadamard(Rule):
    """What it checks
        A Hadamard matrix of the size to rotate can be built.

    Why it matters
        Its entries are all of one magnitude, so it spreads an outlier as evenly as can be. A random
        orthogonal matrix is used instead; it spreads nearly as well.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[1, 2] ids) => (float[1, 2, 3] logits)
        <float[2, 3] table = {1, 2, 3, 4, 5, 6}, float[3] gain = {1, 1, 1},
         float[3, 3] head = {1, 2, 3, 2, 3, 1, 3, 1, 2}>
        {
            x = Gather(table, ids)
            n = RMSNormalization(x, gain)
            logits = MatMul(n, head)
        }
        ```

    How to fix
        Nothing is wrong.
    """

    code: ClassVar[str] = "QN203"
    name: ClassVar[str] = "no-hadamard"
    severity: ClassVar[Severity] = Severity.WARNING
    size: int

    def message(self) -> str:
        return f"no Hadamard matrix of size {self.size} is known here; a random rotation is used"

    def help(self) -> str:
        return "nothing is wrong; the rotation spreads outliers a little less evenly"


@dataclass(frozen=True, slots=True)
class NotRotatedOnline(Rule):
    """What it checks
        What ``--online`` asks for can be done: the scores take transposed keys, a down projection's
        weight is its own, and a Hadamard matrix of the size is known.

    Why it matters
        Without R3 keys, and without R4 the inputs of down projections, keep their outliers.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 2, 3] x) => (float[1, 2, 3] y)
        <float[3, 3] up = {1, 2, 3, 2, 3, 1, 3, 1, 2},
         float[3, 3] down = {1, 2, 3, 4, 5, 6, 7, 8, 9}>
        {
            u = MatMul(x, up)
            r = Relu(u)
            d = MatMul(r, down)
            y = Add(x, d)
        }
        ```

    How to fix
        Nothing is wrong; that tensor stays as it is. Leave its width at 16 bits.
    """

    code: ClassVar[str] = "QN204"
    name: ClassVar[str] = "not-rotated-online"
    severity: ClassVar[Severity] = Severity.WARNING
    rotation: str
    reason: str

    def message(self) -> str:
        return f"online rotation {self.rotation} is left out: {self.reason}"

    def help(self) -> str:
        return "nothing is wrong; that tensor stays as it is"


@dataclass(frozen=True, slots=True)
class RotatedCache(Rule):
    """What it checks
        Reports a graph input or output that holds attention values times the rotation R2.

    Why it matters
        Whoever feeds it back as the past of a graph rotated alike (same model, same seed) need not
        care; whoever reads the values themselves sees others than before.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[1, 2] ids) => (float[1, 2, 2] logits, float[1, 2, 2] v)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[2, 2] w = {1, 2, 3, 4},
         float[2, 2] o = {1, 2, 2, 1}>
        {
            x = Gather(table, ids)
            p = Softmax(x)
            v = MatMul(x, w)
            a = MatMul(p, v)
            logits = MatMul(a, o)
        }
        ```

    How to fix
        Nothing is wrong; ``--no-rotate-caches`` leaves caches, and the attention behind them, as
        they are.
    """

    code: ClassVar[str] = "QN205"
    name: ClassVar[str] = "rotated-cache"
    severity: ClassVar[Severity] = Severity.NOTE
    value: str

    def message(self) -> str:
        return f"`{self.value}` now holds values times the rotation R2"

    def help(self) -> str:
        return "feed it to a graph rotated alike, or pass --no-rotate-caches"


@dataclass(frozen=True, slots=True)
class CalibrationMismatch(Rule):
    """What it checks
        Calibration arrays have the names, shapes and types of the graph's inputs.

    Why it matters
        Ranges measured on the wrong tensor are worse than none.

    Example
        ```console
        qnpu-compile cnn.onnx --calib wrong.npz    # x is (8, 1, 28), the graph takes (1, 1, 28, 28)
        ```

    How to fix
        Save one array per input with a leading sample axis: ``np.savez(path, x=array)``.
    """

    code: ClassVar[str] = "QN301"
    name: ClassVar[str] = "calibration-mismatch"
    value: str
    reason: str

    def message(self) -> str:
        return f"calibration data for input `{self.value}`: {self.reason}"

    def help(self) -> str:
        return "save one array per graph input, samples first: np.savez(path, input=array)"


@dataclass(frozen=True, slots=True)
class CalibrationUnreadable(Rule):
    """What it checks
        The calibration or evaluation data can be read and is long enough.

    Why it matters
        Fewer tokens than one window leave nothing to measure.

    Example
        ```console
        echo hi > short.txt && qnpu-compile model.onnx --calib short.txt
        ```

    How to fix
        Give a UTF-8 text of at least windows × length tokens, or an .npz of input arrays.
    """

    code: ClassVar[str] = "QN302"
    name: ClassVar[str] = "calibration-unreadable"
    source: str
    reason: str

    def message(self) -> str:
        return f"data `{self.source}`: {self.reason}"

    def help(self) -> str:
        return "give a longer UTF-8 text, or an .npz with one array per graph input"


@dataclass(frozen=True, slots=True)
class MissingEncoding(Rule):
    """What it checks
        Each float tensor of the graph has an encoding before Q/DQ pairs are inserted.

    Why it matters
        A vendor tool would invent the missing one at import, silently.

    Example
        ```console
        qnpu-check partly-quantized.onnx
        ```

    How to fix
        Add the tensor to the bit plan; within qnpu-compile this is a fault of ours: report it.
    """

    code: ClassVar[str] = "QN303"
    name: ClassVar[str] = "missing-encoding"
    value: str

    def message(self) -> str:
        return f"float tensor `{self.value}` has no encoding"

    def help(self) -> str:
        return "add the tensor to the bit plan"


@dataclass(frozen=True, slots=True)
class NonFiniteActivation(Rule):
    """What it checks
        Activations seen in calibration are finite.

    Why it matters
        A range that reaches infinity has no scale.

    Example
        ```onnx
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 4] x) => (float[1, 4] y)
        <float[1] zero = {0.0}>
        { y = Div(x, zero) }
        ```

    How to fix
        Look at the node that makes it; with float16 sources an overflow is the usual cause.
    """

    code: ClassVar[str] = "QN304"
    name: ClassVar[str] = "non-finite-activation"
    value: str

    def message(self) -> str:
        return f"`{self.value}` is NaN or infinite on the calibration data"

    def help(self) -> str:
        return "check the node that produces it and the calibration data"


@dataclass(frozen=True, slots=True)
class NoCalibrationData(Rule):
    """What it checks
        There is data to calibrate with: text for a model that takes token ids, arrays otherwise.

    Why it matters
        A static scale is measured, never guessed.

    Example
        ```console
        qnpu-compile resnet.onnx
        ```

    How to fix
        Pass ``--calib data.npz``; for a text model whose tokenizer is not found, ``--tokenizer``.
    """

    code: ClassVar[str] = "QN305"
    name: ClassVar[str] = "no-calibration-data"
    reason: str

    def message(self) -> str:
        return f"nothing to calibrate with: {self.reason}"

    def help(self) -> str:
        return "pass --calib data.npz, or --tokenizer with a text"


@dataclass(frozen=True, slots=True)
class UnreadableEncodings(Rule):
    """What it checks
        An AIMET or QNN encodings file (version 0.6.1, 1.0.0 or 2.0.0) holds integer encodings of
        the graph's tensors, one per tensor, each in the words of its version.

    Why it matters
        A vendor's tool guesses at what it cannot read, and calibrates the tensor anew.

    Example
        ```json
        {"version": "2.0.0", "encodings": [{"name": "x", "bw": 8, "y_scale": 0.1}]}
        ```

    How to fix
        Export the file again for this graph; never mix the keys of two versions.
    """

    code: ClassVar[str] = "QN306"
    name: ClassVar[str] = "unreadable-encodings"
    place: str
    reason: str

    def message(self) -> str:
        return f"encodings: `{self.place}` {self.reason}"

    def help(self) -> str:
        return "export the encodings again, for this graph and in one version"


@dataclass(frozen=True, slots=True)
class NotRunInTorch(Rule):
    """What it checks
        Each node that scales or rotations are learned through has an operator, attributes and types
        that the torch executor runs as ONNX means them.

    Why it matters
        A gradient through something else than the graph would teach the wrong scales.

    Example
        ```console
        qnpu-compile model-with-a-loop.onnx --learn blockwise
        ```

    How to fix
        Export the model without the operator, or compile with measured scales alone.
    """

    code: ClassVar[str] = "QN307"
    name: ClassVar[str] = "not-run-in-torch"
    operator: str
    reason: str

    def message(self) -> str:
        return f"`{self.operator}` cannot be run in torch: {self.reason}"

    def help(self) -> str:
        return "export the model without it, or compile with measured scales alone"


@dataclass(frozen=True, slots=True)
class LearningDiverged(Rule):
    """What it checks
        The loss of what is learned, a block or the whole model, goes down to the end.

    Why it matters
        The best state was kept, so nothing is worse than before; but the steps after it were for
        nothing, and more data or a smaller rate may give more.

    Example
        ```console
        qnpu-compile model.onnx --scheme w4a8 --learn blockwise --learn-windows 1
        ```

    How to fix
        Learn on more windows; nothing has to be done.
    """

    code: ClassVar[str] = "QN308"
    name: ClassVar[str] = "learning-diverged"
    severity: ClassVar[Severity] = Severity.NOTE
    what: str
    before: float
    after: float

    def message(self) -> str:
        return (
            f"{self.what}: the loss rose at the end; kept the best state, "
            f"{self.after:.3g} from {self.before:.3g}"
        )

    def help(self) -> str:
        return "nothing has to be done; more --learn-windows may give more"


@dataclass(frozen=True, slots=True)
class NothingToPredict(Rule):
    """What it checks
        A graph that is to be learned end to end has a float output to compare with the float model.

    Why it matters
        The loss is how far the quantized model's predictions are from the float model's.

    Example
        ```console
        qnpu-compile picks-next-token.onnx --scheme w4a8 --learn end-to-end
        ```

    How to fix
        Export the model with its logits, or learn block by block: `--learn blockwise`.
    """

    code: ClassVar[str] = "QN309"
    name: ClassVar[str] = "nothing-to-predict"
    severity: ClassVar[Severity] = Severity.ERROR

    def message(self) -> str:
        return "no float output to learn from"

    def help(self) -> str:
        return "export the model with its logits, or use --learn blockwise"


@dataclass(frozen=True, slots=True)
class PrefixLeftOut(Rule):
    """What it checks
        What ``--prefix`` asks for can be done: the graph takes token ids, its attention is
        understood, keys depend on positions by RoPE alone, and some tokens stand out.

    Why it matters
        Without the prefix the first token of a text has massive activations, and ranges must hold
        them.

    Example
        ```console
        qnpu-compile gpt2.onnx --prefix auto    # learned positions: its keys cannot be moved
        ```

    How to fix
        Nothing is wrong; the graph stays as it is. Leave inputs of down projections at 16 bits.
    """

    code: ClassVar[str] = "QN310"
    name: ClassVar[str] = "prefix-left-out"
    severity: ClassVar[Severity] = Severity.WARNING
    reason: str

    def message(self) -> str:
        return f"no prefix is put in front: {self.reason}"

    def help(self) -> str:
        return "nothing is wrong; the graph stays as it is"


@dataclass(frozen=True, slots=True)
class PrefixInserted(Rule):
    """What it checks
        Reports the tokens whose keys and values stand in front of every text as constants.

    Why it matters
        The graph's results are those of the text behind these tokens; a text need not, and should
        not, begin with them again.

    Example
        ```console
        qnpu-compile smollm2-135m --prefix auto
        ```

    How to fix
        Nothing is wrong; ``--prefix none`` leaves them out, ``--prefix ID,ID`` takes others.
    """

    code: ClassVar[str] = "QN311"
    name: ClassVar[str] = "prefix-inserted"
    severity: ClassVar[Severity] = Severity.NOTE
    ids: str
    before: int
    after: int

    def message(self) -> str:
        return (
            f"every text stands behind token {self.ids}: outliers in the inputs of down"
            f" projections go from {self.before} to {self.after}"
        )

    def help(self) -> str:
        return "nothing to do; --prefix none leaves it out"


@dataclass(frozen=True, slots=True)
class GraphsDiffer(Rule):
    """What it checks
        A prefill graph and a decode graph of one source hold the same tensors, planned alike, and
        a layer's cache has one encoding, in and out, in both.

    Why it matters
        Codes go from one graph to the other: they must stand for the same numbers.

    Example
        ```console
        qnpu-compile model.onnx --context 1024    # with a branch that only one token takes
        ```

    How to fix
        Export without control flow on lengths.
    """

    code: ClassVar[str] = "QN312"
    name: ClassVar[str] = "graphs-differ"
    value: str
    reason: str

    def message(self) -> str:
        return f"prefill and decode graph differ at `{self.value}`: {self.reason}"

    def help(self) -> str:
        return "export the model again, without control flow on lengths"


@dataclass(frozen=True, slots=True)
class InvalidTaskItem(Rule):
    """What it checks
        Each line of ``--task-data`` is a JSON object with the fields of its task, and its answers
        have tokens, no more than the graph takes.

    Why it matters
        A score over fewer items than the file has is not that of the task.

    Example
        ```console
        echo '{"goal": "Open a tin.", "sol1": "Pull the ring."}' > items.jsonl
        qnpu-eval model.onnx --task piqa --task-data items.jsonl
        ```

    How to fix
        Mend the line, or take it out; the message names the fields.
    """

    code: ClassVar[str] = "QN313"
    name: ClassVar[str] = "invalid-task-item"
    line: int
    reason: str
    fix: str

    def message(self) -> str:
        return f"line {self.line}: {self.reason}"

    def help(self) -> str:
        return self.fix


@dataclass(frozen=True, slots=True)
class UnwritableEncodings(Rule):
    """What it checks
        The version of an encodings file has words for every encoding of the graph.

    Why it matters
        A file that leaves weights out lets the vendor's tool choose their scales, silently. Version
        0.6.1 has no blocks with whole scales (LPBQ); 1.0.0 and 2.0.0 have.

    Example
        ```console
        qnpu-compile model.onnx --scheme w4a16 --weight-block 32 --emit encodings-0.6.1
        ```

    How to fix
        Ask for ``--emit encodings-1.0.0`` or ``encodings-2.0.0``.
    """

    code: ClassVar[str] = "QN314"
    name: ClassVar[str] = "unwritable-encodings"
    version: str

    def message(self) -> str:
        return f"version {self.version} of encodings files cannot hold weights in blocks"

    def help(self) -> str:
        return "write version 1.0.0 or 2.0.0 (--emit encodings-1.0.0)"


@dataclass(frozen=True, slots=True)
class NoIntegerForm(Rule):
    """What it checks
        Every operator that computes on quantized numbers can be done on their codes.

    Why it matters
        In the integer graph no tensor between inputs and outputs may be a float.

    Example
        ```console
        qnpu-compile detector.onnx --emit integer    # with a NonMaxSuppression on float boxes
        ```

    How to fix
        Take the operator out of the graph, or leave it to what runs behind the NPU; linears of two
        activations at 16 bits want one of them at 8.
    """

    code: ClassVar[str] = "QN401"
    name: ClassVar[str] = "no-integer-form"
    severity: ClassVar[Severity] = Severity.ERROR

    operator: str

    def message(self) -> str:
        return f"`{self.operator}` has no integer form for these operands"

    def help(self) -> str:
        return "take it out of the graph, or give its operands 8 bits or a single scale"


@dataclass(frozen=True, slots=True)
class IntegerDiffers(Rule):
    """What it checks
        Every node of the integer graph gives the codes that the Q/DQ graph says: sums, layout and
        changes of encoding exactly, other operators within 1 LSB at 8 bits and 4 LSB at 16.

    Why it matters
        The integer graph is the proof that a device needs no float. Where it differs, one of the
        two graphs is not what was measured.

    Example
        ```console
        qnpu-compile model.onnx --integer      # with a norm over codes that are nearly all zero
        ```

    How to fix
        Look at the node in parity.json; a tensor whose codes use little of their range wants
        another encoding (`--range-method`, more calibration data). Please report it otherwise.
    """

    code: ClassVar[str] = "QN402"
    name: ClassVar[str] = "integer-differs"
    severity: ClassVar[Severity] = Severity.WARNING

    off: int
    limit: int

    def message(self) -> str:
        return f"the integer graph is {self.off} LSB off here, more than {self.limit}"

    def help(self) -> str:
        return "see parity.json; give the tensor an encoding that fits its numbers better"


@dataclass(frozen=True, slots=True)
class CpuSaturates(Rule):
    """What it checks
        A graph for CPUs with VNNI is run on such a one.

    Why it matters
        On other x86 CPUs ONNX Runtime adds two products of uint8 and int8 in 16 bits, which
        saturate: the graph's results would be wrong, and nothing would say so.

    Example
        ```console
        qnpu-compile model.onnx --integer --cpu vnni      # on a CPU with AVX2 alone
        ```

    How to fix
        Compile with `--cpu any`: such a graph is right on every CPU. One made with `--cpu vnni`
        wants AVX512-VNNI, AVX-VNNI or AMX, or an Arm CPU, to be checked and run.
    """

    code: ClassVar[str] = "QN403"
    name: ClassVar[str] = "cpu-saturates"
    severity: ClassVar[Severity] = Severity.ERROR

    def message(self) -> str:
        return "this CPU adds products of uint8 and int8 in 16 bits, which saturate"

    def help(self) -> str:
        return "compile with --cpu any, or use a CPU with VNNI"


@dataclass(frozen=True, slots=True)
class TooFarFromFloat(Rule):
    """What it checks
        The quantized graph's perplexity is no more than ``--max-ratio`` times the float graph's.

    Why it matters
        A model that is not good enough should not reach a device because nobody read a table. The
        files are written all the same, so that the report can be looked at.

    Example
        ```console
        qnpu-compile model.onnx --scheme w4a8 --max-ratio 1.05
        ```

    How to fix
        Give it more bits (`--scheme`, `--budget ppl=1.05`), or learning (`--recipe default`). Where
        no perplexity was measured, give a graph with logits, a tokenizer and `--eval-windows`.
    """

    code: ClassVar[str] = "QN404"
    name: ClassVar[str] = "too-far-from-float"
    severity: ClassVar[Severity] = Severity.ERROR

    ratio: float | None
    limit: float

    def message(self) -> str:
        if self.ratio is None:
            return f"no perplexity was measured, which should be at most {self.limit:g} of float's"
        return f"perplexity is {self.ratio:.4f} times the float graph's, more than {self.limit:g}"

    def help(self) -> str:
        if self.ratio is None:
            return "a language model, a tokenizer and --eval-windows are needed"
        return "look at report.html; more bits (--scheme, --budget) or learning (--recipe default)"


@dataclass(frozen=True, slots=True)
class UnknownScheme(Rule):
    """What it checks
        The scheme is one of w8a16, w8a8, w4a16, w4a8 and w4a4.

    Why it matters
        Other widths have no encoding rule.

    Example
        ```console
        qnpu-compile model.onnx --scheme w3a8
        ```

    How to fix
        Use one of the listed schemes.
    """

    code: ClassVar[str] = "QN501"
    name: ClassVar[str] = "unknown-scheme"
    scheme: str
    known: str

    def message(self) -> str:
        return f"scheme `{self.scheme}` is not known"

    def help(self) -> str:
        return f"use one of {self.known}"


@dataclass(frozen=True, slots=True)
class UnknownTarget(Rule):
    """What it checks
        The target profile exists.

    Why it matters
        A target decides which types and operators are allowed.

    Example
        ```console
        qnpu-compile model.onnx --target nokia-3310
        ```

    How to fix
        Use one of the listed profiles.
    """

    code: ClassVar[str] = "QN502"
    name: ClassVar[str] = "unknown-target"
    target: str
    known: str

    def message(self) -> str:
        return f"target `{self.target}` is not known"

    def help(self) -> str:
        return f"use one of {self.known}"


@dataclass(frozen=True, slots=True)
class InvalidConfig(Rule):
    """What it checks
        A configuration or option has a known name and a value of the right kind.

    Why it matters
        A misspelt key that is silently ignored compiles something other than what was asked.

    Example
        ```console
        qnpu-compile model.onnx --freeze-dim batch
        ```

    How to fix
        See ``--help`` for names and forms.
    """

    code: ClassVar[str] = "QN503"
    name: ClassVar[str] = "invalid-config"
    key: str
    reason: str

    def message(self) -> str:
        return f"`{self.key}`: {self.reason}"

    def help(self) -> str:
        return "see --help for the names and forms of options"


@dataclass(frozen=True, slots=True)
class QuantizedInput(Rule):
    """What it checks
        Reports a model that ``qnpu-compile`` was given with Q/DQ pairs in it.

    Why it matters
        Its encodings are kept as they are: nothing is calibrated, rotated or given another width.
        Only what the target asks for is rewritten.

    Example
        ```console
        qnpu-compile model.qdq.onnx --target qnn-htp-v75
        ```

    How to fix
        Nothing is wrong; compile the float model to choose encodings anew.
    """

    code: ClassVar[str] = "QN504"
    name: ClassVar[str] = "quantized-input"
    severity: ClassVar[Severity] = Severity.NOTE
    done: str

    def message(self) -> str:
        return (
            f"the graph is quantized already, so {self.done} alone is done: no rotation, "
            "no bit widths, no calibration"
        )

    def help(self) -> str:
        return "compile the float model to have encodings chosen anew"


@dataclass(frozen=True, slots=True)
class NothingToPromote(Rule):
    """What it checks
        With ``--promote`` the graph has down projections: linears that take what an activation
        function made, and join the residual stream.

    Why it matters
        There is nothing to measure, and no input gets more bits than the scheme gives it.

    Example
        ```console
        qnpu-compile cnn.onnx --scheme w8a8 --down-bits 8 --promote 0.1 --calib images.npz
        ```

    How to fix
        Leave ``--promote`` out, or give all inputs more bits with ``--scheme w8a16``.
    """

    code: ClassVar[str] = "QN505"
    name: ClassVar[str] = "nothing-to-promote"
    severity: ClassVar[Severity] = Severity.WARNING
    share: float

    def message(self) -> str:
        return f"promote {self.share:g} has no effect: the graph has no down projections"

    def help(self) -> str:
        return "leave --promote out, or give all inputs more bits with --scheme w8a16"


@dataclass(frozen=True, slots=True)
class InputNotRotated(Rule):
    """What it checks
        Every linear's input that the scheme gives 4 bits is rotated, within the weights or online.

    Why it matters
        A few channels or tokens of an unrotated tensor are far larger than the others, which 4 bits
        then round to zero. Such inputs get 8 bits instead.

    Example
        ```console
        qnpu-compile model.onnx --scheme w4a4 --no-rotate
        ```

    How to fix
        Rotate: leave out ``--no-rotate``, and see what QN201 and QN202 say. Or take ``w4a8``.
    """

    code: ClassVar[str] = "QN506"
    name: ClassVar[str] = "input-not-rotated"
    severity: ClassVar[Severity] = Severity.NOTE
    count: int
    bits: int

    def message(self) -> str:
        return (
            f"{self.count} inputs of linears get 8 bits instead of {self.bits}: "
            "no rotation has spread their outliers"
        )

    def help(self) -> str:
        return "see QN201 and QN202 for what blocks a rotation, or take a scheme of 8-bit inputs"


@dataclass(frozen=True, slots=True)
class ActivationsTooNarrow(Rule):
    """What it checks
        The target has activation codes as narrow as the scheme's.

    Why it matters
        Its compiler would refuse the graph. Activations get the fewest bits that the target has.

    Example
        ```console
        qnpu-compile model.onnx --scheme w4a4 --target qnn-htp-v75
        ```

    How to fix
        Nothing has to be done; ``--scheme w4a8`` says the same without this note.
    """

    code: ClassVar[str] = "QN507"
    name: ClassVar[str] = "activations-too-narrow"
    severity: ClassVar[Severity] = Severity.NOTE
    target: str
    bits: int
    least: int

    def message(self) -> str:
        return (
            f"{self.target} has no {self.bits}-bit activations: inputs of linears get {self.least}"
        )

    def help(self) -> str:
        return "nothing has to be done; --scheme w4a8 says the same"


@dataclass(frozen=True, slots=True)
class NoCostModel(Rule):
    """What it checks
        The profile of a target that latency is modelled for has figures of that chip, for the
        widths that are asked for.

    Why it matters
        Time depends on the chip's memory and on how fast it multiplies each pair of widths. There
        is no figure that would do for all.

    Example
        ```console
        python -m bench.modelled_workloads --target xdna2
        ```

    How to fix
        Take a target whose profile has a ``[cost]`` table, such as ``qnn-htp-v75``, and widths that
        its ``speeds`` list.
    """

    code: ClassVar[str] = "QN508"
    name: ClassVar[str] = "no-cost-model"
    target: str
    missing: str

    def message(self) -> str:
        return f"nothing is known of how fast {self.target} is with {self.missing}"

    def help(self) -> str:
        return "take a target and widths that its profile has figures for, such as qnn-htp-v75"


@dataclass(frozen=True, slots=True)
class InfeasibleBudget(Rule):
    """What it checks
        Some choice of bits keeps every limit of a budget.

    Why it matters
        No search can find what is not there; the least that is possible says how far off it is.

    Example
        ```console
        qnpu-compile model.onnx --scheme auto --budget size=1MB --target qnn-htp-v75
        ```

    How to fix
        Raise the limit to the number in the message. Where there are several limits, it is the
        least that those before it leave.
    """

    code: ClassVar[str] = "QN509"
    name: ClassVar[str] = "infeasible-budget"
    unit: str
    limit: float
    nearest: float
    beside: str

    def message(self) -> str:
        given = f" beside {self.beside}" if self.beside else ""
        return (
            f"no choice of bits keeps `{self.unit}` within {self.limit:.9g}{given}: "
            f"the least possible is {self.nearest:g}"
        )

    def help(self) -> str:
        if self.unit == "loss":  # nats per token, the logarithm of what the user writes
            return f"raise --budget ppl=… to {ceil(exp(self.nearest) * 1e4) / 1e4:g} or more"
        return f"raise --budget {self.unit}=… to {self.nearest:g} or more"


@dataclass(frozen=True, slots=True)
class InvalidPlan(Rule):
    """What it checks
        A bit plan that is given is one that qnpu wrote, perhaps edited, for this graph.

    Why it matters
        A choice for a linear that is not there, or for bits that nothing has, would be left out
        without a word.

    Example
        ```console
        qnpu-compile model.onnx --plan report.json
        ```

    How to fix
        Take bit_plan.json of a compile of the same model with the same options, and change only the
        numbers under `linears` and `caches`.
    """

    code: ClassVar[str] = "QN540"
    name: ClassVar[str] = "invalid-plan"

    reason: str

    def message(self) -> str:
        return f"this bit plan cannot be used: {self.reason}"

    def help(self) -> str:
        return "take the bit_plan.json of a compile of this model, and edit numbers alone"


@dataclass(frozen=True, slots=True)
class NoDecoder(Rule):
    """What it checks
        A graph whose bits are searched for is a decoder, with attention made of single operators.

    Why it matters
        The latency model knows decoders alone: their linears, their caches, how often each is read.

    Example
        ```console
        qnpu-compile cnn.onnx --scheme auto --budget size=1MB --target qnn-htp-v75
        ```

    How to fix
        See what ``--explain-topology`` says of the graph. Or take one of the other schemes.
    """

    code: ClassVar[str] = "QN541"
    name: ClassVar[str] = "no-decoder"

    def message(self) -> str:
        return "bits can be searched for in decoders alone, and this graph is none that is known"

    def help(self) -> str:
        return "see --explain-topology, or take another scheme than auto"


@dataclass(frozen=True, slots=True)
class InvalidPass(Rule):
    """What it checks
        A pass that ``--pass`` names can be found and made, and stays within one stage.

    Why it matters
        Passes run in one ordered list; where a pass stands follows from the stage that it works on.

    Example
        ```console
        qnpu-compile model.onnx --pass "my_passes:Trim[share=0.1]"
        ```

    How to fix
        Give ``MODULE:CLASS`` of a subclass of ``qnpu.compiler.pass_base.Pass`` that can be imported
        (the working directory is looked into), or the name of an entry point of the group
        ``qnpu.passes``; options as in TOML. Its ``consumes`` and ``produces`` are to be the same.
    """

    code: ClassVar[str] = "QN542"
    name: ClassVar[str] = "invalid-pass"
    spec: str
    reason: str

    def message(self) -> str:
        return f"pass `{self.spec}` cannot be used: {self.reason}"

    def help(self) -> str:
        return "give MODULE:CLASS[key=value, …] of a subclass of qnpu.compiler.pass_base.Pass"


@dataclass(frozen=True, slots=True)
class NoWeightBlocks(Rule):
    """What it checks
        Where weights are to be in blocks, they have 4 bits, and the target multiplies such blocks.

    Why it matters
        Block scales are whole numbers of 4 bits over one float scale per output channel (LPBQ,
        low-power blockwise quantization). Few NPUs have that; on others the file would run in
        floating point or not at all.

    Example
        ```console
        qnpu-compile model.onnx --scheme w8a16 --weight-block 32
        ```

    How to fix
        Take a scheme of 4-bit weights and a target that has blocks, or leave out
        ``--weight-block``: one scale per output channel.
    """

    code: ClassVar[str] = "QN543"
    name: ClassVar[str] = "no-weight-blocks"
    size: int
    where: str
    fix: str

    def message(self) -> str:
        return f"{self.where} has no weights in blocks of {self.size}"

    def help(self) -> str:
        return f"{self.fix}, or leave out --weight-block"


@dataclass(frozen=True, slots=True)
class WeightsWithoutBlocks(Rule):
    """What it checks
        A 4-bit weight that is to be in blocks is the second operand of MatMuls, and the block
        divides its input features.

    Why it matters
        Such blocks do not exist otherwise. The weight gets one scale per output channel, and loses
        more by rounding.

    Example
        ```console
        qnpu-compile tiny --scheme w4a16 --weight-block 128
        ```

    How to fix
        Nothing has to be done. A smaller block may divide the features.
    """

    code: ClassVar[str] = "QN544"
    name: ClassVar[str] = "weights-without-blocks"
    severity: ClassVar[Severity] = Severity.NOTE
    count: int
    size: int

    def message(self) -> str:
        weights = "a 4-bit weight gets" if self.count == 1 else f"{self.count} 4-bit weights get"
        return (
            f"{weights} one scale per channel: blocks of {self.size} need a MatMul and a multiple "
            f"of {self.size} input features"
        )

    def help(self) -> str:
        return "nothing has to be done; a smaller --weight-block may fit"


@dataclass(frozen=True, slots=True)
class HandoffFailed(Rule):
    """What it checks
        The vendor's compiler makes the file that ``--emit`` asks for.

    Why it matters
        It is what runs on the device; a graph that it refuses runs nowhere.

    Example
        ```console
        qnpu-compile model.onnx --target qnn-htp-v75 --emit dlc    # and it refuses a node
        ```

    How to fix
        Compile without ``--emit``, then let ``qnpu-check --target`` say which node it is.
    """

    code: ClassVar[str] = "QN590"
    name: ClassVar[str] = "handoff-failed"
    file: str
    target: str
    reason: str

    def message(self) -> str:
        return f"the compiler of {self.target} did not make `{self.file}`: {self.reason}"

    def help(self) -> str:
        return f"compile without --emit, then run qnpu-check --target {self.target}"


@dataclass(frozen=True, slots=True)
class CannotWrite(Rule):
    """What it checks
        Output can be written in full.

    Why it matters
        Files appear under their names only when complete; nothing is left half written.

    Example
        ```console
        qnpu-compile model.onnx --out /read-only/folder
        ```

    How to fix
        Free space, or choose a folder that can be written to.
    """

    code: ClassVar[str] = "QN901"
    name: ClassVar[str] = "cannot-write"
    path: str
    reason: str

    def message(self) -> str:
        return f"cannot write `{self.path}`: {self.reason}"

    def help(self) -> str:
        return "free some space or choose another folder with --out"


@dataclass(frozen=True, slots=True)
class WouldOverwrite(Rule):
    """What it checks
        Output does not replace a file that an earlier qnpu run did not write.

    Why it matters
        Nothing the user had may be lost.

    Example
        ```console
        qnpu-compile out/model.qdq.onnx --out out
        ```

    How to fix
        Choose another folder with ``--out``, or move the file away.
    """

    code: ClassVar[str] = "QN902"
    name: ClassVar[str] = "would-overwrite"
    path: str

    def message(self) -> str:
        return f"`{self.path}` exists and was not written by an earlier compile into this folder"

    def help(self) -> str:
        return "choose another folder with --out, or move the file away"


@dataclass(frozen=True, slots=True)
class StageViolation(Rule):
    """What it checks
        After each pass the graph holds only what its stage allows.

    Why it matters
        It catches a faulty pass where it happens, not three passes later.

    Example
        ```console
        qnpu-compile model.onnx --pass acme:BrokenPass
        ```

    How to fix
        If the pass is not yours, report it with the model.
    """

    code: ClassVar[str] = "QN903"
    name: ClassVar[str] = "stage-violation"
    stage: str
    reason: str

    def message(self) -> str:
        return f"graph is not a valid {self.stage} graph: {self.reason}"

    def help(self) -> str:
        return "report this with the model, unless the pass is your own"


@dataclass(frozen=True, slots=True)
class InternalError(Rule):
    """What it checks
        Reports a failure that no other rule foresees.

    Why it matters
        It is a fault of qnpu, or of a library it calls.

    Example
        ```console
        qnpu-compile model.onnx    # and a library raises something unexpected
        ```

    How to fix
        Run again with ``--debug`` for the traceback and report it with the model.
    """

    code: ClassVar[str] = "QN999"
    name: ClassVar[str] = "internal-error"
    kind: str
    reason: str

    def message(self) -> str:
        return f"{self.kind}: {self.reason}"

    def help(self) -> str:
        return "run again with --debug and report the traceback with the model"


def all_rules() -> list[type[Rule]]:
    """Every rule class that has a code, sorted by it."""
    found = {
        item
        for item in (*globals().values(), *vars(target_rules).values())
        if inspect.isclass(item) and issubclass(item, Rule) and item.code
    }
    return sorted(found, key=lambda rule: rule.code)


def manual_page(code: str) -> str | None:
    """The docstring of a rule with its heading, or None where there is no such code."""
    for rule in all_rules():
        if rule.code == code.upper():
            body = inspect.cleandoc(rule.__doc__ or "")
            return f"{rule.code} {rule.name} ({rule.severity.value})\n\n{body}"
    return None
