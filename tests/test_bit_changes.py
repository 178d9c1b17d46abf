"""bit_changes: what stands in a tensor's place is what the compile would put there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qnpu.compiler.bit_choices import WeightBits
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.runtime_check import bit_changes
from qnpu.runtime_check.bit_changes import joined
from qnpu.runtime_check.bit_losses import Change
from qnpu.runtime_check.segments import SegmentRunner
from tests.searching import feeds, searched

IN_BLOCKS = WeightBits(4, 16)


def test_wide_activations_are_left_alone() -> None:
    _, items, changes = searched()
    assert not changes.of_input(items.groups[0], 16).activations
    assert not changes.of_cache(items.caches[0], 16).activations


def test_an_input_goes_with_results_that_have_its_bits() -> None:
    _, items, changes = searched()
    for group in items.groups:
        change = changes.of_input(group, 8)
        results = [v for item in group.linears if (v := item.narrow_result) is not None]
        assert set(change.activations) == {group.name, *map(name_of, results)}
        assert {item.spec.bits for item in change.activations.values()} == {8}
    few = changes.of_input(items.groups[0], 4).activations
    assert few[items.groups[0].name].spec.bits == 4
    assert {few[name].spec.bits for name in few if name != items.groups[0].name} == {8}


def test_ranges_hold_the_data() -> None:
    """Of 8 bits nearly all, of 4 less: what lies outside is clipped to lose less inside."""
    model, items, changes = searched()
    values: dict[str, list[np.ndarray]] = {}
    wanted = {group.name for group in items.groups}
    for step in SegmentRunner(model, feeds(model)).stream(wanted):
        for name, array in step.values.items():
            values.setdefault(name, []).append(array)
    for group in items.groups:
        real = np.concatenate([a.reshape(-1) for a in values[group.name]])
        errors = []
        for bits in (4, 8):
            encoding = changes.of_input(group, bits).activations[group.name]
            restored = encoding.dequantize(encoding.quantize(real))
            errors.append(float(np.square(restored - real).mean() / np.square(real).mean()))
        assert errors[1] < 2e-3
        assert errors[1] < errors[0] / 20


def test_keys_and_values_have_the_type_that_the_target_wants() -> None:
    _, items, changes = searched()
    for cache in items.caches:
        change = changes.of_cache(cache, 8)
        (encoding,) = change.activations.values()
        assert list(change.activations) == [name_of(cache.operand)]
        assert encoding.spec.symmetric  # of Hexagon


def test_weights_of_few_bits_have_chosen_codes() -> None:
    """They lose more by themselves than the nearest, but less in what the linear gives."""
    model, items, changes = searched()
    group = items.groups[0]
    (step,) = [s for s in SegmentRunner(model, feeds(model)[:1]).stream({group.name}) if s.values]
    rows = torch.from_numpy(step.values[group.name]).flatten(0, -2)
    gained = 0
    for item in group.linears:
        array = constant_array(item.linear.weight)
        assert array is not None
        real, name = torch.from_numpy(array), item.shape.name
        widths = WeightBits(4), WeightBits(8)
        four, eight = (changes.of_weight(item, bits).tensors()[name] for bits in widths)
        assert four.shape == eight.shape == real.shape
        peak = real.abs().amax(dim=0)
        assert (len(torch.unique(four[:, 0])), len(torch.unique(eight[:, 0]))) <= (16, 255)
        assert float(((eight - real).abs() / (peak / 127)).max()) <= 0.5 + 1e-3
        step_size = peak / 7
        nearest = torch.clamp(torch.round(real / step_size), -7, 7) * step_size
        gained += int(
            (rows @ (four - real)).square().sum() < (rows @ (nearest - real)).square().sum()
        )
    assert gained == len(group.linears)


def test_blocks_lose_less() -> None:
    """Each of 16 features has a scale of its own, a whole multiple of the channel's."""
    _, items, changes = searched()
    for item in items.groups[0].linears:
        array = constant_array(item.linear.weight)
        assert array is not None
        real, name = torch.from_numpy(array), item.shape.name
        plain, blocks = (
            changes.of_weight(item, bits).tensors()[name] for bits in (WeightBits(4), IN_BLOCKS)
        )
        assert float((blocks - real).square().sum()) < 0.9 * float((plain - real).square().sum())
        assert len(torch.unique(blocks[: IN_BLOCKS.block, 0])) <= 16


def test_data_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, items, changes = searched()
    changes.of_input(items.groups[0], 8)
    changes.of_weight(items.groups[0].linears[0], WeightBits(4)).tensors()
    monkeypatch.setattr(bit_changes, "SegmentRunner", None)
    monkeypatch.setattr(bit_changes, "round_linears", None)
    changes.of_cache(items.caches[0], 8)
    changes.of_weight(items.groups[1].linears[0], WeightBits(4)).tensors()


def test_several_changes_in_one() -> None:
    _, items, changes = searched()
    parts = [changes.of_input(g, 8) for g in items.groups]
    parts += [changes.of_weight(item, WeightBits(8)) for g in items.groups for item in g.linears]
    whole = joined("all", parts)
    assert isinstance(whole, Change)
    assert set(whole.weights) == {shape.name for shape in items.shape.linears}
    assert set(whole.activations) == {name for part in parts for name in part.activations}
