"""Further files of a compile, asked for by name: ``--emit encodings-1.0.0,float,epcontext``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encoding_formats import VERSIONS, export_encodings
from qnpu.compiler.handout import Handout
from qnpu.compiler.output import Writer, save_model, write_json
from qnpu.compiler.rules import HandoffFailed, InvalidConfig
from qnpu.compiler.target import TargetProfile
from qnpu.runtime_check.htp import HtpCompiler, HtpError, require_htp


@dataclass(frozen=True, slots=True)
class Emission:
    """A kind of file.

    Attributes:
        name: on the command line.
        file: name of the file.
        what: half a line for HANDOFF.md.
        write: writes it, to a path, from a handout, for a target.
        oracle: compiler that the file is made by, as in ``Vendor.oracle``; empty for none.
    """

    name: str
    file: str
    what: str
    write: Callable[[Path, Handout, TargetProfile], None]
    oracle: str = ""


def emission(name: str) -> Emission:
    """The kind of file of a name.

    Raises:
        DiagnosticError: QN503 there is none.
    """
    for item in EMISSIONS:
        if item.name == name:
            return item
    known = ", ".join(item.name for item in EMISSIONS)
    raise DiagnosticError(InvalidConfig("emit", f"`{name}` is not one of {known}").at())


def check_emissions(names: Sequence[str], target: TargetProfile) -> None:
    """Finds out before the work whether all files can be made.

    Raises:
        DiagnosticError: QN503 an unknown name, or a file that is not for this target; QN114 the
            vendor's compiler is not installed.
    """
    for item in map(emission, names):
        if item.oracle and item.oracle != target.vendor.oracle:
            reason = f"`{item.name}` is for other targets than {target.id}, such as qnn-htp-v75"
            raise DiagnosticError(InvalidConfig("emit", reason).at())
        if item.oracle:
            require_htp()


def emission_writers(
    names: Sequence[str], handout: Handout, target: TargetProfile
) -> dict[str, Writer]:
    """File name → what writes it, for ``write_outputs``."""

    def writer(item: Emission) -> Writer:
        return lambda path: item.write(path, handout, target)

    return {item.file: writer(item) for item in map(emission, names)}


# ---------------------------------------------------------------------------------------- writers


def _encodings(version: str, path: Path, handout: Handout, target: TargetProfile) -> None:
    document = export_encodings(handout.encodings, handout.float_model.graph, version)
    write_json(document, path)


def _float(path: Path, handout: Handout, target: TargetProfile) -> None:
    save_model(handout.float_model, path)


def _context(path: Path, handout: Handout, target: TargetProfile) -> None:
    _by_vendor(HtpCompiler.emit_context, path, handout, target)


def _dlc(path: Path, handout: Handout, target: TargetProfile) -> None:
    _by_vendor(HtpCompiler.emit_dlc, path, handout, target)


def _by_vendor(
    emit: Callable[[HtpCompiler, ir.Model, str, Path], None],
    path: Path,
    handout: Handout,
    target: TargetProfile,
) -> None:
    """Raises: DiagnosticError: QN590 the vendor's compiler refuses the graph."""
    try:
        with HtpCompiler() as compiler:
            emit(compiler, handout.model, f"v{target.vendor.arch}", path)
    except HtpError as error:
        raise DiagnosticError(HandoffFailed(path.name, target.id, str(error)).at()) from error


EMISSIONS: tuple[Emission, ...] = (
    *(
        Emission(
            f"encodings-{version}",
            f"model.{version}.encodings",
            f"encodings of every tensor of model.float.onnx, AIMET/QNN version {version}",
            partial(_encodings, version),
        )
        for version in VERSIONS
    ),
    Emission(
        "float",
        "model.float.onnx",
        "model.qdq.onnx without Q/DQ pairs; its weights are what their codes stand for",
        _float,
    ),
    Emission(
        "epcontext",
        "model.ctx.onnx",
        "the compiled graph for ONNX Runtime's QNN provider; its binary lies beside it",
        _context,
        oracle="htp",
    ),
    Emission(
        "dlc",
        "model.qnn.dlc",  # model.dlc is what qairt-converter would make of the float graph
        "the quantized graph in Qualcomm's own form",
        _dlc,
        oracle="htp",
    ),
)
