"""Target profiles: what an NPU's compiler accepts, as data (compiler/targets/*.toml)."""

from __future__ import annotations

import enum
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.operand_pattern import pattern_of
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.rules import InvalidConfig, NoWeightBlocks, UnknownTarget
from qnpu.compiler.toml_file import read_toml

DEFAULT_TARGET = "onnxruntime"


class Verdict(enum.StrEnum):
    """What a vendor's compiler makes of a node, from best to worst.

    ``silent``: integers, but not the ones the file asks for. ``unknown``: no source says.
    """

    INT = "int"
    SILENT = "silent"
    UNKNOWN = "unknown"
    FLOAT = "float"
    REJECT = "reject"

    @property
    def badness(self) -> int:
        """0 for the best."""
        return list(Verdict).index(self)


class Fault(enum.StrEnum):
    """What is wrong with a node that is not run as written; one diagnostic code each."""

    OPERATOR = "operator"
    TYPES = "types"
    GRANULARITY = "granularity"
    OUTPUT_TYPE = "output-type"
    ATTRIBUTE = "attribute"
    RANK = "rank"
    ENCODINGS = "encodings"
    ISLAND = "island"
    CHANGED = "changed"


class Legalization(enum.StrEnum):
    """A rewrite that makes a node what the target takes; passes/legalize_target.py has them all.

    Some make codes of a type that the row names beside it (``OpRule.to``).
    """

    REQUANTIZE_BEFORE = "requantize-before"
    KEEP_APART = "keep-apart"
    SECOND_OPERAND = "second-operand"
    FORCED_ENCODING = "forced-encoding"
    ONE_TYPE = "one-type"
    UNSIGNED = "unsigned"
    DERIVE_BIAS = "derive-bias"
    SYMMETRIC_WEIGHT = "symmetric-weight"
    FINER_WEIGHT = "finer-weight"
    LPBQ = "lpbq"
    CONV_1X1 = "conv-1x1"
    DECOMPOSE_ROTARY = "decompose-rotary"
    POW_TO_MUL = "pow-to-mul"
    REDUCE_RANK = "reduce-rank"


class _Table(BaseModel):
    """A table of a profile; a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Vendor(_Table):
    """Who makes the compiler, and which one was asked.

    Attributes:
        name: of the vendor.
        sdk: the compiler and version that the rules were tested on; empty where none was.
        arch: number of the architecture, for rules that begin with one; 0 where there is one only.
        soc_model: the compiler's own number of a chip.
        oracle: ``htp`` where the real compiler can be asked (``qnpu-check --oracle``).
    """

    name: str = ""
    sdk: str = ""
    arch: int = 0
    soc_model: int = 0
    oracle: Literal["", "htp"] = ""


class Limits(_Table):
    """What holds for a graph as a whole. None and empty stand for: not known.

    Attributes:
        opset_max: of the standard domain.
        forms: how a quantized graph may be written: ``qdq``, ``qlinear``, ``integer``.
        file_bytes_max: of the model, weights included.
        accumulator_bits: width of a sum of products; 0 where it is not known.
        source: where these are from.
    """

    opset_max: int | None = None
    forms: tuple[Literal["qdq", "qlinear", "integer"], ...] = ()
    file_bytes_max: int | None = None
    accumulator_bits: int = 0
    source: str = ""


class Bias(_Table):
    """Biases of linears.

    Attributes:
        derived: the scale must be that of the input times that of the weight, zero point 0.
        source: where this is from.
    """

    derived: bool = False
    source: str = ""


class Forced(_Table):
    """An output encoding that the compiler uses whatever the file says.

    Attributes:
        scale: real units per LSB.
        zero_point: LSB.
    """

    scale: float
    zero_point: int


class OpRule(_Table):
    """One row of a profile. Of the rows for an operator, the first that fits a node decides.

    A row fits where every condition it states holds.

    Attributes:
        ops: operators, as ``Operation.op_type``; ``*`` stands for any.
        inputs: patterns of the inputs in order (see ``OperandPattern``), several alternatives;
            inputs past the last pattern are free.
        output: pattern that each output fits; ``=`` stands for the type of the first input.
        output_is_not: pattern that some output does not fit.
        encodings: ``same`` or ``differ``: first input against every output; ``scale-differs``
            where it is not the zero point alone.
        types: ``same`` or ``differ``: the types of all inputs and outputs.
        all_encodings: as ``encodings``, over all quantized inputs and outputs.
        batch: ``outer-differs``: the first two inputs differ in their outermost dimension.
        shapes: ``same``: the first two inputs have one shape.
        broadcast: an input that has fewer elements than the result, and more than one.
        merged: ``scale-differs``: ONNX Runtime makes one pair of the first input's and the
            output's, with a scale that a neighbour which only moves codes has not.
        step_above: 256 steps of a linear's products, s_x · s_w of the median channel, are more
            than this many LSB of its result.
        rank_above: some input or output has a higher rank.
        rank_below: every input and output has a lower rank.
        attributes: name → values that fit; ``last`` stands for the last axis, ``not-last`` for any
            other, ``absent`` for an attribute that is not given, ``not-one`` for any value but 1,
            ``channels`` for a permutation that takes the channels to the end or back.
        unless_forced: the output encoding differs from these numbers.
        island: the row speaks of nodes with a float input or output; others never fit these.
        min_arch, max_arch: architectures the row speaks of.
        verdict: what becomes of the node.
        fault: what is wrong, where the verdict is not ``int``.
        does: what the vendor's compiler does with it, half a sentence.
        fix: what to do, half a sentence.
        source: where this is known from.
        legalize: rewrite after which the node fits a better row; None where there is none.
        to: type of the codes it makes, where it has a choice: of a ``second-operand``, or of the
            block scales of ``lpbq``, which are 1 up to its highest code.
    """

    ops: tuple[str, ...] = Field(min_length=1)
    inputs: tuple[tuple[str, ...], ...] = ()
    output: str = ""
    output_is_not: str = ""
    encodings: Literal["", "same", "differ", "scale-differs"] = ""
    types: Literal["", "same", "differ"] = ""
    all_encodings: Literal["", "same", "differ"] = ""
    batch: Literal["", "outer-differs"] = ""
    shapes: Literal["", "same"] = ""
    broadcast: int | None = None
    merged: Literal["", "scale-differs"] = ""
    step_above: float | None = None
    rank_above: int | None = None
    rank_below: int | None = None
    attributes: dict[str, tuple[int | float | str, ...]] = {}
    unless_forced: Forced | None = None
    island: bool = False
    min_arch: int = 0
    max_arch: int = 10_000
    verdict: Verdict
    fault: Fault = Fault.TYPES
    does: str = ""
    fix: str = ""
    source: str = ""
    legalize: Legalization | None = None
    to: Literal["", "u4", "u8", "s8", "u16", "s16"] = ""

    @field_validator("inputs")
    @classmethod
    def _patterns(cls, value: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        for text in (text for combination in value for text in combination):
            pattern_of(text)
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        chooses = self.legalize in (Legalization.SECOND_OPERAND, Legalization.LPBQ)
        if bool(self.to) != chooses:
            raise ValueError("`to` goes with `legalize` = second-operand or lpbq, and only these")
        if self.legalize is Legalization.FORCED_ENCODING and self.unless_forced is None:
            raise ValueError("`legalize` = forced-encoding needs `unless_forced`")
        if self.legalize is Legalization.REDUCE_RANK and self.rank_above is None:
            raise ValueError("`legalize` = reduce-rank needs `rank_above`")
        return self


class Figure(_Table):
    """A number of the latency model, and where it is from.

    Attributes:
        value: SI units: bytes per second, bytes.
        source: where it is from.
    """

    value: float = Field(gt=0)
    source: str = Field(min_length=1)


class Speed(_Table):
    """How fast a matrix product of two widths is computed.

    Attributes:
        input: bits of the first operand's codes.
        weight: bits of the second operand's: of a weight, of keys or of values.
        block_scale_bits: of the scale of each block of a weight; 0: one scale per channel alone.
        speed: operations per second, relative to those of float16.
        source: where this is from.
    """

    input: int
    weight: int
    block_scale_bits: int = Field(default=0, ge=0)
    speed: float = Field(gt=0)
    source: str = Field(min_length=1)


class Throughput(Figure):
    """Operations per second that runs of one pair of widths reach; a multiply-add is two.

    Attributes:
        input, weight: the widths, with one scale per channel.
    """

    input: int
    weight: int


class CostTable(_Table):
    """What the latency model (``qnpu.compiler.cost_model``) needs to know of a chip.

    Attributes:
        bandwidth: of reading weights and caches while decoding.
        throughput: of matrix products while a prompt is read.
        on_chip: memory within the NPU; a tensor that fits there is not written to DRAM.
        speeds: pairs of widths that the NPU has. Others are run as the next wider pair.
    """

    bandwidth: Figure
    throughput: Throughput
    on_chip: Figure
    speeds: tuple[Speed, ...]

    @model_validator(mode="after")
    def _has_a_base(self) -> Self:
        if not self.base:
            raise ValueError("`speeds` has no row for the widths of `throughput`")
        return self

    @property
    def base(self) -> float:
        """Relative speed of the widths that ``throughput`` is of; 0 where no row has it."""
        wanted = self.throughput.input, self.throughput.weight, 0
        found = (r for r in self.speeds if (r.input, r.weight, r.block_scale_bits) == wanted)
        return next((row.speed for row in found), 0.0)


class TargetProfile(_Table):
    """What one target accepts.

    Attributes:
        id: name on the command line.
        inherits: profile whose tables and rules hold where this one says nothing else.
        summary: one line for ``--help``.
        signed_activations: activation codes are signed.
        symmetric_activations: activations have their zero at the middle code.
        symmetric_keys_values: keys and values have, whatever the other activations do.
        weight_blocks: features that may share a whole block scale of a 4-bit weight (LPBQ).
        activation_bits_min: of activation codes; a scheme of fewer bits is widened (QN507).
        source: where the types are known from.
        vendor, graph, bias: see their classes.
        cost: for the latency model; None where nothing is known.
        mask_value: constant for masked scores where the user names none, real.
        unlisted: verdict on an operator that no row speaks of.
        unmatched: verdict on a node whose operator has rows, none of which fits.
        no_float: operators that the target does not have in floating point: what a row calls
            ``float`` is refused there.
        islands: verdict on a node with a float input or output, where no row says otherwise.
        rules: rows, own ones before inherited ones.
        tolerance_lsb: operator and type (``Softmax/u16``) → largest difference to ONNX Runtime that
            was measured on the vendor's own emulator, LSB.
        handoff: shell commands that take the files on to the device; ``{model}``, ``{encodings}``,
            ``{arch}``, ``{soc_model}`` are filled in.
    """

    id: str = DEFAULT_TARGET
    inherits: str = ""
    summary: str = ""
    signed_activations: bool = False
    symmetric_activations: bool = False
    symmetric_keys_values: bool = False
    activation_bits_min: Literal[4, 8] = 4
    weight_blocks: tuple[Literal[16, 32, 64, 128], ...] = ()
    source: str = ""
    vendor: Vendor = Vendor()
    graph: Limits = Limits()
    bias: Bias = Bias()
    cost: CostTable | None = None
    mask_value: float = -50.0
    unlisted: Verdict = Verdict.UNKNOWN
    unmatched: Verdict = Verdict.REJECT
    islands: Verdict = Verdict.FLOAT
    no_float: tuple[str, ...] = ()
    rules: tuple[OpRule, ...] = ()
    tolerance_lsb: dict[str, Annotated[int, Field(ge=0)]] = {}
    handoff: tuple[str, ...] = ()

    @field_validator("id")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value:
            raise ValueError("a profile needs a name")
        return value

    def activation_spec(self, bits: int) -> QuantSpec:
        """The per-tensor activation type of a width."""
        return QuantSpec(bits, self.signed_activations, self.symmetric_activations)

    def key_value_spec(self, bits: int) -> QuantSpec:
        """The type of keys and values, that is of a second operand of two activations' product."""
        symmetric = self.symmetric_activations or self.symmetric_keys_values
        return QuantSpec(bits, self.signed_activations, symmetric)

    def rules_for(self, op_type: str) -> list[OpRule]:
        """Rows that speak of an operator on this architecture, in order."""
        rows = self.rules_for_arch()
        return [rule for rule in rows if op_type in rule.ops or "*" in rule.ops]

    def rules_for_arch(self) -> list[OpRule]:
        """Rows that speak of this architecture, in order."""
        arch = self.vendor.arch
        return [rule for rule in self.rules if rule.min_arch <= arch <= rule.max_arch]


def check_blocks(size: int, target: TargetProfile) -> None:
    """Whether a target has 4-bit weights in blocks of a size.

    Raises:
        DiagnosticError: QN543 it has not.
    """
    if size not in target.weight_blocks:
        sizes = ", ".join(map(str, target.weight_blocks))
        fix = f"take blocks of {sizes}" if sizes else "take a target that has, such as qnn-htp-v75"
        raise DiagnosticError(NoWeightBlocks(size, target.id, fix).at())


def target_names() -> list[str]:
    """Names of all shipped profiles that a model can be compiled for, sorted."""
    return [name for name in _file_names(_folder()) if not name.startswith("_")]


@lru_cache(maxsize=32)
def load_target(name: str) -> TargetProfile:
    """Reads a shipped profile, inherited tables merged in.

    Raises:
        DiagnosticError: QN502 unknown name, QN503 a key or value that the schema does not know.
    """
    if name not in target_names():
        raise DiagnosticError(UnknownTarget(name, ", ".join(target_names())).at())
    return read_profile(_folder(), name)


def read_profile(folder: Traversable, name: str) -> TargetProfile:
    """Reads ``<name>.toml`` of a folder, with what it inherits from others there merged in.

    Raises:
        DiagnosticError: QN503 not TOML, or a key or value that the schema does not know.
    """
    try:
        return TargetProfile.model_validate(_merged(folder, name))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _fault(name, place, first["msg"]) from error


def _folder() -> Traversable:
    return resources.files("qnpu.compiler").joinpath("targets")


def _file_names(folder: Traversable) -> list[str]:
    names = (file.name for file in folder.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _merged(folder: Traversable, name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """A profile's tables over those it inherits; its rules come first, so they win."""
    table = read_toml(folder.joinpath(f"{name}.toml"))
    parent = table.get("inherits", "")
    if not parent:
        return table
    if parent not in _file_names(folder):
        raise _fault(name, "inherits", f"there is no profile `{parent}`")
    if parent in (name, *heirs):
        raise _fault(name, "inherits", f"`{parent}` inherits from this profile")
    below = _merged(folder, parent, (name, *heirs))
    merged = below | table
    for key, value in below.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            merged[key] = value | table[key]
    rules = [table.get("rules", []), below.get("rules", [])]
    if all(isinstance(part, list) for part in rules):  # else the schema will refuse it
        merged["rules"] = [rule for part in rules for rule in part]
    return merged


def _fault(name: str, place: str, reason: str) -> DiagnosticError:
    return DiagnosticError(InvalidConfig(place, reason).at(file=f"{name}.toml"))
