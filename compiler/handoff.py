"""HANDOFF.md: what a compile wrote, for whom, and the vendor's commands for those very files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir

from qnpu.compiler.emit import emission, emission_writers
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.handout import Handout
from qnpu.compiler.integer_io import integer_io, io_encodings
from qnpu.compiler.output import Writer, hash_file
from qnpu.compiler.pipeline import MODEL_NAME
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.target import TargetProfile

HANDOFF_NAME = "HANDOFF.md"

_FILES = {
    MODEL_NAME: "the quantized graph: integers with QuantizeLinear/DequantizeLinear pairs",
    "encodings.json": f"encodings of every tensor of {MODEL_NAME}, under its name without a suffix",
    "bit_plan.json": "what each tensor was to be encoded as",
}
_FORMS = """\
A converter takes one of two forms of the model: `{float}` with an encodings file, or `{model}`
by itself. They say the same: what was rewritten for {target} is in both. Encodings files list
every tensor of `{float}`, which takes and returns real numbers, and fit no other graph."""
_PREFERRED = ("encodings-1.0.0", "encodings-2.0.0", "encodings-0.6.1")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def handoff_writers(
    handout: Handout, emitted: Sequence[str], target: TargetProfile, mask_value: float | None
) -> dict[str, Writer]:
    """Writers of what is emitted and then, for a vendor's target, of the page about all files.

    Args:
        handout: what the files are about.
        emitted: names of emissions.
        target: what they are for.
        mask_value: see ``write_handoff``.
    """
    writers = emission_writers(emitted, handout, target)
    if target.handoff:
        writers[HANDOFF_NAME] = partial(
            write_handoff, handout=handout, target=target, emitted=emitted, mask_value=mask_value
        )
    return writers


def write_handoff(
    path: Path,
    handout: Handout,
    target: TargetProfile,
    emitted: Sequence[str],
    mask_value: float | None,
) -> None:
    """Writes the page, in Markdown.

    Args:
        path: of the page; all other files of the compile lie beside it already.
        handout: what they were made from.
        target: whose commands to print.
        emitted: names of the further files (``--emit``).
        mask_value: constant of masked scores, real; None where it is not known.
    """
    borders = io_encodings(handout.model)
    parts = [
        f"# Handoff to {target.id}",
        target.summary,
        "## Files",
        _file_table(path.parent, emitted),
        _FORMS.format(model=MODEL_NAME, float=emission("float").file, target=target.id),
        "## Commands",
        _commands(target, emitted),
        "## Inputs and outputs",
        _io_table(handout.model.graph, borders),
        _numbers(handout.model),
        *_requantize(handout),
        "## Key/value cache",
        _cache(handout.model.graph, borders),
        *_mask(mask_value),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.write_text(text, encoding="utf-8")


def _file_table(folder: Path, emitted: Sequence[str]) -> str:
    known = _FILES | {item.file: item.what for item in map(emission, emitted)}
    rows = [
        (f"`{path.name}`", f"{path.stat().st_size:,}", f"`{hash_file(path)}`", _what(path, known))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != HANDOFF_NAME
    ]
    return _table(("file", "bytes", "SHA-256", "what"), rows)


def _what(path: Path, known: dict[str, str]) -> str:
    """A file beside a known one (weights, a binary) belongs to it."""
    if path.name in known:
        return known[path.name]
    owner = next((name for name in known if path.name.startswith(Path(name).stem)), "")
    return f"belongs to `{owner}`" if owner else ""


# --------------------------------------------------------------------------------------- commands


def placeholders(target: TargetProfile, emitted: Sequence[str]) -> dict[str, str]:
    """What ``{name}`` in a profile's ``handoff`` stands for: names of files, and the target."""
    version = next((name for name in _PREFERRED if name in emitted), _PREFERRED[0])
    return {
        "model": MODEL_NAME,
        "float": emission("float").file,
        "encodings": emission(version).file,
        "epcontext": emission("epcontext").file,
        "dlc": emission("dlc").file,
        "target": target.id,
        "arch": str(target.vendor.arch),
        "soc_model": str(target.vendor.soc_model),
    }


def _commands(target: TargetProfile, emitted: Sequence[str]) -> str:
    values = placeholders(target, emitted)
    lines = [line.format_map(values) for line in target.handoff]
    text = "\n".join(["In this folder:", "", "```console", *lines, "```"])
    missing = sorted(_missing(target, emitted))
    if not missing:
        return text
    wanted = ",".join([*emitted, *missing])
    return f"{text}\n\nThey take files that were not asked for: compile with `--emit {wanted}`."


def _missing(target: TargetProfile, emitted: Sequence[str]) -> Iterator[str]:
    used = {name for line in target.handoff for name in _PLACEHOLDER.findall(line)}
    yield from (used & {"float", "epcontext", "dlc"}) - set(emitted)
    if "encodings" in used and not set(_PREFERRED) & set(emitted):
        yield _PREFERRED[0]


# ----------------------------------------------------------------------------------------- tensors


def _io_table(graph: ir.Graph, encodings: Mapping[str, Encoding]) -> str:
    rows = [
        (way, f"`{name_of(value)}`", _shape(value), *_type(value, encodings))
        for way, values in (("in", graph.inputs), ("out", graph.outputs))
        for value in values
    ]
    return _table(("", "tensor", "shape", "type", "codes", "scale", "zero point"), rows)


def _numbers(model: ir.Model) -> str:
    """What goes in and out, and how it becomes the other."""
    formula = "q = clamp(round(x / scale) + zero point), and x = scale · (q - zero point)."
    if integer_io(model):
        return f"The file takes and returns codes where it says so, as an NPU does:\n{formula}"
    return (
        "The file takes and returns real numbers; an NPU takes and returns their codes,\n"
        f"{formula}\n`qnpu-compile --integer-io` makes a file that takes and returns the codes."
    )


def _shape(value: ir.Value) -> str:
    return " x ".join(str(dim) for dim in value.shape or ())


def _type(value: ir.Value, encodings: Mapping[str, Encoding]) -> tuple[str, str, str, str]:
    """Type in the file; type, scale (to the last digit of float32) and zero point of the codes."""
    dtype = str(value.dtype).lower()
    if name_of(value) not in encodings:
        return dtype, "", "", ""
    encoding = encodings[name_of(value)]
    codes = str(encoding.spec.dtype).lower()
    return dtype, codes, f"{float(encoding.scale):.9g}", str(int(encoding.zero_point))


def _requantize(handout: Handout) -> list[str]:
    """A warning where tensors are needed at two encodings; empty where none is."""
    graph, encodings = handout.float_model.graph, handout.encodings
    points = [
        node
        for node in graph
        if node.op_type == "Identity"
        and (source := node.inputs[0]) is not None
        and name_of(source) in encodings
        and name_of(node.outputs[0]) in encodings
        and not encodings[name_of(source)].same_as(encodings[name_of(node.outputs[0])])
    ]
    if not points:
        return []
    return [
        "## Requantize points",
        f"{len(points)} tensors are needed at two encodings. {MODEL_NAME} makes the second one by\n"
        "a second Q/DQ pair, the float graph by an Identity whose output has another encoding\n"
        "than its input. A converter that drops Identity drops the second encoding: look for as\n"
        "many Convert operations in what it makes.",
    ]


def _cache(graph: ir.Graph, encodings: Mapping[str, Encoding]) -> str:
    pairs = cache_pairs(graph)
    if not pairs:
        return "The graph takes no cache."
    if any(name not in encodings for pair in pairs for name in pair):
        return f"The {len(pairs)} caches have no encoding: they are real numbers."
    apart = [
        (before, after)
        for before, after in pairs
        if not encodings[before].same_as(encodings[after])
    ]
    if not apart:
        return (
            f"Tied: each of the {len(pairs)} cache inputs has the encoding of its output, so\n"
            "codes go back in as they came out."
        )
    names = "\n".join(f"* `{before}`, `{after}`" for before, after in apart)
    return (
        f"Not tied: of {len(pairs)} caches these come out in another encoding than they go in,\n"
        f"and must be requantized between runs:\n\n{names}"
    )


def _mask(value: float | None) -> list[str]:
    if value is None:
        return []
    return [
        "## Attention mask",
        f"{value:g} stands for minus infinity, which would take all codes for itself. A mask\n"
        "that is fed as an input must use the same constant.",
    ]


def cache_pairs(graph: ir.Graph) -> list[tuple[str, str]]:
    """Cache inputs with the outputs that are fed back to them, told by name.

    As optimum names them (``past_key_values.0.key``, ``present.0.key``), or Qualcomm AI Hub
    (``past_key_0_in``, ``past_key_0_out``).
    """
    outputs = {name_of(value) for value in graph.outputs}
    pairs: list[tuple[str, str]] = []
    for value in graph.inputs:
        name = name_of(value)
        others = (
            re.sub(r"^past_key_values(?=[._])", "present", name),
            re.sub(r"_in$", "_out", name),
        )
        pairs += [(name, other) for other in others if other != name and other in outputs]
    return pairs


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
