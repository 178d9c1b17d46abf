"""One source, two graphs that share weights and caches: S tokens at a time, and one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import onnx_ir as ir

from qnpu.compiler.bit_search import search_writers
from qnpu.compiler.caches import (
    CACHED_INPUTS,
    ENTRIES_AXIS,
    is_past,
    present_name,
    take_hub_names,
)
from qnpu.compiler.config import AI_HUB, CompileConfig
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.integer_io import io_encodings
from qnpu.compiler.integer_model import PARITY_NAME, lower_model, parity_writers
from qnpu.compiler.output import Writer, write_json, write_outputs
from qnpu.compiler.pass_base import (
    Compilation,
    Pass,
    ProgressCallback,
    Stage,
    no_progress,
    run_passes,
)
from qnpu.compiler.pipeline import (
    BIT_PLAN_NAME,
    ENCODINGS_NAME,
    CheckResult,
    CompileResult,
    canonical_passes,
    default_passes,
    findings,
    make_report,
    result_of,
    write_page,
)
from qnpu.compiler.rules import CacheInputMissing, GraphsDiffer, InvalidConfig
from qnpu.compiler.shared_weights import WEIGHTS_NAME, SharedWeights
from qnpu.compiler.target import load_target
from qnpu.compiler.user_passes import load_passes
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.canonicalize_mask import CanonicalizeMask
from qnpu.passes.freeze_shapes import FreezeShapes
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.return_new_entries import ReturnNewEntries
from qnpu.passes.search_bit_widths import SearchBitWidths
from qnpu.passes.tabulate_positions import TabulatePositions
from qnpu.passes.take_encodings import TakeEncodings
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import FeedSource
from qnpu.runtime_check.generate import DECODE_NAME, PREFILL_NAME
from qnpu.runtime_check.learning_record import LearningRecord
from qnpu.runtime_check.loss_record import LossRecord

PREFILL_QDQ_NAME, DECODE_QDQ_NAME = "prefill.qdq.onnx", "decode.qdq.onnx"
GRAPHS = (PREFILL_NAME, DECODE_NAME, PREFILL_QDQ_NAME, DECODE_QDQ_NAME)
FILES = (WEIGHTS_NAME, *GRAPHS, BIT_PLAN_NAME, ENCODINGS_NAME, PARITY_NAME)
_FED = ("input_ids", *CACHED_INPUTS)


@dataclass(frozen=True, slots=True)
class CachedDecoder:
    """A decoder that goes on from a cache of what it has read.

    Both graphs take ``input_ids`` and ``position_ids`` [1, n], ``attention_mask`` [1, C] and, for
    each layer, past keys and values [1, heads, C - n, width]; they return ``logits`` [1, n,
    vocabulary] and the n new entries of each cache. n is S in the prefill graph and 1 in the decode
    graph. Past entries lie at the end: what is not there yet is masked in front of them, and the
    caller drops the oldest for the new ones. Positions are those of the text, from 0 to C - 1.
    Caches are named as in the source, or as Qualcomm AI Hub does.

    Attributes:
        prefill: the Q/DQ graph of S tokens, the same on integers, and what they were made of.
        decode: the Q/DQ graph of one token. Weights, encodings and cache codes are those of the
            prefill graph.
        integer_prefill, integer_decode: the same on integers alone.
    """

    prefill: CompileResult
    decode: ir.Model
    integer_prefill: ir.Model
    integer_decode: ir.Model


def compile_cached(
    model: ir.Model,
    config: CompileConfig,
    calibration: FeedSource,
    progress: ProgressCallback = no_progress,
    record: LearningRecord | None = None,
    losses: LossRecord | None = None,
) -> CachedDecoder:
    """Float ONNX with dynamic lengths in, a prefill and a decode graph out, both static Q/DQ.

    The prefill graph is compiled as any other, on text with nothing in the cache. The decode graph
    goes through the same passes on the graph, and takes bit plan, encodings and codes from it.

    Args:
        model: as exported "with past"; changed in place, it becomes the prefill graph.
        config: what to do; ``seq_len`` is S, ``context`` is C.
        calibration: windows of S tokens.
        progress: called with a step's name and the fraction of it that is done.
        record: keeps what was learned so far, for a run that is killed.
        losses: keeps what a search for bits measured.

    Raises:
        DiagnosticError: QN118 inputs or outputs of a cache are missing, QN312 the graphs do not
            agree, QN401 an operator has no integer form, QN503 no context; and what
            ``compile_model`` raises.
    """
    if not config.context:
        raise DiagnosticError(InvalidConfig("context", "a cache needs one").at())
    _check_interface(model.graph)
    if config.names == AI_HUB:
        take_hub_names(model.graph)
    config = replace(config, integer_io=False, integer=False)
    second = Compilation(model.clone(), load_target(config.target))
    result = _compile_prefill(model, config, calibration, progress, record, losses)
    floats = result.float_model.graph.initializers
    constants = {name: v.const_value for name, v in floats.items() if v.const_value is not None}
    second.bit_plan = replace(result.bit_plan, specs={})  # sensitivities are not measured again
    if result.bit_search is not None:
        second.bit_choices = result.bit_plan.choices
    passes = default_passes(config, calibration)
    (widths,) = [item for item in passes if isinstance(item, AssignBitWidths)]
    own = load_passes(config.passes)
    decode_passes: list[Pass] = [
        *_float_passes(config, 1, calibration),
        widths,
        *own[Stage.PLANNED],
        TakeEncodings(result.bit_plan, result.encodings, constants),
        InsertQdq(),
        LegalizeTarget(),
        *own[Stage.QDQ],
    ]
    run_passes(decode_passes, second, after_pass=lambda done: verify_stage(second))
    _check_ties(result.model, second.model)
    cpu = Cpu(config.cpu)
    integers = [lower_model(graph, cpu) for graph in (result.model, second.model)]
    return CachedDecoder(replace(result, integer_model=integers[0]), second.model, *integers)


def _float_passes(config: CompileConfig, tokens: int, calibration: FeedSource) -> list[Pass]:
    """Every pass before bit widths, for so many tokens at a time."""
    passes = default_passes(config, calibration)
    first = _first_of_bits(passes)
    canonical = canonical_passes(config)
    kept = (*config.keep_inputs, *CACHED_INPUTS)
    return [
        FreezeShapes(config.freeze_dims, tokens, config.context - tokens, kept),
        ReturnNewEntries(),
        *canonical[1:],
        TabulatePositions(config.context),
        *passes[len(canonical) : first],
    ]


def _first_of_bits(passes: Sequence[Pass]) -> int:
    """Where passes on the float graph end, and bits are chosen."""
    return next(
        i for i, p in enumerate(passes) if isinstance(p, (SearchBitWidths, AssignBitWidths))
    )


def _compile_prefill(
    model: ir.Model,
    config: CompileConfig,
    calibration: FeedSource,
    progress: ProgressCallback,
    record: LearningRecord | None,
    losses: LossRecord | None,
) -> CompileResult:
    compilation = Compilation(model, load_target(config.target))
    snapshots: dict[str, ir.Model] = {}

    def after_pass(done: Pass) -> None:
        verify_stage(compilation)
        if done.name in (ReturnNewEntries.name, CanonicalizeMask.name, UnifyEncodings.name):
            snapshots[done.name] = model.clone()
        if done.name == FreezeShapes.name:
            _check_lengths(model.graph, config.seq_len, config.context)

    passes = default_passes(config, calibration, progress, record, losses)
    first = _first_of_bits(passes)
    floats = _float_passes(config, config.seq_len, calibration)
    rewrites = run_passes([*floats, *passes[first:]], compilation, after_pass=after_pass)
    return result_of(compilation, config, rewrites, snapshots, ReturnNewEntries.name)


def write_cached(
    folder: Path,
    decoder: CachedDecoder,
    checks: CheckResult,
    about: dict[str, object],
    more: Mapping[str, Writer] = MappingProxyType({}),
) -> dict[str, object]:
    """Writes both graphs, on integers and Q/DQ, with one file of weights; all files or none.

    Args:
        folder: where to.
        decoder: from ``compile_cached``.
        checks: from ``check_result``, of its prefill graph.
        about: command, input and configuration, for the report.
        more: file name → what writes it.

    Returns:
        The report, as written to report.json.

    Raises:
        DiagnosticError: QN901, QN902.
    """
    result = decoder.prefill
    graphs = {
        PREFILL_NAME: decoder.integer_prefill,
        DECODE_NAME: decoder.integer_decode,
        PREFILL_QDQ_NAME: result.model,
        DECODE_QDQ_NAME: decoder.decode,
    }
    weights = SharedWeights(list(graphs.values()))
    writers: dict[str, Writer] = {WEIGHTS_NAME: weights.write}
    for name, model in graphs.items():
        writers[name] = partial(weights.save_model, model)
    writers |= {
        BIT_PLAN_NAME: lambda path: write_json(result.bit_plan.to_json(), path),
        ENCODINGS_NAME: lambda path: write_json(result.encodings.to_json(), path),
        **search_writers(result.bit_search),
        **parity_writers(checks.parity),
        **more,
    }
    report = make_report(result, about | findings(result, checks))
    write_outputs(folder, writers, report, write_page)
    return report


class SavedTokenizer(Protocol):
    """A tokenizer that can write its files into a folder."""

    def save(self, folder: Path) -> None: ...


def tokenizer_writers(tokenizer: SavedTokenizer | None) -> dict[str, Writer]:
    """What puts a tokenizer's files beside the graphs, for ``write_cached``."""
    if tokenizer is None:
        return {}
    return {"tokenizer.json": lambda path: tokenizer.save(path.parent)}


def _check_lengths(graph: ir.Graph, tokens: int, context: int) -> None:
    """Nothing of ``freeze_dims`` may say otherwise."""
    for value in graph.inputs:
        shape = static_shape(value) or ()
        wanted = {"attention_mask": context, "input_ids": tokens, "position_ids": tokens}
        size = shape[ENTRIES_AXIS] if is_past(value) else shape[-1]
        expected = context - tokens if is_past(value) else wanted.get(name_of(value), size)
        if size != expected:
            reason = (
                f"`{value.name}` is {list(shape)}, which holds {expected} where a cache is used"
            )
            raise DiagnosticError(InvalidConfig("freeze_dims", reason).at())


def _check_interface(graph: ir.Graph) -> None:
    """QN118 for each input that is missing and each cache that nothing comes out for."""
    inputs, outputs = ({name_of(v) for v in values} for values in (graph.inputs, graph.outputs))
    faults = [_missing(name, "is no input") for name in _FED if name not in inputs]
    past = [name_of(value) for value in graph.inputs if is_past(value)]
    if not past:
        faults.append(_missing("past_key_values.0.key", "is no input"))
    faults += [
        _missing(present_name(name), "is no output")
        for name in past
        if present_name(name) not in outputs
    ]
    if faults:
        raise DiagnosticError(faults)


def _missing(name: str, reason: str) -> Diagnostic:
    return CacheInputMissing(name, reason).at(value=name)


def _check_ties(prefill: ir.Model, decode: ir.Model) -> None:
    """One encoding for a cache, in and out, in both graphs, and only new entries out."""
    faults: list[Diagnostic] = []
    known = [io_encodings(model) for model in (prefill, decode)]
    for name in cache_names(decode.graph):
        found = [table.get(key) for table in known for key in (name, present_name(name))]
        if any(item is None or found[0] is None or not item.same_as(found[0]) for item in found):
            reason = "a cache has not one encoding, in and out, in both graphs"
            faults.append(GraphsDiffer(name, reason).at(value=name))
    new = {present_name(name) for name in cache_names(decode.graph)}
    for value in decode.graph.outputs:
        shape = static_shape(value) or ()
        if name_of(value) in new and shape[ENTRIES_AXIS] != 1:
            faults.append(_missing(name_of(value), "is no Concat of past and new entries"))
    if faults:
        raise DiagnosticError(faults)


def cache_names(graph: ir.Graph) -> Iterator[str]:
    """Inputs that hold a cache, in graph order."""
    yield from (name_of(value) for value in graph.inputs if is_past(value))
