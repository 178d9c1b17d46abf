"""The one way through: config → passes in one list → checks → files."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.bit_search import BitSearch, search_writers
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_checks import control_flow
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.handout import Handout
from qnpu.compiler.inputs import named_data
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.integer_model import (
    INTEGER_NAME,
    certify,
    lower_model,
    parity_summary,
    parity_writers,
)
from qnpu.compiler.layer_rows import bit_rows, layers_of_values
from qnpu.compiler.modelled_cost import ModelledCost, modelled_cost
from qnpu.compiler.output import Writer, save_model, write_json, write_outputs
from qnpu.compiler.pass_base import (
    Compilation,
    LearningPoint,
    Legalized,
    Pass,
    ProgressCallback,
    Stage,
    no_progress,
    run_passes,
)
from qnpu.compiler.prefix import parse_prefix, prefix_of
from qnpu.compiler.rotated_caches import rotated_caches, turn_caches
from qnpu.compiler.rules import TooFarFromFloat
from qnpu.compiler.target import load_target
from qnpu.compiler.target_check import verdict_counts
from qnpu.compiler.topology import DecoderTopology, discover
from qnpu.compiler.user_passes import load_passes
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.canonicalize import Canonicalize
from qnpu.passes.canonicalize_mask import CanonicalizeMask
from qnpu.passes.decompose_attention import DecomposeAttention
from qnpu.passes.decompose_contrib import DecomposeContrib
from qnpu.passes.decompose_rotary import DecomposeRotary
from qnpu.passes.fold_affine import FoldAffine
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.freeze_shapes import FreezeShapes
from qnpu.passes.fuse_normalization import FuseNormalization
from qnpu.passes.fuse_rotation import FuseRotation
from qnpu.passes.insert_hadamard import InsertHadamard
from qnpu.passes.insert_prefix import InsertPrefix
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.learn_scales import LearnScales
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.lower_io import LowerIo
from qnpu.passes.recalibrate_ranges import RecalibrateRanges
from qnpu.passes.round_weights import RoundWeights
from qnpu.passes.search_bit_widths import SearchBitWidths
from qnpu.passes.snap_scales import SnapScales
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.compare import TensorComparison, compare_graphs
from qnpu.runtime_check.feeds import FeedSource, FirstRuns, LastRuns
from qnpu.runtime_check.histograms import TensorHistogram, linear_inputs, tensor_histograms
from qnpu.runtime_check.learning_record import LearningRecord
from qnpu.runtime_check.loss_record import LossRecord
from qnpu.runtime_check.observer import RangeMethod
from qnpu.runtime_check.perplexity import Perplexity, stream_perplexity
from qnpu.runtime_check.segments import SegmentRunner
from qnpu.runtime_check.session import Array, Feeds, Mode, cpu_flags, open_session, run

if TYPE_CHECKING:
    from qnpu.runtime_check.parity import ParityCertificate

MODEL_NAME = "model.qdq.onnx"
ENCODINGS_NAME = "encodings.json"
BIT_PLAN_NAME = "bit_plan.json"
LOGITS = "logits"
_PREFIX_WINDOWS = 4
_PACKAGES = ("qnpu", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch")


def canonical_passes(config: CompileConfig) -> list[Pass]:
    """Every pass that brings a float graph into the one form that later passes know."""
    return [
        FreezeShapes(config.freeze_dims, config.seq_len, keep_inputs=config.keep_inputs),
        DecomposeContrib(),
        Canonicalize(),
        DecomposeAttention(),
        FoldAffine(),
        FuseNormalization(),
        DecomposeRotary(),
        CanonicalizeMask(config.mask_constant),
    ]


def default_passes(
    config: CompileConfig,
    calibration: FeedSource,
    progress: ProgressCallback = no_progress,
    record: LearningRecord | None = None,
    losses: LossRecord | None = None,
) -> list[Pass]:
    """Every pass of a compile, in the order they run."""
    rotations: list[Pass] = [
        FoldNormScale(),
        FuseRotation(seed=config.seed, rotate_caches=config.rotate_caches),
    ]
    measured = FirstRuns(calibration, config.calib_windows)
    online: list[Pass] = [InsertHadamard(config.online, config.seed)]
    prefix: list[Pass] = [
        InsertPrefix(
            FirstRuns(calibration, _PREFIX_WINDOWS), parse_prefix(config.prefix), progress=progress
        )
    ]
    to_choose_on = FirstRuns(calibration, config.learn_windows)
    search: list[Pass] = [
        SearchBitWidths(
            config.budget,
            measured,
            to_choose_on,
            LastRuns(calibration, config.search_windows),
            config.workload,
            config.sensitivity,
            RangeMethod(config.range_method),
            losses or LossRecord(),
            block=config.weight_block,
            progress=progress,
        )
    ]
    rounding: list[Pass] = [
        RoundWeights(
            to_choose_on,
            nearest=config.weights == "seqmse",
            bits=config.chosen_bits,
            progress=progress,
        )
    ]
    learning: list[Pass] = [
        LearnScales(
            to_choose_on,
            config.learn,
            config.learn_weights,
            config.learn_tensors,
            config.learn_steps,
            config.learn_batch,
            config.distill,
            config.local_loss,
            config.seed,
            RangeMethod(config.range_method),
            config.learn_dtype,
            config.learn_device,
            config.learn_sharded,
            record=record,
            progress=progress,
        )
    ]
    turns = config.learn_weights == "rotations"  # of which codes are the nearest, so before others
    method = RangeMethod(config.range_method)
    again: list[Pass] = [RecalibrateRanges(measured, method, progress=progress)]
    snapping: list[Pass] = [SnapScales()] if config.snaps_scales else []
    encodings: list[Pass] = [
        CalibrateRanges(measured, method, progress=progress),
        *snapping,
        *(learning if config.learn != "none" and turns else []),
        *(rounding if config.chosen_bits else []),
        *(learning if config.learn != "none" and not turns else []),
        *(again if config.learn != "none" else []),
    ]
    own = load_passes(config.passes)
    return [
        *canonical_passes(config),
        *(rotations if config.rotate else []),
        *(online if config.online else []),
        *(prefix if config.prefix != "none" else []),
        *own[Stage.FLOAT],
        *(search if config.budget else []),
        AssignBitWidths(
            config.bits_by_role, config.promote, measured, progress, config.bit_choices
        ),
        *own[Stage.PLANNED],
        *encodings,
        *own[Stage.ENCODED],
        UnifyEncodings(),
        InsertQdq(),
        LegalizeTarget(),
        *own[Stage.QDQ],
        *([LowerIo()] if config.integer_io else []),
    ]


def find_topology(model: ir.Model, config: CompileConfig) -> DecoderTopology | None:
    """The decoder in a graph, which is brought into canonical form in place; None for others."""
    run_passes(canonical_passes(config), Compilation(model), after_pass=lambda done: None)
    return discover(model.graph)


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What a compile made.

    Attributes:
        model: the QDQ graph.
        float_model: the graph just before Q/DQ pairs went in, which nothing was rewritten in for
            the target yet; shares its weights.
        source_model: the graph as loaded, with its shapes frozen; shares its weights.
        canonical_model: the graph in the one form that later passes know, not rotated yet; shares
            its weights.
        bit_plan: what each tensor was to be encoded as.
        encodings: scale and zero point of each of its tensors.
        diagnostics: notes and warnings.
        rewrites: pass name → how many places it changed.
        seconds: pass name → wall time.
        legalized: what legalize-target did to which node.
        learning: losses that learning came to.
        bit_search: how bits were chosen; None where no search was made.
        cost: what a workload takes on the target; None where that is not known.
        verdicts: how many nodes of the QDQ graph the target takes how; empty where it has no rules.
        unprefixed_model: the graph just before a prefix went in, None where none did; shares its
            weights.
        integer_model: the QDQ graph on integers alone, None where it was not asked for; shares its
            weights.
    """

    model: ir.Model
    float_model: ir.Model
    source_model: ir.Model
    canonical_model: ir.Model
    bit_plan: BitPlan
    encodings: EncodingTable
    diagnostics: list[Diagnostic]
    rewrites: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    legalized: list[Legalized] = field(default_factory=list)
    learning: list[LearningPoint] = field(default_factory=list)
    bit_search: BitSearch | None = None
    cost: ModelledCost | None = None
    verdicts: Mapping[str, int] = field(default_factory=dict)
    unprefixed_model: ir.Model | None = None
    integer_model: ir.Model | None = None


def compile_model(
    model: ir.Model,
    config: CompileConfig,
    calibration: FeedSource | None = None,
    progress: ProgressCallback = no_progress,
    record: LearningRecord | None = None,
    losses: LossRecord | None = None,
) -> CompileResult:
    """Float ONNX in, static QDQ out. ``model`` is changed in place.

    Args:
        model: as loaded.
        config: what to do.
        calibration: data to measure, round and learn on; None: what ``config.calib`` and
            ``config.tokenizer`` name.
        progress: called with a step's name and the fraction of it that is done.
        record: keeps what was learned so far, for a run that is killed.
        losses: keeps what a search for bits measured.

    Raises:
        DiagnosticError: the graph, the data or the configuration does not allow it.
    """
    calibration = calibration or named_data(config)
    compilation = Compilation(model, load_target(config.target))
    snapshots: dict[str, ir.Model] = {}
    passes = default_passes(config, calibration, progress, record, losses)
    before_prefix = next(
        (a.name for a, b in itertools.pairwise(passes) if b.name == InsertPrefix.name), ""
    )

    def after_pass(done: Pass) -> None:
        verify_stage(compilation)
        kept = (FreezeShapes.name, CanonicalizeMask.name, UnifyEncodings.name, before_prefix)
        if done.name in kept:
            snapshots[done.name] = model.clone()

    rewrites = run_passes(passes, compilation, after_pass=after_pass)
    return replace(
        result_of(compilation, config, rewrites, snapshots, FreezeShapes.name),
        unprefixed_model=snapshots[before_prefix] if prefix_of(model) is not None else None,
        integer_model=lower_model(model, Cpu(config.cpu)) if config.integer else None,
    )


def result_of(
    compilation: Compilation,
    config: CompileConfig,
    rewrites: dict[str, int],
    snapshots: Mapping[str, ir.Model],
    source: str,
) -> CompileResult:
    """What passes made.

    Args:
        compilation: at its end.
        config: what was to be done.
        rewrites: from ``run_passes``.
        snapshots: pass name → the graph just after it.
        source: the pass whose graph counts as the one that was loaded.
    """
    float_model, choices = snapshots[UnifyEncodings.name], compilation.bit_plan.choices
    return CompileResult(
        model=compilation.model,
        float_model=float_model,
        source_model=snapshots[source],
        canonical_model=snapshots[CanonicalizeMask.name],
        bit_plan=compilation.bit_plan,
        encodings=compilation.encodings,
        diagnostics=compilation.diagnostics,
        rewrites=rewrites,
        seconds=compilation.seconds,
        legalized=compilation.legalized,
        learning=compilation.learning,
        bit_search=compilation.bit_search,
        cost=modelled_cost(float_model, choices, compilation.target, config.workload),
        verdicts=verdict_counts(compilation.model, compilation.target),
    )


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was measured on a compiled graph.

    Attributes:
        tensors: float against dequantized, one calibration batch, in graph order.
        source_error: max |Δ| of any output between the graph as loaded and the float graph the
            encodings were made for, relative to max |output|; rotated caches are turned back first,
            and a prefix is left out.
        perplexity: ``float``, ``qdq`` and, where there is such a graph, ``integer``; empty for a
            graph that is no language model.
        parity: the integer graph against the QDQ graph, node by node, on the calibration batch;
            None where there is no such graph.
        histograms: of some inputs of linears, before and after rotation, same batch.
    """

    tensors: list[TensorComparison]
    source_error: float
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    parity: ParityCertificate | None = None
    histograms: list[TensorHistogram] = field(default_factory=list)


def check_result(
    result: CompileResult,
    batch: Feeds,
    evaluation: Sequence[Feeds],
    progress: ProgressCallback = no_progress,
    max_ratio: float | None = None,
) -> CheckResult:
    """Runs source, float, QDQ and integer graph on ONNX Runtime, node by node as written.

    Where the integer graph breaks a limit, QN402 joins the result's diagnostics; where perplexity
    does, QN404.

    Args:
        result: from ``compile_model``.
        batch: one calibration batch, as the graph as loaded takes it.
        evaluation: windows to measure perplexity on; may be empty.
        progress: called with fraction done.
        max_ratio: what a quantized graph's perplexity may be of the float one's; None: anything.
    """
    rotated = turn_caches(result.float_model, batch)
    qdq_model = with_real_io(result.model)
    tensors = compare_graphs(result.float_model, qdq_model, rotated, progress=progress)
    source_error = _source_error(result, batch)
    perplexity: dict[str, Perplexity] = {}
    if evaluation and any(value.name == LOGITS for value in result.model.graph.outputs):
        models = {"float": result.float_model, "qdq": qdq_model}
        if result.integer_model is not None:
            models["integer"] = with_real_io(result.integer_model)
        for label, model in models.items():
            perplexity[label] = stream_perplexity(
                model, evaluation, logits_name=LOGITS, progress=progress, label=f"evaluate {label}"
            )
    if max_ratio is not None:
        result.diagnostics.extend(_ratio_faults(perplexity, max_ratio))
    parity: ParityCertificate | None = None
    if result.integer_model is not None:
        parity = certify(qdq_model, result.integer_model, rotated, result.diagnostics, progress)
    histograms = tensor_histograms(
        result.canonical_model,
        result.float_model,
        [batch],
        [rotated],
        result.encodings,
        linear_inputs(result.canonical_model, result.float_model),
    )
    return CheckResult(tensors, source_error, perplexity, parity, histograms)


def _ratio_faults(perplexity: Mapping[str, Perplexity], limit: float) -> list[Diagnostic]:
    """QN404 if the worse of the quantized graphs is beyond the limit, or nothing is known."""
    if not perplexity:
        return [TooFarFromFloat(None, limit).at()]
    base = perplexity["float"].value
    ratios = [found.value / base for label, found in perplexity.items() if label != "float"]
    far = [ratio for ratio in ratios if not ratio <= limit]  # NaN is far, too
    return [TooFarFromFloat(max(far), limit).at()] if far else []


def _source_error(result: CompileResult, batch: Feeds) -> float:
    """Largest relative difference of an output; a source with control flow must run whole.

    Behind a prefix outputs differ: insert-prefix has compared those itself.
    """
    names = {name_of(value) for value in result.source_model.graph.outputs}
    if control_flow(result.source_model.graph):
        session = open_session(result.source_model, Mode.REFERENCE)
        expected = dict(zip(sorted(names), run(session, sorted(names), batch), strict=True))
        del session
    else:  # cut to pieces, for which a file's own types do not always suffice
        common.ShapeInferencePass(strict_mode=False, check_type=False)(result.source_model)
        expected = dict(_streamed(result.source_model, batch, names))
    worst = 0.0
    final = result.unprefixed_model or result.float_model
    rotated = turn_caches(final, batch)
    caches = rotated_caches(final)
    for name, found in _streamed(final, rotated, names):
        reference = expected[name]
        actual = caches[name].apply(found, back=True) if name in caches else found
        peak = float(np.abs(reference).max()) if reference.size else 0.0
        error = float(np.abs(reference - actual).max()) if reference.size else 0.0
        worst = max(worst, error / peak if peak else error)
    return worst


def _streamed(model: ir.Model, batch: Feeds, names: set[str]) -> Iterator[tuple[str, Array]]:
    for step in SegmentRunner(model, [batch]).stream(names):
        yield from step.values.items()


def write_result(
    folder: Path,
    result: CompileResult,
    handout: Handout,
    checks: CheckResult,
    about: dict[str, object],
    more: Mapping[str, Writer] = MappingProxyType({}),
) -> dict[str, object]:
    """Writes the graphs, encodings.json, bit_plan.json, more and report.json, all or none.

    Args:
        folder: where to.
        result: from ``compile_model``.
        handout: of its model.
        checks: from ``check_result``.
        about: command, input and configuration, for the report.
        more: file name → what writes it, once the files before it are there.

    Returns:
        The report. It holds nothing that differs between two equal runs, so no times.

    Raises:
        DiagnosticError: QN901, QN902.
    """
    plan: dict[str, Writer] = {
        BIT_PLAN_NAME: lambda path: write_json(result.bit_plan.to_json(), path)
    }
    about = about | findings(result, checks)
    plan |= search_writers(result.bit_search) | parity_writers(checks.parity)
    return write_files(folder, result, handout, about, plan | dict(more))


def findings(result: CompileResult, checks: CheckResult) -> dict[str, object]:
    """What a report says of a compile and of what was measured on it."""
    prefix = prefix_of(result.float_model)
    layers = layers_of_values(result.float_model)
    bits = bit_rows(result.float_model, result.bit_plan.choices)
    return {
        "perplexity": {name: asdict(value) for name, value in checks.perplexity.items()},
        "source_error": checks.source_error,
        "prefix": prefix.to_json() if prefix is not None else None,
        "sensitivities": result.bit_plan.sensitivities,
        "cost": result.cost.to_json() if result.cost is not None else None,
        "search": result.bit_search.to_json() if result.bit_search is not None else None,
        "learning": [asdict(point) for point in result.learning],
        "promoted": list(result.bit_plan.promoted),
        "tensors": [asdict(t) | {"layer": layers.get(t.name)} for t in checks.tensors],
        "bits": [asdict(row) for row in bits],
        "histograms": [item.to_json() for item in checks.histograms],
        "parity": parity_summary(checks.parity),
        "verdicts": {"after": result.verdicts} if result.verdicts else {},
    }


def write_page(report: Mapping[str, object], path: Path) -> None:
    """Writes report.html; see ``qnpu.compiler.report_page``."""
    from qnpu.compiler import report_page  # noqa: PLC0415  (imports a template engine)

    report_page.write_page(report, path)


class Rewritten(Protocol):
    """What every result has: a graph, and what was done to it."""

    @property
    def model(self) -> ir.Model: ...
    @property
    def diagnostics(self) -> list[Diagnostic]: ...
    @property
    def rewrites(self) -> dict[str, int]: ...
    @property
    def legalized(self) -> list[Legalized]: ...
    @property
    def integer_model(self) -> ir.Model | None: ...


def write_files(
    folder: Path,
    result: Rewritten,
    handout: Handout,
    about: dict[str, object],
    more: Mapping[str, Writer],
) -> dict[str, object]:
    """Writes model.qdq.onnx, model.int.onnx where there is one, encodings.json, more, report.json.

    See ``write_result``.
    """
    integer_model = result.integer_model
    integer: dict[str, Writer] = {}
    if integer_model is not None:
        integer[INTEGER_NAME] = lambda path: save_model(integer_model, path)
    writers: dict[str, Writer] = {
        MODEL_NAME: lambda path: save_model(result.model, path),
        **integer,
        ENCODINGS_NAME: lambda path: write_json(handout.encodings.to_json(), path),
        **more,
    }
    report = make_report(result, about)
    write_outputs(folder, writers, report, write_page)
    return report


def make_report(result: Rewritten, about: dict[str, object]) -> dict[str, object]:
    """A report, but for the files: they are added as they are written."""
    return {
        "format": "qnpu-report",
        "version": 1,
        **about,
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu_flags": cpu_flags(),
        "rewrites": result.rewrites,
        "legalized": [asdict(item) for item in result.legalized],
        "diagnostics": [diagnostic.to_json() for diagnostic in result.diagnostics],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
