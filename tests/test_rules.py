"""Rules: unique sorted codes, complete manual pages, and examples that trigger what they document.

A rule is triggered by its own ``onnx`` example or by the test that ``TRIGGERED_BY`` names.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler import rules, target_rules
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.console import command
from qnpu.compiler.diagnostics import DiagnosticError, Rule, Severity
from qnpu.compiler.graph_checks import check_graph, is_quantized
from qnpu.compiler.graph_edit import static_shape
from qnpu.compiler.pass_base import Compilation, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.rules import all_rules, manual_page
from qnpu.compiler.target import load_target, target_names
from qnpu.compiler.target_check import check_target
from qnpu.compiler.target_faults import target_faults
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.runtime_check.session import Array, Feeds
from tests.conftest import normal, parse

SECTIONS = ("What it checks", "Why it matters", "Example", "How to fix")
EXAMPLE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)

TRIGGERED_BY = {
    "QN102": "test_config.py::test_a_file_that_is_not_there",
    "QN103": "test_models_onnx_file.py::test_every_cut_is_noticed",
    "QN104": "test_models_onnx_file.py::test_external_data_missing_or_short",
    "QN105": "test_models_onnx_file.py::test_external_data_outside_the_folder",
    "QN118": "test_cached_decoder.py::test_what_a_cache_needs",
    "QN119": "test_marks.py::test_what_no_pass_has_written",
    "QN113": "test_models_load.py::test_resolve_names",
    "QN114": "test_models_export.py::test_missing_exporter",
    "QN115": "test_models_export.py::test_a_failed_export_says_why_and_leaves_nothing",
    "QN301": "test_feeds.py::test_arrays_that_do_not_fit",
    "QN302": "test_token_data.py::test_text_faults",
    "QN303": "test_insert_qdq.py::test_tensors_without_an_encoding_are_all_named",
    "QN305": "test_feeds.py::test_text_cannot_feed_an_image",
    "QN306": "test_encoding_formats.py::test_faults_of_a_file",
    "QN307": "test_torch_executor.py::test_what_torch_cannot_run",
    "QN308": "test_learn_scales.py::test_rates_that_are_far_too_high_do_no_harm_and_are_told",
    "QN310": "test_insert_prefix.py::test_learned_positions_leave_the_graph_alone",
    "QN311": "test_insert_prefix.py::test_same_logits_as_with_the_prefix_as_tokens",
    "QN309": "test_end_to_end_learning.py::test_a_graph_without_a_prediction_is_told",
    "QN314": "test_encoding_formats.py::test_blocks_that_a_version_cannot_hold",
    "QN401": "test_fold_requantize.py::test_what_has_no_integer_form_is_told",
    "QN312": "test_take_encodings.py::test_graphs_that_differ",
    "QN313": "test_zero_shot.py::test_lines_that_are_no_items",
    "QN402": "test_integer_model.py::test_an_integer_graph_that_differs_is_told",
    "QN403": "test_session.py::test_a_graph_for_other_cpus_is_refused",
    "QN404": "test_cli.py::test_a_perplexity_beyond_the_limit_fails_but_is_written",
    "QN501": "test_bit_plan.py::test_unknown_schemes",
    "QN502": "test_target.py::test_unknown_targets",
    "QN503": "test_config.py::test_faults_of_a_file",
    "QN504": "test_quantized_model.py::test_what_is_skipped_is_said",
    "QN505": "test_assign_bit_widths.py::test_a_graph_without_down_projections_says_so",
    "QN506": "test_assign_bit_widths.py::test_four_bits_are_refused_where_nothing_is_rotated",
    "QN507": "test_assign_bit_widths.py::test_a_target_without_four_bit_activations",
    "QN508": "test_cost_model.py::test_targets_and_widths_without_figures",
    "QN509": "test_allocation.py::test_an_infeasible_budget_names_the_nearest",
    "QN525": "test_model_check.py::test_a_float_graph",
    "QN530": "test_oracle.py::test_float_operations_and_refusals_are_faults",
    "QN531": "test_oracle.py::test_float_operations_and_refusals_are_faults",
    "QN532": "test_oracle.py::test_outputs_within_and_beyond_the_tolerance",
    "QN533": "test_cli_check.py::test_an_oracle_that_fails",
    "QN521": "test_target_faults.py::test_a_model_that_is_too_large",
    "QN540": "test_bit_choices.py::test_faults",
    "QN541": "test_bit_items.py::test_what_is_no_decoder",
    "QN542": "test_user_passes.py::test_what_is_no_pass",
    "QN543": "test_assign_bit_widths.py::test_a_plan_with_blocks_for_a_target_without",
    "QN544": "test_assign_bit_widths.py::test_weights_that_blocks_do_not_fit",
    "QN590": "test_emit.py::test_a_graph_that_the_vendor_refuses",
    "QN901": "test_output.py::test_what_the_system_refuses",
    "QN902": "test_output.py::test_a_file_of_the_users_is_not_replaced",
    "QN903": "test_verify.py::test_two_values_of_one_name",
    "QN999": "test_rules.py::test_what_no_rule_foresees",
}


def page(rule: type[Rule]) -> str:
    return inspect.cleandoc(rule.__doc__ or "")


def example(rule: type[Rule]) -> tuple[str, str]:
    found = EXAMPLE.search(page(rule))
    assert found is not None, rule.code
    return found[1], inspect.cleandoc(found[2])


WITH_GRAPH = [rule for rule in all_rules() if example(rule)[0] == "onnx"]


@dataclass(frozen=True)
class AnyData:
    """Two runs of whatever a graph takes: small ids, numbers about zero, True."""

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        return [{value.name or "": self._array(value, seed) for value in inputs} for seed in (0, 1)]

    def _array(self, value: ir.Value, seed: int) -> Array:
        shape = static_shape(value) or ()
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        if dtype.kind == "f":
            return normal(*shape, seed=seed).astype(dtype)
        return np.ones(shape, dtype)


def test_codes_are_unique_and_in_order() -> None:
    """In the file as well, where a new one is easily put at the end."""
    codes = [rule.code for rule in all_rules()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"QN\d{3}", code) for code in codes)
    written: list[str] = []
    for module in (rules, target_rules):
        source = inspect.getsource(module)
        found = re.findall(r'code: ClassVar\[str\] = "(QN\d+)"', source)
        assert found == sorted(found)
        written += found
    assert sorted(written) == codes


def test_names_are_unique_and_state_a_fault() -> None:
    names = [rule.name for rule in all_rules()]
    assert len(set(names)) == len(names)
    for rule in all_rules():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name)
        words = re.findall(r"[A-Z][a-z]*", rule.__name__)
        assert rule.name == "-".join(words).lower()


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_every_manual_page_has_its_four_sections(rule: type[Rule]) -> None:
    lines = page(rule).splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert tuple(headings) == SECTIONS
    for heading, following in zip(SECTIONS, [*SECTIONS[1:], None], strict=True):
        start = lines.index(heading) + 1
        end = lines.index(following) if following else len(lines)
        assert any(line.strip() for line in lines[start:end]), heading


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_messages(rule: type[Rule]) -> None:
    """One sentence each, without a full stop, that says all that the fields say."""
    samples: dict[str, Any] = {"int": 3, "float": 0.5, "float | None": 0.5, "str": "something"}
    fields = {field.name: samples[str(field.type)] for field in dataclasses.fields(rule)}
    item = rule(**fields)
    for text in (item.message(), item.help()):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")
    said = item.message() + item.help()
    assert all(str(value) in said for value in fields.values())
    text = str(item.at(file="m.onnx", node="n", value="v"))
    head, where, advice = text.splitlines()
    assert head.startswith(f"{rule.severity.value}[{rule.code}] {rule.name}: ")
    assert where == "  --> m.onnx: node n: v"
    assert advice.startswith("  help: ")


def test_pages_by_code() -> None:
    for rule in all_rules():
        shown = manual_page(rule.code.lower())
        assert shown is not None
        assert shown.startswith(f"{rule.code} {rule.name} ({rule.severity.value})\n\n{SECTIONS[0]}")
    assert manual_page("QN000") is None


def triggered(text: str) -> set[str]:
    """Codes that a check for any target, or the passes of a compile, report for a graph."""
    codes = {fault.code for fault in check_graph(parse(text))}
    if is_quantized(parse(text).graph) or "Integer" in text:
        for name in target_names():
            report = check_target(parse(text), load_target(name))
            codes |= {fault.code for fault in target_faults(parse(text), report)}
            legal = Compilation(parse(text), load_target(name))
            LegalizeTarget().run(legal)
            codes |= {diagnostic.code for diagnostic in legal.diagnostics}
    compilation = Compilation(parse(text))
    online = ("r4",) if "down =" in text else ()  # one with nothing to do says so
    passes = default_passes(CompileConfig(seq_len=4, online=online), AnyData())
    try:
        run_passes(passes, compilation, after_pass=lambda done: None)
    except DiagnosticError as error:
        codes |= set(error.codes)
    return codes | {diagnostic.code for diagnostic in compilation.diagnostics}


@pytest.mark.parametrize("rule", WITH_GRAPH, ids=lambda rule: rule.code)
def test_every_example_triggers_its_rule(rule: type[Rule]) -> None:
    assert rule.code in triggered(example(rule)[1])


def test_a_graph_without_fault_triggers_nothing() -> None:
    assert triggered("g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }") == set()


def test_every_other_rule_is_triggered_by_a_test() -> None:
    others = {rule.code for rule in all_rules()} - {rule.code for rule in WITH_GRAPH}
    assert others == set(TRIGGERED_BY)


@pytest.mark.parametrize(("code", "place"), TRIGGERED_BY.items())
def test_the_table_names_tests_that_exist(code: str, place: str) -> None:
    file, name = place.split("::")
    source = (Path(__file__).parent / file).read_text("utf-8")
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    helpers = "faults", "fault"  # of files whose helper asserts the one code they are about
    body = ast.get_source_segment(source, found) or ""
    assert code in body or any(f"{helper}(" in body and code in source for helper in helpers)


def test_what_no_rule_foresees(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def broken(debug: bool = False) -> None:
        raise KeyError("surprise")

    with pytest.raises(SystemExit) as caught:
        broken()
    assert caught.value.code == 1
    assert "error[QN999]" in capsys.readouterr().err


def test_severities() -> None:
    """Only errors stop a compile, so notes and warnings are those that a compile goes on from."""
    gentle = {rule.code for rule in all_rules() if rule.severity is not Severity.ERROR}
    of_commands = {code for code in gentle if code.startswith("QN53")}
    of_commands |= {"QN308", "QN310", "QN311", "QN402"}
    of_commands |= {"QN504", "QN505", "QN506", "QN507", "QN544"}
    assert gentle - of_commands <= {rule.code for rule in WITH_GRAPH}
