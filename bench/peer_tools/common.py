"""What the scripts of all tools share. They run in the tools' environments, without qnpu."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

MODEL = "model.onnx"
NOTES = "notes.json"

_MASKED = -50.0
"""Of a softmax's input: as good as minus infinity, and no range is spoilt by it."""

_MINUS_INFINITY = -1e4


def arguments(description: str) -> argparse.Namespace:
    """Reads the arguments that all scripts take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="float ONNX file")
    parser.add_argument("tokens", type=Path, help="calibration inputs, .npz, a window a row")
    parser.add_argument("out", type=Path, help="folder to write model.onnx and notes.json to")
    parser.add_argument("--weights", type=int, default=8, help="bits")
    parser.add_argument("--activations", type=int, default=8, help="bits")
    return parser.parse_args()


def feeds(tokens: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Calibration inputs, a dictionary for each window.

    Args:
        tokens: .npz of arrays by input name, windows first.
    """
    arrays = dict(np.load(tokens))
    count = min(len(array) for array in arrays.values())
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]


def float_model(path: Path) -> onnx.ModelProto:
    """A float model, its mask's minus infinities made −50.

    With them the range of a masked softmax's input would be that of float32, and min-max
    calibration would leave no step for the scores themselves.
    """
    model = onnx.load(path)
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type in ("Constant", "ConstantOfShape"):
            tensors += [item.t for item in node.attribute if item.name == "value"]
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if (array < _MINUS_INFINITY).any():
                finite = np.where(array < _MINUS_INFINITY, np.float32(_MASKED), array)
                tensor.CopyFrom(numpy_helper.from_array(finite, tensor.name))
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model, its weights beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append
    onnx.save_model(model, path, save_as_external_data=True, location=data.name)


def note(out: Path, lines: Sequence[str]) -> None:
    """Keeps what the table has to say of how a model was made."""
    out.mkdir(parents=True, exist_ok=True)
    out.joinpath(NOTES).write_text(json.dumps(list(lines), indent=1) + "\n", "utf-8")
