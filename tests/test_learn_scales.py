"""learn-scales: losses fall, the model comes closer, and a killed run goes on to the same end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.roles import is_down_projection
from qnpu.passes.learn_scales import LearnScales
from qnpu.runtime_check import block_learning
from qnpu.runtime_check.block_learning import LearningOptions
from qnpu.runtime_check.learning_record import LearningRecord
from tests.learning import WINDOWS, KilledError, logits_error, numbers, rounded


def learn(
    compilation: Compilation,
    steps: int = 24,
    record: LearningRecord | None = None,
    progress: Callable[[str, float], None] = lambda step, fraction: None,
) -> int:
    return LearnScales(WINDOWS, steps=steps, record=record, progress=progress).run(compilation)


def test_the_model_comes_closer_on_tokens_it_did_not_learn_from() -> None:
    compilation = rounded()
    before = logits_error(compilation)
    assert learn(compilation, steps=60) > 0
    assert logits_error(compilation) < 0.97 * before  # most of it is the 8-bit tensors'


def test_each_block_s_loss_falls() -> None:
    said: list[str] = []
    learn(rounded(), steps=60, progress=lambda step, fraction: said.append(step))
    losses = [step.split("loss ")[1].split(" → ") for step in said if "loss" in step]
    assert len(losses) == 2
    assert all(float(after) < 0.75 * float(before) for before, after in losses)


def test_only_inputs_of_rotated_linears_and_four_bit_weights_change() -> None:
    compilation = rounded()
    before = numbers(compilation)
    learn(compilation)
    after = numbers(compilation)
    allowed: set[str] = set()
    kept: set[str] = set()
    for node in compilation.graph:
        linear = as_linear(node)
        if linear is None:
            continue
        allowed |= {name_of(linear.weight), name_of(linear.activation)}
        if is_down_projection(linear):
            kept.add(name_of(linear.activation))
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert changed <= allowed - kept
    table = compilation.encodings
    assert any(table[name].spec.bits == 4 for name in changed)
    assert any(name not in compilation.graph.initializers for name in changed)


def test_a_second_run_finds_nothing_to_learn() -> None:
    compilation = rounded()
    assert learn(compilation, steps=2) > 0
    assert learn(compilation, steps=2) == 0


@pytest.mark.parametrize("scheme", ["w8a16"])
def test_does_not_fire_where_nothing_is_narrow(scheme: str) -> None:
    assert learn(rounded(scheme)) == 0


def test_no_steps_no_change() -> None:
    compilation = rounded()
    before = numbers(compilation)
    assert learn(compilation, steps=0) == 0
    assert numbers(compilation) == before


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole = rounded()
    learn(whole, steps=6)
    record = LearningRecord(tmp_path / "work")

    def kill(step: str, fraction: float) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        learn(rounded(), steps=6, record=record, progress=kill)
    assert record.load(1) is not None
    assert record.load(2) is None

    said: list[str] = []
    again = rounded()
    resumed = LearningRecord(tmp_path / "work", resume=True)
    learn(again, steps=6, record=resumed, progress=lambda step, fraction: said.append(step))
    assert numbers(again) == numbers(whole)
    assert [step.partition(",")[0] for step in said if "loss" in step] == ["learn: block 2"]


def test_other_work_does_not_go_on_with_a_record(tmp_path: Path) -> None:
    learn(rounded(), steps=2, record=LearningRecord(tmp_path / "work"))
    said: list[str] = []
    resumed = LearningRecord(tmp_path / "work", resume=True)
    learn(rounded(), steps=3, record=resumed, progress=lambda step, fraction: said.append(step))
    assert sum("loss" in step for step in said) == 2


def test_without_resume_a_record_is_thrown_away(tmp_path: Path) -> None:
    record = LearningRecord(tmp_path / "work")
    learn(rounded(), steps=2, record=record)
    assert record.load(1) is not None
    record.open("other work")
    assert record.load(1) is None


def test_a_torn_file_counts_as_not_done(tmp_path: Path) -> None:
    record = LearningRecord(tmp_path / "work")
    record.open("work")
    record.save(3, {"a/step": np.arange(6.0)})
    loaded = record.load(3)
    assert loaded is not None
    assert np.array_equal(loaded["a/step"], np.arange(6.0))
    path = next((tmp_path / "work").glob("part-*.npz"))
    path.write_bytes(path.read_bytes()[:-30])
    assert record.load(3) is None


def test_a_folder_of_the_user_s_own_is_never_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    LearningRecord(tmp_path).discard()
    assert (tmp_path / "letter.txt").exists()


def test_rates_that_are_far_too_high_do_no_harm_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wild = partial(LearningOptions, latent_rate=50.0, step_rate=5.0)
    monkeypatch.setattr(block_learning, "LearningOptions", wild)
    compilation = rounded()
    before = numbers(compilation)
    said: list[str] = []
    learn(compilation, steps=8, progress=lambda step, fraction: said.append(step))
    assert [diagnostic.code for diagnostic in compilation.diagnostics] == ["QN308", "QN308"]
    losses = [step.split("loss ")[1].split(" → ") for step in said if "loss" in step]
    assert all(after == first for first, after in losses)
    assert [point.step for point in compilation.learning][:3] == [0, 2, 4]
    assert numbers(compilation) == before


def test_encodings_set_anew_are_open_to_learning_again() -> None:
    table = EncodingTable()
    encoding = Encoding.from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 1.0)
    table["x"] = encoding
    table.mark_learned(["x"], "blockwise")
    assert table.is_learned("x")
    table["x"] = encoding
    assert not table.is_learned("x")
