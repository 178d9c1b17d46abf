"""End-to-end learning: the loss, its gradients, the best state, and going on after a kill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import constant_array
from qnpu.compiler.pass_base import Compilation
from qnpu.passes.learn_scales import LearnScales
from qnpu.runtime_check import end_to_end_learning
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.cayley_sgd import orthogonality_error
from qnpu.runtime_check.end_to_end_learning import (
    EndToEndOptions,
    Student,
    Teacher,
    learn_end_to_end,
    prediction_loss,
)
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.learned_rotations import LearnedRotations
from qnpu.runtime_check.learned_tensors import LearnedCodes, LearnedScales
from qnpu.runtime_check.learning_record import LearningRecord
from qnpu.runtime_check.perplexity import next_token_loss
from tests.conftest import normal, run_model
from tests.decoders import LENGTH, some_tokens
from tests.learning import WINDOWS, KilledError, numbers, rounded

STEPS = 40
REPEATED = TokenWindows(np.tile(np.random.default_rng(7).integers(0, 257, (2, LENGTH)), (4, 1)))


def learn(compilation: Compilation, weights: str = "codes", steps: int = STEPS) -> int:
    return LearnScales(WINDOWS, "end-to-end", weights, steps=steps).run(compilation)


def learner(compilation: Compilation, weights: str = "codes") -> LearnedCodes | LearnedScales:
    graph, table = compilation.graph, compilation.encodings
    activations, names = LearnScales(WINDOWS, "end-to-end", weights).names(cut_blocks(graph), table)
    arrays = {name: constant_array(graph.initializers[name]) for name in names}
    reals = {name: array for name, array in arrays.items() if array is not None}
    if weights == "codes":
        return LearnedCodes(table, activations, reals)
    return LearnedScales(table, activations, reals, LearnedRotations(graph))


def test_the_loss_is_its_formula() -> None:
    student, teacher = (torch.from_numpy(normal(1, 6, 9, seed=seed)) for seed in (1, 2))
    tokens = torch.tensor([[3, 1, 8, 0, 2, 5]])
    p, q = (torch.softmax(x[0].double(), -1).numpy() for x in (teacher, student))
    kl = float((p * np.log(p / q)).sum(-1).mean())
    entropy = float(next_token_loss(student[0].numpy(), tokens[0].numpy()).mean())
    for share in (0.0, 0.3, 1.0):
        found = float(prediction_loss(student, teacher, tokens, share))
        assert found == pytest.approx(share * kl + (1 - share) * entropy, rel=1e-5)
    assert float(prediction_loss(student, teacher, None, 0.3)) == pytest.approx(kl, rel=1e-5)
    assert float(prediction_loss(teacher, teacher, None, 1.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("count", [1, 16, 37])
@pytest.mark.parametrize("share", [None, 0.0, 0.9])
def test_the_slope_of_the_loss_is_autograds(count: int, share: float | None) -> None:
    student, teacher = (torch.from_numpy(normal(1, count, 9, seed=seed)) for seed in (1, 2))
    student.requires_grad_()
    tokens = torch.arange(count)[None] % 9
    found, truth = (torch.log_softmax(x[0], -1) for x in (student, teacher))
    kl = torch.nn.functional.kl_div(found, truth, reduction="sum", log_target=True) / count
    entropy = torch.nn.functional.nll_loss(found[:-1], tokens[0, 1:], reduction="sum")
    whole = kl if share is None else share * kl + (1 - share) * entropy / max(count - 1, 1)
    mine = prediction_loss(student, teacher, None if share is None else tokens, share or 0.0)
    slopes = [torch.autograd.grad(loss, student)[0].numpy() for loss in (whole, mine)]
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-4, atol=1e-7)


def test_gradients_of_weights_scales_are_finite_differences() -> None:
    """ŵ = s · code is smooth in s; so is the loss, where nothing else is quantized."""
    compilation = rounded("w4a16")
    names = [n for n in compilation.encodings if compilation.encodings.has_codes(n)]
    table, reals = EncodingTable(), {}
    for name in names:
        array = constant_array(compilation.graph.initializers[name])
        assert array is not None
        reals[name] = array
        encoding = compilation.encodings[name]
        table.choose_codes(name, encoding, compilation.encodings.quantize(name, array))
    feeds = WINDOWS.feeds(compilation.graph.inputs)
    blocks = cut_blocks(compilation.graph)
    learned = LearnedCodes(table, [], reals)
    student = Student(blocks, table, learned, "logits", torch.float32)
    teacher = Teacher(blocks, feeds, "logits").logits(0)
    tokens = torch.from_numpy(feeds[0]["input_ids"]).long()

    def loss() -> torch.Tensor:
        return prediction_loss(student.logits(feeds[0]), teacher, tokens, 0.9)

    loss().backward()  # type: ignore[no-untyped-call]
    for step in learned.parameters()["weight_step"]:
        assert step.grad is not None
        direction, start = step.grad / step.grad.norm(), step.detach().clone()
        ends = []
        with torch.no_grad():
            for size in (2e-2, -2e-2):
                step.copy_(start + size * direction)
                ends.append(float(loss()))
            step.copy_(start)
        slope = (ends[0] - ends[1]) / 4e-2
        assert float(step.grad.norm()) == pytest.approx(slope, rel=0.03, abs=2e-6)


def test_losses_fall() -> None:
    """Random tokens teach nothing of others, so the runs that are held out repeat the rest."""
    compilation = rounded()
    blocks, table = cut_blocks(compilation.graph), compilation.encodings
    feeds = REPEATED.feeds(compilation.graph.inputs)
    learned = learner(compilation)
    rates = {"latent": 1e-3, "weight_step": 1e-3, "step": 2e-3, "zero_point": 0.02}
    options = EndToEndOptions("logits", STEPS, 2, rates=rates, checks=4)
    checks = list(learn_end_to_end(blocks, table, feeds, learned, options))
    assert [check.step for check in checks] == [0, 10, 20, 30, 40]
    assert checks[-1].best < 0.94 * checks[0].loss
    assert checks[-1].best == min(check.loss for check in checks)


def test_what_was_learned_is_in_the_table_and_not_learned_again() -> None:
    compilation = rounded()
    before, said = numbers(compilation), []

    def hear(step: str, fraction: float) -> None:
        said.append(step)

    work = LearnScales(REPEATED, "end-to-end", steps=STEPS, batch=2, progress=hear)
    count = work.run(compilation)
    changed = {name for name, value in numbers(compilation).items() if value != before[name]}
    table = compilation.encodings
    assert changed
    assert changed <= {name for name in table if table.is_learned(name, "end-to-end")}
    assert sum(table.is_learned(name, "end-to-end") for name in table) == count
    losses = [float(step.rpartition(" ")[2]) for step in said if "loss" in step]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert work.run(compilation) == 0


def test_rates_that_are_far_too_high_do_no_harm_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = {"latent": 50.0, "weight_step": 5.0, "step": 5.0, "zero_point": 50.0}
    wild = partial(EndToEndOptions, rates=rates)
    monkeypatch.setattr(end_to_end_learning, "EndToEndOptions", wild)
    compilation = rounded()
    before = numbers(compilation)
    learn(compilation, steps=16)
    assert [diagnostic.code for diagnostic in compilation.diagnostics] == ["QN308"]
    assert numbers(compilation) == before


@pytest.mark.parametrize("killed_at", [5, 12, 13])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, killed_at: int) -> None:
    pass_ = partial(LearnScales, REPEATED, "end-to-end", steps=24)
    whole = rounded()
    pass_().run(whole)
    assert [point.step for point in whole.learning] == [0, 3, 6, 9, 12, 15, 18, 21, 24]

    def kill(step: str, fraction: float) -> None:
        if f"step {killed_at}," in step:
            raise KilledError

    with pytest.raises(KilledError):
        pass_(record=LearningRecord(tmp_path / "work"), progress=kill).run(rounded())
    said: list[str] = []
    again = rounded()
    record = LearningRecord(tmp_path / "work", resume=True)
    pass_(record=record, progress=lambda step, fraction: said.append(step)).run(again)
    assert numbers(again) == numbers(whole)
    assert again.learning == whole.learning
    assert again.diagnostics == whole.diagnostics
    first = 3 * ((killed_at - 1) // 3) + 1
    assert said[0].startswith(f"learn: step {first},")


def test_rotations_learn_and_stay_rotations() -> None:
    compilation = rounded("w4a8")
    for name in [n for n in compilation.encodings if compilation.encodings.has_codes(n)]:
        compilation.encodings[name] = compilation.encodings[name]  # nearest codes again
    graph, table = compilation.graph, compilation.encodings
    blocks, feeds = cut_blocks(graph), WINDOWS.feeds(graph.inputs)
    learned = learner(compilation, "rotations")
    assert isinstance(learned, LearnedScales)
    matrices = learned.rotations.matrices
    options = EndToEndOptions("logits", STEPS, local_share=0.25)
    worst: list[float] = []

    def look(step: int, loss: float) -> None:
        worst.append(max(orthogonality_error(matrix) for matrix in matrices.values()))

    checks = list(learn_end_to_end(blocks, table, feeds, learned, options, None, look))
    assert checks[-1].best < 0.98 * checks[0].loss
    assert max(worst) <= 1e-5
    for matrix in matrices.values():
        assert float((matrix - torch.eye(len(matrix))).detach().abs().max()) > 1e-3


def test_learned_rotations_are_in_the_weights_afterwards() -> None:
    compilation = rounded()
    feeds = some_tokens(compilation.model)
    expected = run_model(compilation.model, feeds)[0]
    before = {n: v.const_value for n, v in compilation.graph.initializers.items()}
    assert learn(compilation, "rotations", steps=8) > 0
    found = run_model(compilation.model, feeds)[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    after = compilation.graph.initializers
    changed = {name for name in before if after[name].const_value is not before[name]}
    assert changed
    table = compilation.encodings
    others = {name for name in changed if not table.is_learned(name)}
    assert others
    for name in others:  # embedding and head: encoded anew, so that nothing clips
        array = constant_array(after[name])
        assert array is not None
        error = np.abs(table[name].dequantize(table[name].quantize(array)) - array).max()
        assert error <= 0.51 * table[name].scale.max(), name


def test_a_graph_without_a_prediction_is_told() -> None:
    compilation = rounded()
    (logits,) = compilation.graph.outputs
    pick = ir.node("ArgMax", [logits], {"axis": -1})
    pick.outputs[0].name, pick.outputs[0].type = "next", ir.TensorType(ir.DataType.INT64)
    compilation.graph.append(pick)
    compilation.graph.outputs[0] = pick.outputs[0]
    with pytest.raises(DiagnosticError) as error:
        learn(compilation)
    assert [diagnostic.code for diagnostic in error.value.diagnostics] == ["QN309"]


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a GPU does: operands in two places, but for single numbers and indices."""

    MOVES = (torch.ops.aten._to_copy, torch.ops.aten.index, torch.ops.aten.index_put_)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        places = {tensor.device.type for tensor in tensors if tensor.dim()}
        assert len(places) < 2 or func.overloadpacket in self.MOVES, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["codes", "rotations"])
def test_all_that_learns_meets_the_data_on_a_device(weights: str) -> None:
    """Of a whole step, on the meta device, which computes nothing."""
    compilation, device = rounded(), torch.device("meta")
    table, blocks = compilation.encodings, cut_blocks(compilation.graph)
    learned = learner(compilation, weights)
    learned.move(device)
    assert {parameter.device.type for parameter in learned.all_parameters()} == {"meta"}
    feeds = list(WINDOWS.feeds(compilation.graph.inputs))
    tokens = torch.from_numpy(feeds[0]["input_ids"])
    student = Student(blocks, table, learned, "logits", torch.bfloat16, device)
    teacher = Teacher(blocks, feeds, "logits", device)
    with OneDevice():  # type: ignore[no-untyped-call]
        loss = prediction_loss(student.logits(feeds[0]), teacher.logits(0), tokens, 0.9)
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.device.type == "meta"
    gradients = [parameter.grad for parameter in learned.all_parameters()]
    assert {g.device.type for g in gradients if g is not None} == {"meta"}
    assert sum(g is not None for g in gradients) > len(gradients) / 2


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert end_to_end_learning.working_device("auto").type == expected
    assert end_to_end_learning.working_device("cpu").type == "cpu"


def test_a_narrow_type_learns_the_same_within_its_precision() -> None:
    """To 2 % of the loss, in each of the first steps."""
    said: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        heard: list[float] = []

        def hear(step: str, fraction: float, heard: list[float] = heard) -> None:
            if "loss" in step:
                heard.append(float(step.rpartition(" ")[2]))

        work = LearnScales(REPEATED, "end-to-end", steps=12, dtype=dtype, progress=hear)
        work.run(rounded())
        said[dtype] = heard
    assert said["bfloat16"][:4] == pytest.approx(said["float32"][:4], rel=0.02)
