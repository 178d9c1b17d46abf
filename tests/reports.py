"""Reports as a compile writes them, made of the same types, of any number of layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, TensorBits
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import Diagnostic
from qnpu.compiler.layer_rows import BEFORE_LAYERS
from qnpu.compiler.modelled_cost import ModelledCost
from qnpu.compiler.pass_base import LearningPoint, Legalized
from qnpu.compiler.rules import IntegerDiffers, LearningDiverged, RotatedCache
from qnpu.runtime_check.compare import TensorComparison
from qnpu.runtime_check.histograms import Distribution, TensorHistogram
from qnpu.runtime_check.parity import KindSummary
from qnpu.runtime_check.perplexity import Perplexity

ROLES = ("input of q", "q", "k", "v", "input of o", "o", "input of gate", "gate", "up",
         "input of down", "down", "keys", "values")  # fmt: skip
TENSORS_PER_LAYER = 30
TARGET = "qnn-htp-v75"
FLOAT, QUANTIZED, INTEGER = 20.0, 21.0, 21.5
KINDS = ("add", "linear", "norm", "softmax")
LSB_COUNTS = (1000, 7, 2, 0, 0, 0)

Report = dict[str, Any]


def report(layers: int = 2) -> Report:
    """All that a report may hold, but for what only a quantized input has."""
    return {
        "format": "qnpu-report",
        "version": 1,
        "command": ["qnpu-compile", "model.onnx", "--scheme", "auto"],
        "config": CompileConfig(scheme="auto", budget="latency=300us", target=TARGET).to_json(),
        "input": {"name": "model", "sha256": "ab" * 32},
        "calibration": "help topics, 4 x 32 tokens",
        "evaluation": "help topics, 4 x 32 tokens, another part",
        "seed": 0,
        "perplexity": {
            name: asdict(Perplexity(value, (np.log(value),), 1, 31))
            for name, value in (("float", FLOAT), ("qdq", QUANTIZED), ("integer", INTEGER))
        },
        "source_error": 7.2e-7,
        "prefix": None,
        "sensitivities": {f"mul_{layer}": 0.01 * (layer + 1) for layer in range(layers)},
        "cost": ModelledCost(TARGET, "512/64", 2.5e-4, 2e-5, 1.5e6).to_json(),
        "search": search(layers).to_json(),
        "learning": [asdict(point) for point in learning(layers)],
        "promoted": [f"mul_{layers - 1}"],
        "tensors": tensors(layers),
        "histograms": [histogram(layer, role).to_json() for layer, role in ((0, "q"), (1, "down"))],
        "parity": [parity(kind) for kind in KINDS],
        "versions": {"qnpu": "0.1.0", "numpy": "2.4.6"},
        "cpu_flags": ["avx2"],
        "rewrites": {"canonicalize": 3, "insert-qdq": 120},
        "legalized": [asdict(Legalized(f"node_{i}", "MatMul", "one-type")) for i in range(3)],
        "diagnostics": [item.to_json() for item in diagnostics()],
        "outputs": {
            "model.int.onnx": {"bytes": 2_351_000, "sha256": "12" * 32},
            "model.qdq.onnx": {"bytes": 181_600, "sha256": "34" * 32},
        },
    }


def legalized_report() -> Report:
    """As of a file that was quantized before."""
    whole = report()
    keys = ("format", "version", "command", "config", "input", "versions", "cpu_flags", "rewrites",
            "legalized", "diagnostics", "outputs")  # fmt: skip
    return {key: whole[key] for key in keys} | {
        "compared": "random numbers, seed 0",
        "verdicts": {"before": {"int": 3, "float": 2}, "after": {"int": 5}},
        "changes": [{"name": "y", "max_abs_error": 0.01, "max_lsb": None, "mean_lsb": None}],
        "parity": [],
    }


def search(layers: int) -> BitSearch:
    front = tuple(plan(f"front {i}", 2e-4 + i * 1e-5, 1.2 - 0.01 * i) for i in range(6))
    others = (plan("w8a8", 4e-4, 1.01), plan("w4a4", 2e-4, np.inf))
    chosen = plan("chosen", 2.5e-4, 1.1)
    return BitSearch(
        target=TARGET,
        workload="512/64",
        budget="latency=300us",
        sensitivity="kl",
        float_perplexity=FLOAT,
        gap=0.001,
        tensors=bits(layers),
        chosen=chosen,
        trials=(chosen,),
        front=front,
        others=others,
    )


def plan(label: str, seconds: float, ratio: float) -> MeasuredPlan:
    return MeasuredPlan(label, seconds, 1.5e6, 0.1, 0.12, ratio * FLOAT)


def bits(layers: int) -> tuple[TensorBits, ...]:
    rows = [
        TensorBits(f"{layer}.{role}", layer, role, (4, 8, 16)[(layer + place) % 3], loss)
        for layer in range(layers)
        for place, role in enumerate(ROLES)
        for loss in [{"4": 10.0 ** -(place % 6), "8": 1e-6, "16": 0.0}]
    ]
    head = [("input of head", 8), ("head", 4)]
    return (
        *rows,
        *(TensorBits(role, layers, role, width, {"4": 0.1, "8": 0.01}) for role, width in head),
    )


def tensors(layers: int) -> list[Report]:
    """The first is exact; the lowest SQNR of all is in the last layer."""
    rows = [
        asdict(TensorComparison(f"t{layer}_{i}", 60.0 - layer - i, 0.999, 0.1)) | {"layer": layer}
        for layer in range(BEFORE_LAYERS, layers + 1)
        for i in range(TENSORS_PER_LAYER)
    ]
    rows[0]["sqnr_db"] = np.inf
    return rows


def histogram(layer: int, role: str) -> TensorHistogram:
    ends = [2.0**k for k in range(-6, 4)]
    edges = (*(-end for end in reversed(ends)), *ends)
    places = np.arange(len(edges) - 1)
    before = Distribution(tuple((places * 7 % 11).tolist()), -8.0, 7.5)
    after = Distribution(tuple((places * 5 % 13).tolist()), -4.0, 4.5)
    return TensorHistogram(
        f"mul_{layer}", layer, role, edges, before, after, 8, -4.1, 4.4, 8.5 / 255
    )


def learning(layers: int) -> list[LearningPoint]:
    blocks = [
        LearningPoint(f"block {block}", step, loss / (block + 1))
        for block in range(1, layers + 1)
        for step, loss in ((0, 0.5), (5, 0.3), (10, 0.3 if block > 1 else 0.4))
    ]
    return [*blocks, *(LearningPoint("model", 2 * i, 1.0 / (i + 1)) for i in range(5))]


def parity(kind: str) -> Report:
    total, off = sum(LSB_COUNTS), sum(LSB_COUNTS[1:])
    summary = KindSummary(
        kind=kind,
        tensors=4,
        elements=total,
        equal=1 - off / total,
        max_lsb=2,
        max_lsb_rounded=3,
        ties=5,
        passed=True,
        histogram=LSB_COUNTS,
    )
    return asdict(summary)


def diagnostics() -> list[Diagnostic]:
    return [
        *(RotatedCache(f"values.{i}").at(value=f"values.{i}") for i in range(25)),
        LearningDiverged("model", 1.0, 0.9).at(),
    ]


def failed_parity() -> Report:
    """A report of an integer graph that breaks a limit."""
    broken = report()
    broken["parity"][2] |= {"passed": False, "max_lsb": 9}
    broken["diagnostics"] = [IntegerDiffers(9, 1).at(node="n", value="v").to_json()]
    return broken
