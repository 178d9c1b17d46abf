"""Loads the encodings files of a compile with aimet-onnx, and compares what it makes of them.

AIMET has its own requirements, so it gets an environment of its own:

python3.11 -m venv aimet && aimet/bin/pip install aimet-onnx==2.42.0
qnpu-compile smollm2-135m --out out --emit float,encodings-0.6.1,encodings-1.0.0,encodings-2.0.0
aimet/bin/python bench/aimet_encodings.py out

For each version of the file:

* translated: AIMET makes a Q/DQ graph of the float graph and the file, which runs node by node
  beside model.qdq.onnx on the same random tokens. Equal outputs mean that AIMET reads scales,
  zero points, axes and weights as we do. A name that is not in the graph is an error there.
* simulated: ``QuantizationSimModel`` places quantizers by its own rules, then loads the file. Those
  without an encoding are gaps, which a vendor's tool would fill in silently. Encodings where it
  places none (outputs of layout operators, requantize points) are added for versions 0.6.1 and
  1.0.0; it cannot add them for 2.0.0, so they are added from 1.0.0 first. Then the same file must
  load with ``strict=True``, which compares types, symmetry and granularity of every quantizer.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of qnpu-compile, with the four files of --emit")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument("--config", default="htp_v75", help="AIMET's name of a target")
    parser.add_argument("--no-simulation", action="store_true", help="only translate")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    files = {version: arguments.folder / f"model.{version}.encodings" for version in VERSIONS}
    expected = run(arguments.folder / "model.qdq.onnx", arguments.seed)
    same = [
        translate(arguments.folder, version, file, expected, arguments.seed)
        for version, file in files.items()
    ]
    loaded = arguments.no_simulation or simulate(arguments.folder, files, arguments.config)
    sys.exit(not (all(same) and loaded))


def run(model: Path | onnx.ModelProto, seed: int) -> list[np.ndarray[Any, Any]]:
    """All outputs, node by node as written, on random tokens or normal numbers."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    feeds = {
        value.name: random.integers(0, 256, value.shape)
        if "int" in value.type
        else random.normal(size=value.shape).astype(np.float32)
        for value in session.get_inputs()
    }
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def translate(
    folder: Path, version: str, file: Path, expected: list[np.ndarray[Any, Any]], seed: int
) -> bool:
    """Whether AIMET's Q/DQ graph gives the outputs of ours, bit for bit."""
    from aimet_onnx.quantsim import encodings_to_onnx_qdq  # noqa: PLC0415

    started = time.perf_counter()
    graph = encodings_to_onnx_qdq(
        onnx.load(folder / "model.float.onnx"), str(file), force_activation_as=None
    )
    pairs = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    actual = run(graph, seed)
    error = max(float(np.abs(a - b).max()) for a, b in zip(actual, expected, strict=True))
    print(
        f"{version} translated: {len(names(file))} encodings, {pairs} Q/DQ pairs, "
        f"max |difference| of outputs {error:g}, {time.perf_counter() - started:.0f} s"
    )
    return error == 0


def simulate(folder: Path, files: dict[str, Path], config: str) -> bool:
    """Whether every quantizer of AIMET's is given an encoding, and none is out of place."""
    from aimet_onnx.quantsim import (  # noqa: PLC0415
        QuantizationSimModel,
        load_encodings_to_sim,
    )

    simulation = QuantizationSimModel(onnx.load(folder / "model.float.onnx"), config_file=config)
    quantizers = set(simulation.qc_quantize_op_dict)
    ours = names(files["1.0.0"])
    print(
        f"simulated: AIMET places {len(quantizers)} quantizers, {len(quantizers & ours)} of them "
        f"have an encoding; {len(ours - quantizers)} further encodings"
    )
    for name in sorted(quantizers - ours)[:10]:
        print(f"  gap: {name}")
    differ = load_encodings_to_sim(simulation, str(files["1.0.0"]), strict=False)
    print(f"  {len(differ)} quantizers, those added included, change their settings to the file's")
    done = quantizers <= ours
    for version, file in files.items():
        for name in ours:  # AIMET turns those of int32 biases off once they are loaded
            simulation.qc_quantize_op_dict[name].enabled = True
        try:
            load_encodings_to_sim(simulation, str(file), strict=True)
            print(f"  {version} strict: all {len(names(file))} match")
        except (AssertionError, RuntimeError) as error:
            lines = str(error).splitlines()
            print(f"  {version} strict: {lines[0][:300]}", *lines[1:8], sep="\n    ")
            done = False
    return done


def names(file: Path) -> set[str]:
    """Tensors that an encodings file names."""
    document = json.loads(file.read_text("utf-8"))
    sections = ("encodings", "activation_encodings", "param_encodings")
    entries = [item for section in sections for item in document.get(section, [])]
    return {item if isinstance(item, str) else item["name"] for item in entries}


if __name__ == "__main__":
    main()
