"""Our passes for Microsoft's Olive: a whole compile, and single passes over a graph.

Olive finds passes by a package configuration, which replaces its own, so the two are merged::

    python -m qnpu.compiler.olive_passes > package.json
    olive run --config recipe.json --package-config package.json

Nothing else imports this module: Olive need not be installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_type_hints

import onnx_ir as ir
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass as OlivePass
from olive.passes.onnx.common import get_external_data_config, ir_model_to_olive_model
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from pydantic import model_validator

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.emit import check_emissions
from qnpu.compiler.handoff import handoff_writers
from qnpu.compiler.handout import make_handout
from qnpu.compiler.inputs import OpenedModel, calibration_data, open_model
from qnpu.compiler.output import REPORT_NAME
from qnpu.compiler.pass_base import Pass, Stage, no_progress
from qnpu.compiler.pipeline import MODEL_NAME, check_result, compile_model, write_result
from qnpu.compiler.recipes import read_recipe, recipe_names
from qnpu.compiler.rules import InvalidConfig, InvalidPass
from qnpu.compiler.target import load_target
from qnpu.compiler.user_passes import load_pass

PACKAGE_NAME = "olive_package.json"

_logger = logging.getLogger(__name__)

# Olive's evaluators measure; its input is ONNX; and a pass gives one graph, a context two.
_ABSENT = ("eval_text", "eval_windows", "exporter", "context", "names")


def package_config() -> dict[str, Any]:
    """The installed Olive's own package configuration with our passes added."""
    own = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    ours = json.loads(resources.files("qnpu.compiler").joinpath(PACKAGE_NAME).read_text("utf-8"))
    merged: dict[str, Any] = own | {"passes": own["passes"] | ours["passes"]}
    return merged


class QnpuCompile(OlivePass):  # type: ignore[misc]  # types are checked without Olive
    """A whole compile: a float ONNX model in, its static QDQ graph out.

    Options are the fields of ``CompileConfig``, and ``recipe``; what is not given is as in the
    recipe, else as in ``CompileConfig``. Beside the graph lie encodings.json, bit_plan.json,
    report.json and what ``emit`` and ``integer`` ask for, as additional files.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        kinds = get_type_hints(CompileConfig)
        return {
            "recipe": PassConfigParam(
                type_=str,
                description=f"Options that belong together: {', '.join(recipe_names())}.",
            )
        } | {
            name: PassConfigParam(
                type_=kinds[name],
                description=f"As in qnpu.compiler.CompileConfig. Default: {default!r}.",
            )
            for name, default in CompileConfig().to_json().items()
            if name not in _ABSENT
        }

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        return _key_check()

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Raises: DiagnosticError: as ``compile_model`` and ``write_result``."""
        settings = compile_config(config.model_dump())
        check_emissions(settings.emit, load_target(settings.target))
        folder = Path(resolve_onnx_path(output_model_path, MODEL_NAME)).parent
        with open_model(model.model_path, settings, no_progress) as opened:
            names = _compile(opened, settings, folder)
        attributes = dict(model.model_attributes or {})
        attributes["additional_files"] = [  # large weights lie beside the model, and are a part
            str(folder / name) for name in names if not name.startswith(MODEL_NAME)
        ]
        return ONNXModelHandler(folder, MODEL_NAME, model_attributes=attributes)


class QnpuPass(OlivePass):  # type: ignore[misc]  # types are checked without Olive
    """Single passes over a graph, in order, as in an ``onnx_ir.passes.Sequential``.

    ``passes`` holds names of ours, ``fuse-rotation[seed=1]``, and what
    ``qnpu.compiler.user_passes`` takes. They must need nothing but the graph.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "passes": PassConfigParam(
                type_=list[str],
                required=True,
                description="NAME, MODULE:CLASS or an entry point, each with [key=value, …].",
            ),
            **get_external_data_config(),
        }

    @classmethod
    def _validators(cls) -> dict[str, Any]:
        return _key_check()

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Raises: DiagnosticError: QN542 no such pass, or what a pass raises."""
        passes = [graph_pass(spec) for spec in config.passes]
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        result = ir.passes.Sequential(*passes)(model.load_ir_model())
        return ir_model_to_olive_model(result.model, path, config)


def graph_pass(spec: str) -> Pass:
    """A pass that needs only the graph, by the name of one of ours or as ``load_pass`` has it.

    Raises:
        DiagnosticError: QN542 there is none, or it needs encodings or a plan.
    """
    name, bracket, options = spec.strip().partition("[")
    module = f"qnpu.passes.{name.replace('-', '_')}"
    if name.replace("-", "").isalnum() and importlib.util.find_spec(module) is not None:
        kind = "".join(word.title() for word in name.split("-"))
        spec = f"{module}:{kind}{bracket}{options}"
    item = load_pass(spec)
    if item.consumes not in (Stage.FLOAT, Stage.QDQ):
        reason = "it needs more than a graph: a plan of bits, or encodings"
        raise DiagnosticError(InvalidPass(spec, reason).at())
    return item


def compile_config(options: Mapping[str, Any]) -> CompileConfig:
    """What a ``QnpuCompile`` is asked to do; None stands for an option that was not given.

    Raises:
        DiagnosticError: QN503 no such recipe; as ``CompileConfig``.
    """
    given = {key: value for key, value in options.items() if value is not None}
    recipe = given.pop("recipe", None)
    return CompileConfig(**((read_recipe(recipe) if recipe else {}) | given))


def _key_check() -> dict[str, Any]:
    """The validator of a pass's options that refuses unknown ones."""
    check: Any = classmethod(_check_keys)
    return {"known_keys": model_validator(mode="before")(check)}


def _check_keys(kind: type[BasePassConfig], options: dict[str, Any]) -> dict[str, Any]:
    """Olive would leave out a misspelt option with a warning."""
    for key in options:
        if key not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            raise DiagnosticError(InvalidConfig(key, f"unknown key; known are {known}").at())
    return options


def _compile(opened: OpenedModel, settings: CompileConfig, folder: Path) -> list[str]:
    """Compiles, compares source, float and QDQ graph, and writes all files; returns their names."""
    calibration, data = calibration_data(settings, opened.tokenizer)
    result = compile_model(opened.model, settings, calibration)
    batch = calibration.feeds(result.float_model.graph.inputs)[0]
    checks = check_result(result, batch, [])
    about: dict[str, object] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": settings.to_json(),
        "input": {"name": opened.name, "sha256": opened.sha256},
        "calibration": data,
        "evaluation": "",
        "seed": settings.seed,
    }
    handout = make_handout(result.model)
    profile = load_target(settings.target)
    more = handoff_writers(handout, settings.emit, profile, settings.mask_constant)
    report = write_result(folder, result, handout, checks, about, more)
    for diagnostic in result.diagnostics:
        _logger.warning("%s", diagnostic)
    return sorted([*cast("dict[str, object]", report["outputs"]), REPORT_NAME])


if __name__ == "__main__":
    json.dump(package_config(), sys.stdout, indent=4)
    print()
