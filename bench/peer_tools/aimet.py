"""AIMET-ONNX: SpinQuant R1 and R2 where they apply, sequential MSE, min-max, Q/DQ export.

    python aimet.py model.onnx tokens.npz out --weights 4 --activations 16

Weights are per channel and symmetric, quantizers are placed as for Hexagon v75, and lm_head has
8-bit weights, which is what AIMET's own language model recipes do at 4 bits. A rotation that AIMET
refuses is left out, and its message is noted.
"""

from __future__ import annotations

from pathlib import Path

import aimet_onnx
import common
import onnx
from aimet_onnx.common import quantsim_config
from aimet_onnx.llm_topology import LlmTopology, analyze_llm_topology
from aimet_onnx.prepare_passes.fix_node_names_in_dynamo_exported_onnx import fix_node_names_pass
from aimet_onnx.quantsim import set_param_type
from aimet_onnx.spinquant import apply_spinquant
from aimet_onnx.utils import duplicate_shared_initializers

_CONFIG = Path(quantsim_config.__file__).with_name(
    "htp_quantsim_config_v75_per_channel_linear.json"
)
_TYPES = {4: aimet_onnx.int4, 8: aimet_onnx.int8, 16: aimet_onnx.int16}
_CANDIDATES = 20  # of each scale, AIMET's own number
_SEARCHED_WINDOWS = 6  # on two cores the search takes half an hour with 6, two hours with 24


def main() -> None:
    given = common.arguments(__doc__.splitlines()[0])
    feeds = common.feeds(given.tokens)
    model = fix_node_names_pass(common.float_model(given.model))
    notes = _rotate(model)
    duplicate_shared_initializers(model.graph)
    simulation = aimet_onnx.QuantizationSimModel(
        model,
        param_type=_TYPES[given.weights],
        activation_type=_TYPES[given.activations],
        quant_scheme="min_max",
        config_file=str(_CONFIG),
    )
    _widen_head(simulation)
    aimet_onnx.apply_seq_mse(simulation, feeds[:_SEARCHED_WINDOWS], num_candidates=_CANDIDATES)
    simulation.compute_encodings(feeds)
    common.save(simulation.to_onnx_qdq(prequantize_constants=True), given.out / common.MODEL)
    searched = min(_SEARCHED_WINDOWS, len(feeds))
    common.note(given.out, [*notes, f"per channel, SeqMSE on {searched} windows, min-max"])


def _topology(model: onnx.ModelProto) -> LlmTopology:
    found = analyze_llm_topology(model, model_type="llama")  # by structure, not by names
    if found.head_dim is None:  # AIMET reads it off caches, which a prefill graph has none of
        found.head_dim = _head_dim(model, found.blocks[0].attn_v_matmul)
    return found


def _head_dim(model: onnx.ModelProto, products: list[str]) -> int | None:
    """Width of what attention makes of values, by the names of those products."""
    outputs = {name for node in model.graph.node if node.name in products for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = [value.type.tensor_type.shape.dim for value in inferred if value.name in outputs]
    return shapes[0][-1].dim_value if shapes else None


def _rotate(model: onnx.ModelProto) -> list[str]:
    """Fuses the rotations that AIMET can; returns what became of each."""
    notes = []
    for name, wanted in (("R1", (True, False)), ("R2", (False, True))):
        try:
            r1, r2 = wanted
            apply_spinquant(model, enable_r1=r1, enable_r2=r2, topology=_topology(model))
            notes.append(f"SpinQuant {name}")
        except Exception as error:  # whatever it is, it is AIMET's answer
            notes.append(f"no SpinQuant {name}: {error}")
    return notes


def _widen_head(simulation: aimet_onnx.QuantizationSimModel) -> None:
    """The weights of the last product are 8-bit codes whatever those of the others are."""
    graph = simulation.model.model.graph
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    set_param_type(simulation, aimet_onnx.int8, nodes_to_include={products[-1].name})


if __name__ == "__main__":
    main()
