"""round-weights: outputs of linears stay closer than with nearest codes; no weight is missed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import constant_array, name_of
from qnpu.compiler.op_traits import Linear, as_linear
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.scale_grid import odd_part, weight_factor
from qnpu.compiler.target import load_target
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.round_weights import RoundWeights
from qnpu.passes.snap_scales import SnapScales
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.weight_rounding import second_moment
from tests.conftest import Array, normal, run_model
from tests.decoders import LENGTH, canonical, some_tokens

WINDOWS = TokenWindows(np.random.default_rng(7).integers(0, 257, (12, LENGTH)))


def encoded(scheme: str, architecture: str = "llama", block: int = 0) -> Compilation:
    """A tiny decoder with encodings and nearest codes."""
    compilation = Compilation(canonical(architecture), load_target("onnxruntime"))
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, weights="nearest", weight_block=block)
    passes = default_passes(config, WINDOWS)
    wanted = [item for item in passes if item.produces in (Stage.PLANNED, Stage.ENCODED)]
    rotations = [item for item in passes if item.name in ("fold-norm-scale", "fuse-rotation")]
    run_passes([*rotations, *wanted], compilation, after_pass=lambda done: None)
    return compilation


def linears(compilation: Compilation) -> list[Linear]:
    return [linear for node in compilation.graph if (linear := as_linear(node)) is not None]


def quantized_logits(compilation: Compilation, feeds: dict[str, Array]) -> Array:
    other = Compilation(compilation.model.clone())
    other.encodings, other.stage = compilation.encodings, Stage.ENCODED
    InsertQdq().run(other)
    return run_model(other.model, feeds)[0]


@lru_cache(maxsize=4)
def errors(architecture: str) -> tuple[float, float]:
    """Squared error of the logits on fresh tokens, with nearest and with chosen codes."""
    compilation = encoded("w4a16", architecture)
    batches = [some_tokens(compilation.model, seed=seed) for seed in range(100, 108)]
    expected = [run_model(compilation.model, feeds)[0] for feeds in batches]

    def error() -> float:
        found = [quantized_logits(compilation, feeds) for feeds in batches]
        return float(np.mean([(a - b) ** 2 for a, b in zip(found, expected, strict=True)]))

    before = error()
    RoundWeights(WINDOWS).run(compilation)
    return before, error()


@pytest.mark.parametrize(("architecture", "part"), [("llama", 0.99), ("gpt2", 0.9)])
def test_logits_are_closer_to_the_float_model_than_with_nearest_codes(
    architecture: str, part: float
) -> None:
    """Features of a random Llama are hardly correlated; those of a random GPT-2 are."""
    before, after = errors(architecture)
    assert after < part * before


def test_nearest_codes_get_scales_at_eight_bits_too() -> None:
    compilation = encoded("w4a8")
    table = compilation.encodings
    names = {name_of(linear.weight) for linear in linears(compilation)}
    before = {name: table[name].scale for name in names}
    assert RoundWeights(WINDOWS, nearest=True, bits=8).run(compilation) == len(names)
    assert {table[name].spec.bits for name in names} == {4, 8}
    for name in names:
        array = constant_array(compilation.graph.initializers[name])
        assert array is not None
        np.testing.assert_array_equal(table.quantize(name, array), table[name].quantize(array))
        moved = not np.array_equal(table[name].scale, before[name])
        assert moved or table[name].spec.bits == 8  # clipping hardly ever pays there


def test_every_four_bit_linear_gets_codes_and_the_graph_takes_them() -> None:
    compilation = encoded("w4a16")
    table = compilation.encodings
    narrow = {
        name_of(linear.weight): linear
        for linear in linears(compilation)
        if table[name_of(linear.weight)].spec.bits == 4
    }
    assert RoundWeights(WINDOWS).run(compilation) == len(narrow) == 14
    changed = 0
    chosen = {}
    for name, linear in narrow.items():
        array = constant_array(linear.weight)
        assert array is not None
        chosen[name] = table.quantize(name, array).astype(np.int8)
        assert chosen[name].min() >= -7
        assert chosen[name].max() <= 7
        changed += int((chosen[name] != table[name].quantize(array).astype(np.int8)).sum())
    assert changed > 0
    InsertQdq().run(compilation)
    for name, codes in chosen.items():
        stored = constant_array(compilation.graph.initializers[f"{name}_quantized"])
        assert stored is not None
        assert np.array_equal(stored.astype(np.int8), codes)


def test_a_second_run_finds_nothing_to_do() -> None:
    compilation = encoded("w4a16")
    assert RoundWeights(WINDOWS).run(compilation) > 0
    assert RoundWeights(WINDOWS).run(compilation) == 0


def test_weights_of_eight_bits_are_left_to_rounding() -> None:
    compilation = encoded("w8a16")
    assert RoundWeights(WINDOWS).run(compilation) == 0
    assert not any(compilation.encodings.has_codes(name) for name in compilation.encodings)


def test_another_encoding_drops_the_codes_chosen_for_the_old_one() -> None:
    compilation = encoded("w4a16")
    RoundWeights(WINDOWS).run(compilation)
    table = compilation.encodings
    name = next(name for name in table if table.has_codes(name))
    table[name] = table[name]
    assert not table.has_codes(name)


def test_the_same_data_give_the_same_codes() -> None:
    first, second = encoded("w4a16"), encoded("w4a16")
    for compilation in (first, second):
        RoundWeights(WINDOWS).run(compilation)
    for linear in linears(first):
        name, array = name_of(linear.weight), constant_array(linear.weight)
        assert array is not None
        assert first.encodings[name].same_as(second.encodings[name])
        one, other = (c.encodings.quantize(name, array) for c in (first, second))
        assert np.array_equal(one.astype(np.int8), other.astype(np.int8))


def test_with_fewer_tokens_than_features_codes_are_the_nearest() -> None:
    compilation = encoded("w4a16")
    few = TokenWindows(WINDOWS.windows[:2])  # 32 tokens, 64 features
    assert RoundWeights(few).run(compilation) == 14
    for linear in linears(compilation):
        name, array = name_of(linear.weight), constant_array(linear.weight)
        assert array is not None
        nearest = compilation.encodings[name].quantize(array).astype(np.int8)
        assert np.array_equal(compilation.encodings.quantize(name, array).astype(np.int8), nearest)


def test_a_massive_token_does_not_drown_the_others() -> None:
    rows = torch.from_numpy(normal(64, 8))
    massive = rows.clone()
    massive[0] *= 1e4
    most = 16 * float(massive.square().sum(dim=1).median())
    plain = second_moment([rows[1:]])
    found = second_moment([massive])
    extra = (found - plain).trace()
    assert float(extra) == pytest.approx(most, rel=0.01)
    halves = second_moment([rows[1:32], rows[32:]])
    assert torch.allclose(halves, plain, rtol=1e-5)


@pytest.mark.parametrize(("nearest", "bits"), [(False, 4), (True, 8)])
def test_scales_of_few_bits_stay_so(nearest: bool, bits: int) -> None:
    """Codes and scales are chosen, and requantization stays exact in few bits (snap-scales)."""
    compilation = encoded("w4a8")
    assert SnapScales().run(compilation) > 0
    table = compilation.encodings
    before = {
        name_of(linear.weight): table[name_of(linear.weight)] for linear in linears(compilation)
    }
    assert RoundWeights(WINDOWS, nearest=nearest, bits=bits).run(compilation) > 0
    changed = 0
    for linear in linears(compilation):
        name = name_of(linear.weight)
        if not table.has_codes(name):
            continue
        factor = weight_factor(
            table[name_of(linear.activation)], table[name_of(linear.node.outputs[0])]
        )
        assert all(odd_part(float(s) / factor) < 32 for s in table[name].scale)
        changed += not table[name].same_as(before[name])
    assert changed > 5


def test_other_scales_are_not_rounded() -> None:
    compilation = encoded("w4a8")
    RoundWeights(WINDOWS).run(compilation)
    table = compilation.encodings
    chosen = [name_of(x.weight) for x in linears(compilation) if table.has_codes(name_of(x.weight))]
    assert all(odd_part(float(table[name].scale[0])) > 1 << 10 for name in chosen)


@pytest.mark.parametrize("nearest", [False, True])
def test_blocks_get_whole_scales_and_codes_within_them(nearest: bool) -> None:
    compilation = encoded("w4a16", block=16)
    table, moved = compilation.encodings, 0
    assert RoundWeights(WINDOWS, nearest=nearest).run(compilation) == 14
    for linear in linears(compilation):
        encoding, array = table[name_of(linear.weight)], constant_array(linear.weight)
        if encoding.spec.bits > 4:
            continue
        assert array is not None
        assert encoding.block_scales is not None
        assert encoding.block_scales.shape == (array.shape[0] // 16, array.shape[1])
        codes = table.quantize(name_of(linear.weight), array).astype(np.int8)
        assert int(np.abs(encoding.integers(codes)).max()) <= 105
        moved += int((codes != encoding.quantize(array).astype(np.int8)).sum())
    assert (moved == 0) == nearest


def test_blocks_are_nearer_to_the_weights_than_channels() -> None:
    """On random weights, whose sizes hardly differ along a channel."""
    found = {}
    for block in (0, 16):
        compilation = encoded("w4a16", block=block)
        errors_of = []
        for linear in linears(compilation):
            encoding = compilation.encodings[name_of(linear.weight)]
            real = constant_array(linear.weight)
            assert real is not None
            if encoding.spec.bits == 4:
                back = encoding.dequantize(encoding.quantize(real))
                errors_of.append(float(np.square(back - real).mean() / np.square(real).mean()))
        assert len(errors_of) == 14
        found[block] = float(np.mean(errors_of))
    print(f"squared error by squared weight: {found}")
    assert found[16] < found[0]
