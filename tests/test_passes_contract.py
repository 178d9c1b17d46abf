"""What every pass promises, over all passes of a compile and several graphs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.pass_base import Compilation, Pass, Stage, check_order, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.target import load_target
from qnpu.compiler.verify import verify_stage
from qnpu.runtime_check.feeds import TokenWindows
from tests.conftest import parse

WINDOWS = TokenWindows(np.array([[0, 3, 1, 2], [2, 2, 3, 0]]))
EVERYTHING = CompileConfig(
    seq_len=4, online=("r3", "r4"), prefix="1", integer_io=True, integer=True
)
PASSES = default_passes(EVERYTHING, WINDOWS)
FOLDER = Path(__file__).parent

# A spelt-out decoder layer without attention heads: each float pass finds something to do.
DECODER = """
    <ir_version: 8, opset_import: ["" : 20]>
    decoder (int64[batch_size, seq] input_ids, int64[batch_size, seq] attention_mask)
        => (float[batch_size, seq, 4] logits)
    <float[4, 2] table = {1, -2, 0.5, 3, -1, 0.25, 2, 2}, float[2] gain = {1, 2},
     float[2, 2] wq = {1, 2, -3, 1}, float[2, 2] wk = {0.5, 2, 1, -1}, float[2] bk = {0.5, -1},
     float[2, 2] wv = {2, 1, 1, 3}, float[2, 4] head = {1, 2, 3, 4, -4, -3, -2, -1},
     float two = {2}, float eps = {1e-6}, int64[1] last = {-1}, float one = {1},
     float low = {-3.4028235e38}, int64[1] at = {1}>
    {
        x = Gather(table, input_ids)
        square = Pow(x, two)
        mean = ReduceMean(square, last)
        shifted = Add(mean, eps)
        root = Sqrt(shifted)
        inverse = Reciprocal(root)
        unit = Mul(x, inverse)
        normed = Mul(unit, gain)
        query = MatMul(normed, wq)
        product = MatMul(normed, wk)
        key = Add(product, bk)
        value = MatMul(normed, wv)
        turned = Transpose<perm: ints = [0, 2, 1]>(key)
        scores = MatMul(query, turned)
        kept = Cast<to: int = 1>(attention_mask)
        dropped = Sub(one, kept)
        bias = Mul(dropped, low)
        rows = Unsqueeze(bias, at)
        masked = Add(scores, rows)
        weights = Softmax(masked)
        mixed = MatMul(weights, value)
        stream = Add(x, mixed)
        same = Identity(stream)
        logits = MatMul(same, head)
    }
"""
PLAIN = """
    plain (int64[1, 4] input_ids) => (float[1, 4, 4] logits)
    <float[4, 2] table = {1, -2, 0.5, 3, -1, 0.25, 2, 2}, float[2, 4] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { x = Gather(table, input_ids)  logits = MatMul(x, w) }
"""


def ids(item: Pass) -> str:
    return item.name


def numbers(compilation: Compilation) -> dict[str, tuple[object, ...]]:
    table = compilation.encodings
    return {
        name: (str(table[name].spec), table[name].scale.tobytes(), table[name].zero_point.tobytes())
        for name in table
    }


@pytest.mark.parametrize("text", [DECODER, PLAIN], ids=["decoder", "plain"])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("target", ["onnxruntime", "qnn-htp-v75", "generic-int8"])
def test_a_second_run_changes_nothing(text: str, scheme: str, rotate: bool, target: str) -> None:
    compilation = Compilation(parse(text), load_target(target))
    online = ("r3", "r4") if rotate else ()
    config = dataclasses.replace(EVERYTHING, scheme=scheme, rotate=rotate, online=online)

    def check(done: Pass) -> None:
        verify_stage(compilation)
        before = model_to_text(compilation.model), numbers(compilation)
        plan = dict(compilation.bit_plan.specs)
        noted = {str(diagnostic) for diagnostic in compilation.diagnostics}
        assert done.run(compilation) == 0, done.name
        assert (model_to_text(compilation.model), numbers(compilation)) == before, done.name
        assert compilation.bit_plan.specs == plan, done.name
        assert {str(diagnostic) for diagnostic in compilation.diagnostics} == noted, done.name
        verify_stage(compilation)

    run_passes(default_passes(config, WINDOWS), compilation, after_pass=check)


def test_the_decoder_gives_the_float_passes_something_to_do() -> None:
    """Otherwise the test above would say little."""
    compilation = Compilation(parse(DECODER))
    passes = default_passes(CompileConfig(seq_len=4, rotate=False), WINDOWS)
    counts = run_passes(passes, compilation, after_pass=lambda done: None)
    idle = {"canonicalize-mask", "decompose-attention", "decompose-contrib", "decompose-rotary"}
    idle |= {"fold-affine", "legalize-target", "round-weights"}  # of the last, weights have 8 bits
    assert {name for name, count in counts.items() if not count} <= idle


@pytest.mark.parametrize("item", PASSES, ids=ids)
def test_a_pass_is_a_frozen_dataclass(item: Pass) -> None:
    assert dataclasses.is_dataclass(item)
    for field in dataclasses.fields(item):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field.name, None)
    assert type(item).__dataclass_params__.frozen


@pytest.mark.parametrize("item", PASSES, ids=ids)
def test_a_pass_lives_in_a_file_of_its_name_and_has_a_test(item: Pass) -> None:
    module = item.name.replace("-", "_")
    assert type(item).__module__ == f"qnpu.passes.{module}"
    assert type(item).__name__ == "".join(word.title() for word in item.name.split("-"))
    assert (FOLDER / f"test_{module}.py").is_file()


@pytest.mark.parametrize("item", PASSES, ids=ids)
def test_a_pass_says_what_it_does(item: Pass) -> None:
    """One sentence, an example or a formula, and when it must not fire."""
    text = inspect.getdoc(type(item)) or ""
    assert text.splitlines()[0].endswith(".")
    assert item.consumes in Stage
    assert item.produces in Stage


def test_names_are_unique() -> None:
    names = [item.name for item in PASSES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", [DECODER, PLAIN], ids=["decoder", "plain"])
def test_passes_that_need_only_the_graph_run_in_a_sequence_of_onnx_ir(text: str) -> None:
    floats = [item for item in PASSES if item.produces is Stage.FLOAT]
    assert len(floats) >= 5
    model = parse(text)
    result = ir.passes.Sequential(*floats)(model)
    assert result.model is model
    assert result.modified == (text == DECODER or result.modified)
    expected = Compilation(parse(text))
    run_passes(floats, expected, after_pass=lambda done: None)
    assert model_to_text(model) == model_to_text(expected.model)
    assert not ir.passes.Sequential(*floats)(model).modified


def test_an_order_that_stages_forbid() -> None:
    check_order(PASSES)
    with pytest.raises(ValueError, match="consumes"):
        check_order(PASSES[::-1])
    planned = next(i for i, item in enumerate(PASSES) if item.produces is Stage.PLANNED)
    with pytest.raises(ValueError, match="consumes"):
        run_passes(
            PASSES[:planned] + PASSES[planned + 1 :],
            Compilation(parse(PLAIN)),
            after_pass=lambda done: None,
        )


def test_counts_and_stages_are_reported() -> None:
    compilation = Compilation(parse(PLAIN))
    stages: list[Stage] = []
    counts = run_passes(PASSES, compilation, after_pass=lambda done: stages.append(done.produces))
    assert list(counts) == [item.name for item in PASSES]
    assert stages == [item.produces for item in PASSES]
    assert compilation.stage is Stage.QDQ
