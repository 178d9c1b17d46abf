"""bit_losses: every measure against the same thing computed the long way, on tiny decoders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.quant_types import Encoding, PerChannel, QuantSpec
from qnpu.runtime_check.bit_losses import Change, LossMeter, Measure
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.torch_executor import TorchExecutor, feed_tensors
from tests.decoders import LENGTH, canonical

WINDOWS = TokenWindows(np.random.default_rng(3).integers(0, 257, (2, LENGTH)))
ARCHITECTURES = ["llama", "gemma3", "gpt2"]


@lru_cache(maxsize=4)
def model_of(architecture: str) -> ir.Model:
    return canonical(architecture)


def batches(model: ir.Model) -> list[dict[str, np.ndarray]]:
    return [dict(feeds) for feeds in WINDOWS.feeds(model.graph.inputs)]


def values(model: ir.Model, wanted: list[str], **change: object) -> list[dict[str, Tensor]]:
    """Of the whole graph at once, for each batch."""
    executor = TorchExecutor(model.graph)
    with torch.no_grad():
        return [
            executor.run(feed_tensors(feeds), wanted, **change)  # type: ignore[arg-type]
            for feeds in batches(model)
        ]


@lru_cache(maxsize=8)
def changes_of(architecture: str, bits: int) -> list[Change]:
    """Input and weight of every linear, each alone."""
    model = model_of(architecture)
    linears = [linear for node in model.graph if (linear := as_linear(node)) is not None]
    inputs = list(dict.fromkeys(name_of(linear.activation) for linear in linears))
    found = []
    seen = values(model, inputs)
    for name in inputs:
        low = min(float(item[name].min()) for item in seen)
        high = max(float(item[name].max()) for item in seen)
        encoding = Encoding.from_range(QuantSpec(bits, False, False), low, high)
        found.append(Change(f"input {name}", {name: encoding}))
    for linear in linears:
        real = constant_array(linear.weight)
        assert real is not None
        axis = linear.channel_axis
        spec = QuantSpec(bits, True, True, PerChannel(axis))
        reach = np.abs(real).max(axis=tuple(i for i in range(real.ndim) if i != axis))
        encoding = Encoding.from_range(spec, -reach, reach)
        tensor = torch.from_numpy(np.asarray(encoding.dequantize(encoding.quantize(real))))
        name = name_of(linear.weight)
        found.append(Change(f"weight {name}", weights={name: tensor.clone}))
    return list({change.name: change for change in found}.values())


@lru_cache(maxsize=64)
def losses(
    architecture: str, bits: int, measure: Measure, stride: int = 1
) -> tuple[list[Change], Mapping[str, float]]:
    model = model_of(architecture)
    changes = changes_of(architecture, bits)
    found = dict(LossMeter(model, batches(model), stride=stride).each(changes, measure))
    assert set(found) == {change.name for change in changes}
    return changes, found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_of_the_logits(architecture: str) -> None:
    model = model_of(architecture)
    changes, found = losses(architecture, 4, Measure.KL)
    exact = [torch.log_softmax(item["logits"][0], -1) for item in values(model, ["logits"])]
    for change in changes[::4]:
        made = values(model, ["logits"], weights=change.tensors(), transform=change.transform)
        other = [torch.log_softmax(item["logits"][0], -1) for item in made]
        divergences = [
            float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(exact, other, strict=True)
        ]
        assert found[change.name] == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-7)
    assert max(found.values()) > 1e-4


def test_every_other_position() -> None:
    """The last one of each pair; a head that is a norm and a MatMul runs on those alone."""
    model = model_of("llama")
    changes, found = losses("llama", 4, Measure.KL, stride=2)
    exact = [torch.log_softmax(item["logits"][0, 1::2], -1) for item in values(model, ["logits"])]
    for change in changes[::5]:
        made = values(model, ["logits"], weights=change.tensors(), transform=change.transform)
        other = [torch.log_softmax(item["logits"][0, 1::2], -1) for item in made]
        divergences = [
            float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(exact, other, strict=True)
        ]
        assert found[change.name] == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("measure", list(Measure))
def test_more_bits_lose_less(measure: Measure) -> None:
    _, few = losses("llama", 4, measure)
    _, many = losses("llama", 8, measure)
    assert all(loss >= 0 for loss in (*few.values(), *many.values()))
    assert sum(many.values()) < sum(few.values()) / 6
    better = sum(many[name] < few[name] for name in few)
    assert better > 0.9 * len(few)


def test_what_a_tensor_loses_by_itself() -> None:
    model = model_of("llama")
    changes, noise = losses("llama", 4, Measure.NOISE)
    _, ratio = losses("llama", 4, Measure.RATIO)
    for change in changes:
        pairs = []
        if change.activations:
            (name,) = change.activations
            for item in values(model, [name]):
                pairs.append((item[name], change.transform(name, item[name])))
        else:
            (name,) = change.weights
            real = constant_array(model.graph.initializers[name])
            assert real is not None
            pairs.append((torch.from_numpy(real), change.tensors()[name]))
        noises = [float((b - a).square().sum() / a.square().sum()) for a, b in pairs]
        ratios = [float(((b - a).abs() / (a.abs() + 1e-8)).mean()) for a, b in pairs]
        assert noise[change.name] == pytest.approx(np.mean(noises), rel=1e-4)
        assert ratio[change.name] == pytest.approx(np.mean(ratios), rel=1e-3)


def test_one_backward_pass_foretells_the_divergence() -> None:
    """To second order KL is half of the Fisher information's quadratic form; this takes its
    diagonal, by the tokens that came: right in size, and mostly in order."""
    _, exact = losses("llama", 8, Measure.KL)
    _, foretold = losses("llama", 8, Measure.FISHER)
    names = [name for name, loss in exact.items() if loss > 1e-8]
    assert len(names) > 8
    logs = np.log([[exact[name], foretold[name]] for name in names])
    assert np.abs(logs[:, 0] - logs[:, 1]).mean() < np.log(8)
    assert np.corrcoef(logs.T)[0, 1] > 0.6


def test_a_change_of_nothing() -> None:
    model = model_of("llama")
    change = Change("lost", weights={"no such weight": lambda: torch.zeros(1)})
    with pytest.raises(ValueError, match="lost"):
        list(LossMeter(model, batches(model)).each([change], Measure.KL))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_changes_at_once(architecture: str) -> None:
    """As the whole graph gives it, run at once with all of them."""
    model = model_of(architecture)
    changes, _ = losses(architecture, 4, Measure.KL)
    both = Change(
        "both",
        {name: item for change in changes[::2] for name, item in change.activations.items()},
        {name: item for change in changes[::2] for name, item in change.weights.items()},
    )
    assert both.weights
    found = LossMeter(model, batches(model), stride=2).together(both)
    divergences, nlls = [], []
    exact = values(model, ["logits"])
    made = values(model, ["logits"], weights=both.tensors(), transform=both.transform)
    for before, after, feeds in zip(exact, made, batches(model), strict=True):
        p, q = (torch.log_softmax(item["logits"][0], -1) for item in (before, after))
        divergences.append(float((p.exp() * (p - q)).sum(-1)[1::2].mean()))
        ids = torch.from_numpy(feeds["input_ids"][0, 1:]).long()
        nlls.append(float(-q[:-1].gather(1, ids[:, None]).mean()))
    assert found.divergence == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.nll == pytest.approx(np.mean(nlls), rel=1e-5)
    assert found.divergence > 1e-5


def test_nothing_changed_loses_nothing() -> None:
    model = model_of("llama")
    found = LossMeter(model, batches(model)).together(Change("nothing"))
    assert found.divergence == pytest.approx(0, abs=1e-9)
    assert found.nll > 1
