"""What is fuzzed: valid files of each kind, how they are changed, and the code that reads them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import onnx
import onnx_ir as ir

from bench.fuzz_mutations import mutate_bytes, mutate_document, mutate_message, to_json, to_toml
from qnpu.compiler.bit_choices import read_plan
from qnpu.compiler.config import CompileConfig, read_config
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError, Severity
from qnpu.compiler.encoding_formats import VERSIONS, read_encodings
from qnpu.compiler.model_check import check_model
from qnpu.compiler.sarif import sarif_log
from qnpu.compiler.target import DEFAULT_TARGET, load_target, read_profile
from qnpu.models.load import load_onnx

TOKENS = 8
ARCHITECTURES = ("llama", "gemma3")
WEIGHTS = "weights.bin"
_KEPT_ENCODINGS = 3
_IN_SARIF = 3  # each with its manual page
_FLOAT = "model.float.onnx"


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file.

    Attributes:
        file: name that each input is written under.
        seeds: valid files, from the folder that ``make_seeds`` filled.
        mutate: a changed copy of the first, perhaps with parts of others.
        enter: reads the file in a folder as the commands do; the second folder is that of seeds.
        takes: False for content that does not come to the reader.
    """

    file: str
    seeds: Callable[[Path], list[bytes]]
    mutate: Callable[[bytes, list[bytes], Random], bytes]
    enter: Callable[[Path, Path], None]
    takes: Callable[[bytes], bool] = lambda content: True


def make_seeds(folder: Path) -> None:
    """Exports tiny decoders, and compiles one, for their graphs, plan and encodings."""
    from qnpu.compiler.emit import emission_writers  # noqa: PLC0415
    from qnpu.compiler.handout import make_handout  # noqa: PLC0415
    from qnpu.compiler.inputs import named_data  # noqa: PLC0415
    from qnpu.compiler.pipeline import check_result, compile_model, write_result  # noqa: PLC0415
    from qnpu.models.export import export_dynamo  # noqa: PLC0415
    from qnpu.models.load import LoadedModel  # noqa: PLC0415
    from qnpu.models.tiny_decoder import tiny_decoder  # noqa: PLC0415
    from qnpu.models.tokenizer import ByteTokenizer  # noqa: PLC0415

    for name in ARCHITECTURES:  # with a vocabulary of bytes, which the tokenizer has
        decoder = tiny_decoder(name, layers=1, hidden=32, vocab=257)
        (folder / name).mkdir()
        path = folder / name / "model.onnx"
        export_dynamo(LoadedModel(decoder, ByteTokenizer(), name), path, sequence_length=TOKENS)
    config = CompileConfig(
        scheme="w8a8",
        seq_len=TOKENS,
        calib_windows=1,
        learn_windows=1,
        tokenizer=str(folder / ARCHITECTURES[0]),
    )
    result = compile_model(load_onnx(folder / ARCHITECTURES[0] / "model.onnx"), config)
    handout = make_handout(result.model)
    names = [*(f"encodings-{version}" for version in VERSIONS), "float"]
    more = emission_writers(names, handout, load_target(config.target))
    batch = named_data(config).feeds(result.float_model.graph.inputs)[0]
    write_result(folder / "out", result, handout, check_result(result, batch, []), {}, more)


# ----------------------------------------------------------------------------------------- loader


def _model_seeds(folder: Path) -> list[bytes]:
    """Decoders, a quantized one, one with its weights outside, one with functions and branches."""
    decoders = [onnx.load(folder / name / "model.onnx") for name in ARCHITECTURES]
    small = [_quantized(), _external(), _branches()] * 2  # read in a tenth of the time
    return [_inline(model) for model in (*decoders, *small)]


def _inline(model: onnx.ModelProto) -> bytes:
    content: bytes = model.SerializeToString()
    return content


def _quantized() -> onnx.ModelProto:
    """A softmax of x·w + b with Q/DQ pairs, and a matrix product of it by itself, transposed."""
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2, 4] x) => (float[2, 2] y)
        <int8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}, int8[4] n = {0, 0, 0, 0},
         float[4] c = {0.1, 0.2, 0.1, 0.1}, float s = {0.1}, uint8 z = {128}, int32[4] b = {1, 2, 3,
         4}, float[4] d = {0.01, 0.02, 0.01, 0.01}, float f = {0.00390625}, uint8 o = {0}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear <axis = 1> (w, c, n)
            h = MatMul(xd, wd)
            hq = QuantizeLinear(h, s, z)
            hd = DequantizeLinear(hq, s, z)
            bd = DequantizeLinear <axis = 0> (b, d)
            a = Add(hd, bd)
            aq = QuantizeLinear(a, s, z)
            ad = DequantizeLinear(aq, s, z)
            p = Softmax <axis = -1> (ad)
            pq = QuantizeLinear(p, f, o)
            pd = DequantizeLinear(pq, f, o)
            t = Transpose <perm = [1, 0]> (pd)
            tq = QuantizeLinear(t, f, o)
            td = DequantizeLinear(tq, f, o)
            r = MatMul(pd, td)
            rq = QuantizeLinear(r, s, z)
            y = DequantizeLinear(rq, s, z)
        }
        """)


def _external() -> onnx.ModelProto:
    """y = x·w with w in ``WEIGHTS``."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[1, 4] x) => (float[1, 4] y)'
        " { y = MatMul(x, w) }"
    )
    tensor = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    return model


def _branches() -> onnx.ModelProto:
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "own": 1]>
        g (float[N, 4] x, bool c) => (float[N, 4] y)
        <float[4] b = {1, 2, 3, 4}, int64[2] s = {-1, 4}, float[2, 2] unused = {1, 2, 3, 4}>
        {
            h = own.Shift(x, b)
            i = If (c) <
                then_branch = then_graph () => (float[N, 4] t) { t = Relu(h) },
                else_branch = else_graph () => (float[N, 4] e) { e = Reshape(h, s) }>
            k = Constant <value = float[1] {2}> ()
            y = Mul(i, k)
        }
        <domain: "own", opset_import: ["": 18]> Shift (a, b) => (z) { z = Add(a, b) }
        """)


def _mutate_model(content: bytes, others: list[bytes], random: Random) -> bytes:
    if random.random() < 0.4:
        return mutate_bytes(content, others, random)
    model = onnx.ModelProto.FromString(content)
    mutate_message(model, random)
    return _inline(model)


def _enter_loader(folder: Path, seeds: Path) -> None:
    """As qnpu-check without a target, all three forms of its output included."""
    path = folder / "model.onnx"
    check = check_model(load_onnx(path), load_target(DEFAULT_TARGET))
    render(check.diagnostics)
    errors = [item for item in check.diagnostics if item.severity is Severity.ERROR]
    if errors:
        raise DiagnosticError(errors)


def render(diagnostics: Iterable[Diagnostic]) -> None:
    """What a command makes of diagnostics: text, JSON and SARIF, encoded as for a terminal."""
    listed = list(diagnostics)
    json.dumps([item.to_json() for item in listed])
    json.dumps(sarif_log(listed[:_IN_SARIF], "model.onnx"))
    "\n".join(map(str, listed)).encode(errors="backslashreplace")


# ------------------------------------------------------------------------- configuration, profiles

_CONFIG: dict[str, Any] = {
    "scheme": "w4a8",
    "target": "qnn-htp-v75",
    "emit": ["float"],
    "calib": "data.npz",
    "tokenizer": "folder",
    "calib_windows": 4,
    "seq_len": 64,
    "range_method": "search",
    "weights": "gptq",
    "learn": "end-to-end",
    "learn_steps": 10,
    "distill": 0.5,
    "down_bits": 8,
    "promote": 0.1,
    "online": ["r3", "r4"],
    "prefix": "1,2",
    "mask_value": -40,
    "integer": True,
    "cpu": "vnni",
    "freeze_dims": {"N": 1, "x:1": 28},
    "keep_inputs": ["attention_mask"],
    "passes": ["my_passes:Trim[share=0.1]"],
    "bos": "stream",
    "seed": 3,
}
_SEARCH = {"scheme": "auto", "budget": "latency=80ms,size=90MB,ppl=1.05", "workload": "512/64"}
_CACHED = {"context": 128, "seq_len": 64, "names": "ai-hub"}
_PLANNED = {"scheme": "w8a8", "plan": "bit_plan.json"}


def _config_seeds(folder: Path) -> list[bytes]:
    return [to_toml(table) for table in (_CONFIG, _SEARCH, _CACHED, _PLANNED)]


def _mutate_toml(content: bytes, others: list[bytes], random: Random) -> bytes:
    if random.random() < 0.3:
        return mutate_bytes(content, others, random)
    return to_toml(mutate_document(_toml(content), random))


@lru_cache(maxsize=64)
def _toml(content: bytes) -> dict[str, Any]:
    return tomllib.loads(content.decode())


def _enter_config(folder: Path, seeds: Path) -> None:
    """As qnpu-compile, up to where it opens the model; what a report says of it included."""
    config = CompileConfig(**read_config(folder / "config.toml"))
    json.dumps(config.to_json())
    _ = config.windows, config.all_windows, config.snaps_scales, config.mask_constant
    _ = config.bit_choices
    config.check_processes(1)


_PROFILE: dict[str, Any] = {
    "id": "profile",
    "inherits": "base",
    "summary": "a profile",
    "signed_activations": True,
    "activation_bits_min": 8,
    "mask_value": -30.0,
    "unlisted": "float",
    "vendor": {"name": "V", "arch": 75, "oracle": "htp"},
    "graph": {"opset_max": 23, "forms": ["qdq"], "file_bytes_max": 10**6, "accumulator_bits": 32},
    "bias": {"derived": True},
    "no_float": ["Softmax"],
    "tolerance_lsb": {"Softmax/u16": 2},
    "handoff": ["convert {model} {encodings}"],
    "cost": {
        "bandwidth": {"value": 25e9, "source": "s"},
        "throughput": {"value": 6e12, "input": 16, "weight": 4, "source": "s"},
        "on_chip": {"value": 8e6, "source": "s"},
        "speeds": [{"input": 16, "weight": 4, "speed": 1.0, "source": "s"}],
    },
    "rules": [
        {
            "ops": ["MatMul"],
            "inputs": [["u8|u16 var tensor z!=mid", "s8 const channel rank=2 size=-1:2..64"]],
            "output": "=",
            "verdict": "int",
            "step_above": 16.0,
        },
        {
            "ops": ["Add", "Mul"],
            "inputs": [["* from=MatMul/1:Transpose", "* value=1 batched"]],
            "encodings": "same",
            "broadcast": 1,
            "verdict": "float",
            "does": "floats",
        },
        {
            "ops": ["Softmax"],
            "attributes": {"axis": ["not-last", 1]},
            "unless_forced": {"scale": 0.00390625, "zero_point": 0},
            "legalize": "forced-encoding",
            "verdict": "silent",
            "fault": "changed",
        },
        {"ops": ["*"], "rank_above": 4, "legalize": "reduce-rank", "verdict": "reject"},
    ],
}
_BASE = {"id": "base", "rules": [{"ops": ["Relu"], "types": "same", "verdict": "int"}]}


def _profile_seeds(folder: Path) -> list[bytes]:
    return [to_toml(_PROFILE), to_toml(_BASE | {"id": "profile", "inherits": "base"})]


def _enter_profile(folder: Path, seeds: Path) -> None:
    """Reads a profile beside another one, and judges a quantized graph by it."""
    (folder / "base.toml").write_bytes(to_toml(_BASE))
    profile = read_profile(folder, "profile")
    render(check_model(_judged(), profile).diagnostics)


@lru_cache
def _judged() -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(_quantized()))


@lru_cache(maxsize=4)
def _graph(path: Path) -> ir.Model:
    return load_onnx(path)


# ------------------------------------------------------------------------------- encodings, plans


def _encodings_seeds(folder: Path) -> list[bytes]:
    """Of each version a few encodings; all would only make the run slow."""
    found = []
    for version in VERSIONS:
        document = json.loads((folder / "out" / f"model.{version}.encodings").read_bytes())
        for section in ("encodings", "activation_encodings", "param_encodings"):
            match document.get(section):
                case dict() as entries:
                    document[section] = dict(list(entries.items())[:_KEPT_ENCODINGS])
                case list() as entries:
                    document[section] = entries[:_KEPT_ENCODINGS]
        found.append(json.dumps(document).encode())
    return found


def _mutate_json(content: bytes, others: list[bytes], random: Random) -> bytes:
    if random.random() < 0.2:
        return mutate_bytes(content, others, random)
    return to_json(mutate_document(_json(content), random))


@lru_cache(maxsize=64)
def _json(content: bytes) -> Any:
    return json.loads(content)


def _mutate_encodings(content: bytes, others: list[bytes], random: Random) -> bytes:
    """Only what is JSON."""
    while not _is_json(changed := _mutate_json(content, others, random)):
        pass
    return changed


def _is_json(content: bytes) -> bool:
    """The reader of encodings takes a document that was parsed."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _enter_encodings(folder: Path, seeds: Path) -> None:
    document = json.loads((folder / "model.encodings").read_bytes())
    read_encodings(document, _graph(seeds / "out" / _FLOAT).graph)


def _plan_seeds(folder: Path) -> list[bytes]:
    plan = json.loads((folder / "out" / "bit_plan.json").read_bytes())
    small = {key: value for key, value in plan.items() if key != "tensors"}
    return [json.dumps(plan).encode(), json.dumps(small).encode()]


def _enter_plan(folder: Path, seeds: Path) -> None:
    """Reads a plan as ``--plan`` does, and asks for a compile by it."""
    scheme, _ = read_plan(folder / "plan.json")
    _ = CompileConfig(scheme=scheme, plan=str(folder / "plan.json")).bit_choices


TARGETS = {
    "loader": Target("model.onnx", _model_seeds, _mutate_model, _enter_loader),
    "config": Target("config.toml", _config_seeds, _mutate_toml, _enter_config),
    "profile": Target("profile.toml", _profile_seeds, _mutate_toml, _enter_profile),
    "encodings": Target(
        "model.encodings", _encodings_seeds, _mutate_encodings, _enter_encodings, _is_json
    ),
    "plan": Target("plan.json", _plan_seeds, _mutate_json, _enter_plan),
}
