"""A decoder as the model builder of onnxruntime-genai writes it for ``-p fp32 -e cpu``.

Operators, their order, attributes and names are those of versions 0.8 to 0.14 for a Llama; weights
are seeded noise. The builder itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qnpu.runtime_check.session import Feeds
from tests.conftest import Array, normal

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 4, 2, 16, 128
VOCABULARY, POSITIONS, LAYERS = 257, 64, 2
EPSILON = 1e-6

_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
_ONE, _AXIS = "/model/constants/INT64/[1]", "/model/constants/INT64/1"
_LAST, _TOTAL = f"{_MASK}/Sub/Cast/output_0", f"{_MASK}/Gather/Cast/output_0"


def genai_decoder(*, opset: int = 21, packed: bool = True, **attention: float) -> ir.Model:
    """Two layers, 64 wide, 4 heads of 16, 2 of them for keys; dynamic batch, length and past.

    Args:
        opset: 21 since version 0.9 of the builder, 14 before.
        packed: one linear for queries, keys and values, else three.
        attention: further attributes of GroupQueryAttention, or others than usual.
    """
    writer = _Writer(packed, attention)
    writer.decoder()
    past: list[str | int] = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_DIM]
    present: list[str | int] = ["batch_size", KV_HEADS, "total_sequence_length", HEAD_DIM]
    pairs = [(layer, kind) for layer in range(LAYERS) for kind in ("key", "value")]
    graph = helper.make_graph(
        writer.nodes,
        "main_graph",
        [
            _described("input_ids", ["batch_size", "sequence_length"], TensorProto.INT64),
            _described(
                "attention_mask", ["batch_size", "total_sequence_length"], TensorProto.INT64
            ),
            *(_described(f"past_key_values.{layer}.{kind}", past) for layer, kind in pairs),
        ],
        [
            _described("logits", ["batch_size", "sequence_length", VOCABULARY]),
            *(_described(f"present.{layer}.{kind}", present) for layer, kind in pairs),
        ],
        [numpy_helper.from_array(array, name) for name, array in writer.weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def genai_feeds(tokens: int, past: int = 0, *, seed: int = 0) -> Feeds:
    """Random ids, a mask of ones, and a random past."""
    feeds: Feeds = {
        "input_ids": np.random.default_rng(seed).integers(0, VOCABULARY, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
    }
    for layer in range(LAYERS):
        for index, kind in enumerate(("key", "value")):
            shape = 1, KV_HEADS, past, HEAD_DIM
            noise = normal(*shape, seed=50 * seed + 2 * layer + index)
            feeds[f"past_key_values.{layer}.{kind}"] = noise
    return feeds


def rotary_tables() -> tuple[Array, Array]:
    """Cosines and sines of shape (positions, head_dim / 2)."""
    frequencies = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _described(
    name: str, shape: Sequence[str | int], dtype: int = TensorProto.FLOAT
) -> Any:  # onnx.ValueInfoProto
    return helper.make_tensor_value_info(name, dtype, shape)


class _Writer:
    """Nodes in the builder's order."""

    def __init__(self, packed: bool, attention: dict[str, float]) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, Array] = {}
        self._packed = packed
        self._attention: dict[str, float] = {
            "num_heads": HEADS,
            "kv_num_heads": KV_HEADS,
            "scale": HEAD_DIM**-0.5,
            "local_window_size": -1,
            "softcap": 0.0,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        } | attention

    def decoder(self) -> None:
        self._lengths()
        self._weight("model.embed_tokens.weight", VOCABULARY, HIDDEN)
        self.weights["cos_cache"], self.weights["sin_cache"] = rotary_tables()
        inputs = ["model.embed_tokens.weight", "input_ids"]
        stream = self._node("Gather", "/model/embed_tokens/Gather", inputs)[0]
        addend = ""
        for layer in range(LAYERS):
            place = f"/model/layers.{layer}"
            normed, stream = self._norm(layer, "input_layernorm", stream, addend)
            heads = self._heads(layer, normed)
            addend = self._linear(f"{place}/attn/o_proj/MatMul", heads, HIDDEN, HIDDEN)
            normed, stream = self._norm(layer, "post_attention_layernorm", stream, addend)
            addend = self._mlp(f"{place}/mlp", normed)
        normed, _ = self._norm(LAYERS, "final_norm_layernorm", stream, addend, last=True)
        self._linear("/lm_head/MatMul", normed, HIDDEN, VOCABULARY, "logits")

    def _lengths(self) -> None:
        """``seqlens_k`` and ``total_sequence_length``, from the attention mask."""
        for name, number in ((_ONE, np.array([1])), (_AXIS, np.array(1))):
            node = name.replace("constants", "constant_nodes")
            self._node("Constant", node, [], [name], value=numpy_helper.from_array(number))
        total = self._node("ReduceSum", f"{_MASK}/ReduceSum", ["attention_mask", _ONE], keepdims=1)
        last = self._node("Sub", f"{_MASK}/Sub", [total[0], _ONE])
        self._node("Cast", f"{_MASK}/Sub/Cast", last, to=TensorProto.INT32)
        shape = self._node("Shape", f"{_MASK}/Shape", ["attention_mask"])
        width = self._node("Gather", f"{_MASK}/Gather", [shape[0], _AXIS], axis=0)
        self._node("Cast", f"{_MASK}/Gather/Cast", width, to=TensorProto.INT32)

    def _norm(
        self, layer: int, name: str, stream: str, addend: str, *, last: bool = False
    ) -> tuple[str, str]:
        """The normalized stream, and the stream with the addend."""
        place, gain = f"/model/layers.{layer}/{name}", f"model.layers.{layer}.{name}.weight"
        self.weights[gain] = 1 + normal(HIDDEN, seed=len(self.weights), scale=0.2)
        if not addend:
            normed = self._node(
                "SimplifiedLayerNormalization",
                f"{place}/LayerNorm",
                [stream, gain],
                [f"{place}/output_0"],
                epsilon=EPSILON,
                axis=-1,
                stash_type=1,
            )
            return normed[0], stream
        outputs = [f"{place}/output_0", *([] if last else ["", "", f"{place}/output_3"])]
        self._node(
            "SkipSimplifiedLayerNormalization",
            f"{place}/SkipLayerNorm",
            [stream, addend, gain],
            outputs,
            domain="com.microsoft",
            epsilon=EPSILON,
        )
        return outputs[0], outputs[-1]

    def _heads(self, layer: int, normed: str) -> str:
        place, narrow = f"/model/layers.{layer}/attn", KV_HEADS * HEAD_DIM
        if self._packed:
            width = HIDDEN + 2 * narrow
            operands = [self._linear(f"{place}/qkv_proj/MatMul", normed, HIDDEN, width), "", ""]
        else:
            widths = {"q": HIDDEN, "k": narrow, "v": narrow}
            operands = [
                self._linear(f"{place}/{letter}_proj/MatMul", normed, HIDDEN, width)
                for letter, width in widths.items()
            ]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        name = f"{place}/GroupQueryAttention"
        return self._node(
            "GroupQueryAttention",
            name,
            [*operands, *past, _LAST, _TOTAL, "cos_cache", "sin_cache", "", ""],
            [f"{name}/output_0", *present],
            domain="com.microsoft",
            **self._attention,
        )[0]

    def _mlp(self, place: str, normed: str) -> str:
        gate = self._linear(f"{place}/gate_proj/MatMul", normed, HIDDEN, MLP)
        up = self._linear(f"{place}/up_proj/MatMul", normed, HIDDEN, MLP)
        opened = self._node("Sigmoid", f"{place}/act_fn/Sigmoid", [gate])[0]
        activated = self._node("Mul", f"{place}/act_fn/Mul", [gate, opened])[0]
        product = self._node("Mul", f"{place}/Mul", [activated, up])[0]
        return self._linear(f"{place}/down_proj/MatMul", product, MLP, HIDDEN)

    def _linear(self, name: str, source: str, fan_in: int, width: int, output: str = "") -> str:
        weight = name.lstrip("/").replace("/", ".") + ".weight"
        self._weight(weight, fan_in, width)
        return self._node("MatMul", name, [source, weight], [output] if output else None)[0]

    def _weight(self, name: str, *shape: int) -> None:
        spread = 3.0 if "lm_head" in name else 1.0
        noise = normal(*shape, seed=len(self.weights), scale=spread * shape[0] ** -0.5)
        self.weights[name] = noise * 8 if "embed" in name else noise

    def _node(
        self,
        op_type: str,
        name: str,
        inputs: list[str],
        outputs: list[str] | None = None,
        **options: Any,
    ) -> list[str]:
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **options))
        return outputs
