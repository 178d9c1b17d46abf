"""Target profiles: what an NPU's compiler accepts, as data."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.quant_types import QuantSpec
from qnpu.compiler.rules import InvalidConfig, UnknownTarget

DEFAULT_TARGET = "onnxruntime"


@dataclass(frozen=True, slots=True)
class TargetProfile:
    """Types that decide how a graph is encoded; the rules of each operator come with qnpu-check.

    Attributes:
        id: name on the command line.
        signed_activations: activation codes are signed.
        symmetric_activations: activations have their zero at the middle code.
        source: where this is known from.
    """

    id: str = DEFAULT_TARGET
    signed_activations: bool = False
    symmetric_activations: bool = False
    source: str = ""

    def activation_spec(self, bits: int) -> QuantSpec:
        """The per-tensor activation type of a width."""
        return QuantSpec(bits, self.signed_activations, self.symmetric_activations)


def target_names() -> list[str]:
    """Names of all shipped profiles, sorted."""
    folder = resources.files("qnpu.compiler").joinpath("targets")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_target(name: str) -> TargetProfile:
    """Reads a shipped profile.

    Raises:
        DiagnosticError: QN502 unknown name, QN503 a key that is not a field.
    """
    if name not in target_names():
        raise DiagnosticError(UnknownTarget(name, ", ".join(target_names())).at())
    file = resources.files("qnpu.compiler").joinpath("targets", f"{name}.toml")
    table = tomllib.loads(file.read_text("utf-8"))
    known = {f.name for f in dataclasses.fields(TargetProfile)}
    for key in sorted(set(table) - known):
        raise DiagnosticError(
            InvalidConfig(key, "not a key of a target profile").at(file=str(file))
        )
    return TargetProfile(**table)
