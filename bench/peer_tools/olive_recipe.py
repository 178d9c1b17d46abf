"""A recipe for Olive: finite mask, 4-bit blocks where asked for, static Q/DQ.

    python olive_recipe.py model.onnx tokens.npz out --weights 4 --activations 16

It is that of Olive's QNN examples for language models, less the steps that start from torch: there,
too, weights of 4 bits are rounded before activations are calibrated.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import onnx
from olive import run
from olive.data.registry import Registry

_TOKENS = "PEER_TOKENS"
_BLOCK = 32  # inputs that share a scale; the least that Olive takes is 16, its examples have 32


@Registry.register_dataset("peer_tokens")
def _dataset(**_: Any) -> list[tuple[dict[str, Any], int]]:
    """Windows without the first axis, which Olive's loader adds, and labels that nobody reads."""
    windows = common.feeds(Path(os.environ[_TOKENS]))
    return [({name: array[0] for name, array in feed.items()}, 0) for feed in windows]


def main() -> None:
    given = common.arguments(__doc__.splitlines()[0])
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ[_TOKENS] = str(given.tokens)
    with TemporaryDirectory(dir=given.out) as folder:
        source, written = Path(folder, "float.onnx"), Path(folder, "out")
        model = common.float_model(given.model)
        common.save(model, source)
        run(
            {
                "input_model": {"type": "OnnxModel", "model_path": str(source)},
                "data_configs": [
                    {
                        "name": "tokens",
                        "load_dataset_config": {"type": "peer_tokens"},
                        "pre_process_data_config": {"type": "skip_pre_process"},
                        "post_process_data_config": {"type": "skip_post_process"},
                    }
                ],
                "passes": _passes(given.weights, given.activations, _ends(model)),
                "output_dir": str(written),
                "cache_dir": str(Path(folder, "cache")),
                "evaluate_input_model": False,
            }
        )
        (found,) = written.rglob("*.onnx")
        common.save(onnx.load(found), given.out / common.MODEL)
    blocks = f"4-bit blocks of {_BLOCK} rounded to nearest, " if given.weights == 4 else ""
    common.note(given.out, [f"{blocks}per channel, min-max"])


def _ends(model: onnx.ModelProto) -> list[str]:
    """The embedding and the last product, which have 8-bit weights in the other tools' rows."""
    nodes = model.graph.node
    products = [node.name for node in nodes if node.op_type == "MatMul"]
    return [*products[-1:], *(node.name for node in nodes if node.op_type == "Gather")]


def _passes(weights: int, activations: int, ends: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if weights == 4:
        found["round"] = {
            "type": "OnnxBlockWiseRtnQuantization",
            "bits": 4,
            "block_size": _BLOCK,
            "nodes_to_exclude": ends,
        }
        found["spell_out"] = {"type": "MatMulNBitsToQDQ", "use_int4": True, "add_zero_point": True}
    found["calibrate"] = {
        "type": "OnnxStaticQuantization",
        "data_config": "tokens",
        "precision": "int8",
        "activation_type": f"uint{activations}",
        "calibrate_method": "MinMax",
        "per_channel": True,
        "quant_preprocess": True,
    }
    return found


if __name__ == "__main__":
    main()
