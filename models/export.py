"""Float torch models to ONNX, by torch's own exporter or by optimum.

Files appear under their names only when complete, and the same model gives the same bytes from any
folder: what exporters note about source files and stack traces is removed.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import CannotWrite, ExportFailed
from qnpu.models.load import LoadedModel, load_torch, resolve
from qnpu.models.onnx_file import load_onnx
from qnpu.models.quiet import quiet, require

Progress = Callable[[str, float], None]

_WRAPPER = "decoder."  # attribute of the traced wrapper, which weights should not be named after
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules around it, then itself
_WEIGHTED = ("MatMul", "RMSNormalization")  # operators whose second input may be folded
_EXAMPLE_TOKENS, _EXAMPLE_PAST = 5, 7  # lengths to trace at, where they are dynamic
_INLINE_BYTES = 1024  # tensors up to this size stay in the .onnx file


def export_dynamo(
    loaded: LoadedModel,
    path: str | Path,
    *,
    sequence_length: int,
    opset: int = 23,
    progress: Progress | None = None,
) -> Path:
    """Export with ``torch.onnx.export(dynamo=True)``: static, batch 1, no key-value cache.

    The graph maps ``input_ids`` int64 ``[1, S]`` to ``logits`` float32 ``[1, S, vocab]``. Weights
    go to ``<name>.data`` and the tokenizer to tokenizer.json, both beside the model.

    Args:
        path: the .onnx file to write; its folder is created.
        sequence_length: S, in tokens.
        opset: 23 is the first with RMSNormalization and RotaryEmbedding.
        progress: called with a step's name and the fraction done, 0 to 1.

    Returns:
        ``path``.

    Raises:
        DiagnosticError: QN115 the exporter failed; QN901 the file cannot be written;
            QN114 a package is missing.
        ValueError: ``sequence_length`` is below one.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence length {sequence_length} is below one")
    require("torch", "onnxscript")
    path, report = Path(path), progress or _no_progress
    with _staged(path) as folder:
        report("trace", 0.0)
        with quiet():
            model = _trace(loaded.model, sequence_length, opset)
        _name_weights(model)
        report("write", 0.8)
        _write(model, folder / path.name, loaded)
    report("done", 1.0)
    return path


def export_cached(
    loaded: LoadedModel,
    path: str | Path,
    *,
    opset: int = 23,
    progress: Progress | None = None,
) -> Path:
    """Export with ``torch.onnx.export(dynamo=True)``: batch 1, dynamic lengths, a key-value cache.

    Inputs are ``input_ids`` and ``position_ids`` int64 ``[1, S]``, ``attention_mask`` int64
    ``[1, P + S]`` and ``past_key_values.N.key|value`` float32 ``[1, heads, P, width]``; outputs
    ``logits`` and ``present.N.key|value`` with P + S entries. Weights and tokenizer are written as
    by ``export_dynamo``.

    Args:
        loaded: a model whose cache has keys and values of equal shape in each layer.
        path: the .onnx file to write; its folder is created.
        opset: as for ``export_dynamo``.
        progress: called with a step's name and the fraction done, 0 to 1.

    Raises:
        DiagnosticError: QN115, QN901, QN114 as for ``export_dynamo``.
    """
    require("torch", "onnxscript", "transformers")
    path, report = Path(path), progress or _no_progress
    with _staged(path) as folder:
        report("trace", 0.0)
        with quiet():
            model = _trace_cached(loaded.model, opset)
        _name_weights(model)
        report("write", 0.8)
        _write(model, folder / path.name, loaded)
    report("done", 1.0)
    return path


def export_optimum(
    source: LoadedModel | str | Path,
    path: str | Path,
    *,
    task: str = "text-generation-with-past",
    progress: Progress | None = None,
) -> Path:
    """Export with optimum: dynamic axes, and for a task "with past" a key-value cache.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` where the model takes them (where
    optimum would leave them out, too: a sliding cache needs them), and
    ``past_key_values.N.key|value``; outputs ``logits`` and ``present.N.key|value``. Weights and
    tokenizer are written as by ``export_dynamo``.

    Args:
        source: a loaded model, or what ``resolve`` takes, such as a Hugging Face folder.
        path: the .onnx file to write; its folder is created.
        task: optimum's name of what to export.

    Raises:
        DiagnosticError: QN115, QN901, QN114 as for ``export_dynamo``; QN113 the source cannot be
            loaded.
    """
    require("optimum", "transformers", "torch")
    path, report = Path(path), progress or _no_progress
    report("load", 0.0)
    loaded = source if isinstance(source, LoadedModel) else load_torch(resolve(str(source)))
    with _staged(path) as folder:
        report("trace", 0.1)
        raw = folder / "optimum"
        with quiet():
            exported = _run_optimum(loaded.model, raw, task)
        report("write", 0.8)
        _write(load_onnx(exported), folder / path.name, loaded)
        shutil.rmtree(raw)
    report("done", 1.0)
    return path


def _no_progress(step: str, fraction: float) -> None:
    del step, fraction


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A folder whose files move beside ``path`` when the body is through, the model last.

    Raises:
        DiagnosticError: QN901 on any operating system error of the body or the moves.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as name:
            folder = Path(name)
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.parent / file.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiagnosticError(CannotWrite(str(path), reason).at()) from error


def _trace(decoder: Any, sequence_length: int, opset: int) -> ir.Model:
    import torch  # noqa: PLC0415

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.decoder(input_ids=input_ids, use_cache=False).logits

    arguments = (torch.zeros(1, sequence_length, dtype=torch.int64),)
    return _traced(Logits().eval(), arguments, ["input_ids"], ["logits"], opset)


def _trace_cached(decoder: Any, opset: int) -> ir.Model:
    import torch  # noqa: PLC0415
    from transformers import DynamicCache  # noqa: PLC0415

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: list[torch.Tensor],
        ) -> Any:
            cache = DynamicCache()
            for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
                cache.update(*pair, layer)
            found = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            layers = found.past_key_values.layers
            return (found.logits, *(item for kv in layers for item in (kv.keys, kv.values)))

    tokens, past = _EXAMPLE_TOKENS, _EXAMPLE_PAST
    with torch.no_grad():  # how many layers and heads there are, the model knows best
        found = decoder(torch.zeros(1, past, dtype=torch.int64), use_cache=True)
    caches = [item for kv in found.past_key_values.layers for item in (kv.keys, kv.values)]
    names = [f"{layer}.{kind}" for layer in range(len(caches) // 2) for kind in ("key", "value")]
    free = torch.export.Dim.DYNAMIC  # within the bounds that the model's own code sets
    return _traced(
        Cached().eval(),
        (
            torch.zeros(1, tokens, dtype=torch.int64),
            torch.ones(1, past + tokens, dtype=torch.int64),
            torch.arange(past, past + tokens)[None],
            caches,
        ),
        ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
        ["logits", *(f"present.{name}" for name in names)],
        opset,
        ({1: free}, {1: free}, {1: free}, [{2: free}] * len(caches)),
    )


def _traced(
    module: Any,
    arguments: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    opset: int,
    dynamic: tuple[Any, ...] | None = None,
) -> ir.Model:
    import torch  # noqa: PLC0415

    try:
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=opset,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    except Exception as error:  # whatever the model's own code raises under trace
        raise _failed("dynamo", error) from error
    if program is None:
        raise _failed("dynamo", RuntimeError("it returned nothing"))
    return program.model


def _run_optimum(decoder: Any, folder: Path, task: str) -> Path:
    from optimum.exporters.onnx import onnx_export_from_model  # noqa: PLC0415

    try:
        configs = _with_positions(decoder, task)
        onnx_export_from_model(
            decoder,
            folder,
            task=task,
            custom_onnx_configs=configs,
            do_validation=False,
            device="cpu",
        )
        (exported,) = folder.glob("*.onnx")
    except Exception as error:  # of transformers, torch, onnx and optimum
        raise _failed("optimum", error) from error
    return exported


def _with_positions(decoder: Any, task: str) -> dict[str, Any]:
    """Optimum's configuration with ``position_ids``, where it has none and the model takes them."""
    from optimum.exporters.tasks import TasksManager  # noqa: PLC0415

    takes = "position_ids" in inspect.signature(decoder.forward).parameters
    if not takes or not task.startswith("text-generation"):
        return {}
    make = TasksManager.get_exporter_config_constructor(
        "onnx", model=decoder, task=task, library_name="transformers"
    )
    found = make(decoder.config)
    kind: Any = type(found)
    if "position_ids" in found.inputs:
        return {}

    def inputs(config: Any) -> dict[str, dict[int, str]]:
        more = {"position_ids": {0: "batch_size", 1: "sequence_length"}}
        return dict(kind.inputs.fget(config)) | more

    extended = type(kind.__name__, (kind,), {"inputs": property(inputs)})
    options = {"use_past": found.use_past, "use_past_in_inputs": found.use_past}
    return {"model": extended(decoder.config, task=found.task, **options)}


def _failed(exporter: str, error: BaseException) -> DiagnosticError:
    """The reason is that of the first cause: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = f"{type(error).__name__}: {first_line(error)}"
    return DiagnosticError(ExportFailed(exporter, reason).at())


def _name_weights(model: ir.Model) -> None:
    """Call a weight that the exporter folded (``val_117``) after the module that uses it."""
    names: dict[ir.Value, str] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        weight = node.inputs[1] if node.op_type in _WEIGHTED else None
        if len(scopes) > 1 and weight is not None and weight.name in model.graph.initializers:
            names[weight] = f"{scopes[-2]}.weight"
    taken = Counter([*names.values(), *model.graph.initializers])
    for weight, name in names.items():
        if taken[name] == 1:
            weight.name = name


def _write(model: ir.Model, path: Path, loaded: LoadedModel) -> None:
    """Model, weights and tokenizer; nothing of where and when they were made."""
    _strip(model)
    model.graph.name = loaded.name
    data = f"{path.name}.data"
    ir.save(model, path, external_data=data, size_threshold_bytes=_INLINE_BYTES)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(path.parent)


def _strip(model: ir.Model) -> None:
    """Remove metadata and comments throughout, and the wrapper's prefix from weight names."""
    model.metadata_props.clear()
    model.doc_string = None
    roots = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in [inner for root in roots for inner in (root, *root.subgraphs())]:
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in [*graph.inputs, *graph.initializers.values()]:
            _strip_value(value)
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                _strip_value(value)
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name.startswith(_WRAPPER):
            value.name = value.name.removeprefix(_WRAPPER)


def _strip_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None
