"""Decoders that the tests of topology and rotation work on: exported tiny ones and hand-made."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx_ir as ir
from filelock import FileLock

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.models.export import export_cached, export_dynamo, export_optimum
from qnpu.models.load import load_onnx, load_torch, resolve
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.session import Feeds
from tests.conftest import EXPORTS, Array, normal, parse, run_model

LENGTH = 16

Change = tuple[str, str]
"""A line of ``TOY`` and what stands in its place."""


class More(TypedDict, total=False):
    """Further ONNX text for ``toy``."""

    inputs: str
    outputs: str
    constants: str
    header: str


def canonical(architecture: str, exporter: str = "dynamo") -> ir.Model:
    """A tiny decoder as the passes before rotation leave it; a new copy at each call."""
    return _canonical(architecture, exporter).clone()


def exported(architecture: str, exporter: str = "dynamo") -> ir.Model:
    """A tiny decoder as the exporter leaves it; a new copy at each call."""
    return _exported(architecture, exporter).clone()


@cache
def _exported(architecture: str, exporter: str) -> ir.Model:
    path = Path(os.environ[EXPORTS], f"{architecture}-{exporter}", "model.onnx")
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_name("lock")):  # each is exported by the first process that needs it
        if not path.exists():
            _export(architecture, exporter, path)
    model = load_onnx(path)
    ir.external_data.load_to_model(model)
    return model


def _export(architecture: str, exporter: str, path: Path) -> None:
    loaded = load_torch(resolve(f"tiny-{architecture}"))
    if exporter == "optimum":
        export_optimum(loaded, path)
    elif exporter == "cached":
        export_cached(loaded, path)
    else:
        export_dynamo(loaded, path, sequence_length=LENGTH)


@cache
def _canonical(architecture: str, exporter: str) -> ir.Model:
    return canonicalized(exported(architecture, exporter))


def canonicalized(model: ir.Model, length: int = LENGTH, past: int = 0) -> ir.Model:
    """The model itself, at a number of tokens behind as many past ones."""
    dims = {"past_sequence_length": past} if past else {}
    config = CompileConfig(seq_len=length, rotate=False, freeze_dims=dims)
    passes = default_passes(config, TokenWindows(np.zeros((1, length), np.int64)))
    floats = [item for item in passes if item.produces is Stage.FLOAT]
    run_passes(floats, Compilation(model), after_pass=lambda done: None)
    return model


def some_tokens(model: ir.Model, seed: int = 0, vocabulary: int = 257) -> Feeds:
    """Random ids for the one input of a model."""
    (entry,) = model.graph.inputs
    shape = static_shape(entry)
    return {name_of(entry): np.random.default_rng(seed).integers(0, vocabulary, shape)}


TOY = """
    x = Gather(embed, ids)
    n1 = RMSNormalization(x, g1)
    q = MatMul(n1, wq)
    k = MatMul(n1, wk)
    v = MatMul(n1, wv)
    kt = Transpose<perm: ints = [0, 2, 1]>(k)
    s = MatMul(q, kt)
    p = Softmax(s)
    a = MatMul(p, v)
    o = MatMul(a, wo)
    y = Add(x, o)
    n2 = RMSNormalization(y, g2)
    u = MatMul(n2, up)
    r = Relu(u)
    d = MatMul(r, down)
    z = Add(y, d)
    n3 = RMSNormalization(z, g3)
    logits = MatMul(n3, head)
"""
TOY_LENGTH = 3
TOY_VOCABULARY = 5


def toy(
    *changes: Change,
    width: int = 4,
    inputs: str = "",
    outputs: str = "",
    constants: str = "",
    header: str = "",
    length: int | str = TOY_LENGTH,
) -> ir.Model:
    """One layer, one head, gains away from one. Nodes are named after their first outputs.

    Args:
        changes: of lines of ``TOY``, where a line is given as far as its equals sign: ``"y ="``.
        width: of the stream and of the head.
        inputs, outputs, constants: more of them, in ONNX text, comma first.
        header: opsets, where 23 alone is not enough.
        length: tokens; a name for a dynamic dimension.
    """
    body = TOY
    for start, line in changes:
        (old,) = [row for row in body.splitlines() if row.strip().startswith(start)]
        body = body.replace(old, line)
    h = width
    weights = [
        *(tensor(f"g{i}", h, seed=i, offset=1.0) for i in (1, 2, 3)),
        *(tensor(name, h, h, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))),
        tensor("embed", TOY_VOCABULARY, h, seed=4),
        tensor("up", h, 2 * h, seed=5),
        tensor("down", 2 * h, h, seed=6),
        tensor("head", h, TOY_VOCABULARY, seed=7),
    ]
    used = [item for item in weights if item.split("] ")[1].split(" ")[0] + " " in _words(body)]
    model = parse(
        f"{header} g (int64[1, {length}] ids{inputs})"
        f" => (float[1, {length}, {TOY_VOCABULARY}] logits{outputs})"
        f" <{', '.join(used)}{constants}> {{ {body} }}"
    )
    for node in model.graph:
        node.name = name_of(node.outputs[0])
    return model


def _words(body: str) -> str:
    for mark in "(),":
        body = body.replace(mark, " ")
    return body + " "


def tensor(name: str, *shape: int, seed: int = 0, offset: float = 0.0) -> str:
    """A constant of N(offset, 0.5²) numbers, in ONNX text."""
    numbers = offset + normal(*shape, seed=100 + seed, scale=0.5)
    elements = ", ".join(str(float(x)) for x in numbers.reshape(-1))
    return f"float[{', '.join(map(str, shape))}] {name} = {{{elements}}}"


def toy_feeds(model: ir.Model) -> Feeds:
    """Token ids, and random numbers for every other input."""
    feeds: Feeds = {"ids": np.array([[3, 0, 4]])}
    for value in model.graph.inputs:
        if value.name != "ids" and value.name not in model.graph.initializers:
            feeds[name_of(value)] = normal(*(static_shape(value) or ()), seed=9)
    return feeds


def serialized(model: ir.Model) -> bytes:
    """The whole model, metadata too."""
    proto: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return proto


def stream_values(model: ir.Model, names: list[str], feeds: Feeds) -> list[Array]:
    """Intermediate values of a model."""
    tapped = model.clone()
    by_name = {name_of(v): v for node in tapped.graph for v in node.outputs}
    tapped.graph.outputs.clear()
    tapped.graph.outputs.extend(by_name[name] for name in names)
    return run_model(tapped, feeds)


ROWS = ", int64[2] rows = {3, 8}, int64[3] back = {1, 3, 4}"
GEMM = """
    r2 = Reshape(r, rows)
    d2 = Gemm(r2, down, c)
    d = Reshape(d2, back)
"""
WIDE = f", {tensor('wide', 3, 4, offset=1.0)}"

STREAM_BLOCKED: dict[str, tuple[str, list[Change], More]] = {
    "graph output": ("y", [], {"outputs": ", float[1, 3, 4] y"}),
    "graph input": (
        "extra",
        [("y =", "y = Add(x, extra)")],
        {"inputs": ", float[1, 3, 4] extra"},
    ),
    "read by an unknown operator": (
        "e",
        [("z =", "e = Exp(y)  ze = Add(y, d)  z = Sub(ze, e)")],
        {},
    ),
    "written by an unknown operator": ("t", [("y =", "t = Relu(o)  y = Add(x, t)")], {}),
    "operator of another domain": (
        "t",
        [("y =", "t = acme.Identity(x)  y = Add(x, o)"), ("z =", "zt = Add(y, d)  z = Add(zt, t)")],
        {"header": '<ir_version: 11, opset_import: ["" : 23, "acme" : 1]>'},
    ),
    "constant of another width": (
        "y",
        [("y =", "y1 = Add(x, o)  y = Add(y1, one)")],
        {"constants": ", float one = {1}"},
    ),
    "addend of another width": (
        "y",
        [("y =", "m = Gather(means, ids)  y1 = Add(x, o)  y = Add(y1, m)")],
        {"constants": f", {tensor('means', 5, 1)}"},
    ),
    "weight of two linears": ("wo", [("q =", "q = MatMul(n1, wo)")], {}),
    "table looked up twice": ("embed", [("y =", "w = Gather(embed, ids)  y = Add(w, o)")], {}),
    "weight is an output": ("wo", [], {"outputs": ", float[4, 4] wo"}),
    "weight is an input": ("wo", [], {"inputs": ", float[4, 4] wo"}),
    "norm goes elsewhere": (
        "n2",
        [("r =", "n = Relu(n2)  r1 = Relu(u)  r = Concat<axis: int = 2>(n, n)")],
        {},
    ),
    "norm is an output": ("n2", [], {"outputs": ", float[1, 3, 4] n2"}),
    "norm over two axes": (
        "n2",
        [("n2 =", "n2 = RMSNormalization<axis: int = 1>(y, wide)")],
        {"constants": WIDE},
    ),
    "post-norm": ("t", [("y =", "t = RMSNormalization(o, g1)  y = Add(x, t)")], {}),
    "bias of another shape": (
        "d2",
        [("d =", GEMM)],
        {"constants": ROWS + f", {tensor('c', 3, 4)}"},
    ),
    "bias given at run time": (
        "d2",
        [("d =", GEMM)],
        {"constants": ROWS, "inputs": ", float[4] c"},
    ),
    "features in another order": (
        "t",
        [("n3 =", "t = Slice(z, start, stop, axis, step)  n3 = RMSNormalization(t, g3)")],
        {
            "constants": ", int64[1] start = {-1}, int64[1] stop = {-99}, int64[1] axis = {2}"
            ", int64[1] step = {-1}"
        },
    ),
    "features picked": (
        "t",
        [("n3 =", "t = Gather<axis: int = -1>(z, picks)  n3 = RMSNormalization(t, g3)")],
        {"constants": ", int64[4] picks = {3, 1, 0, 2}"},
    ),
    "division by the stream": (
        "t",
        [("y =", "t = Div(one, x)  y = Add(x, o)")],
        {"constants": ", float one = {1}"},
    ),
    "scaled at run time": (
        "t",
        [("y =", "t = Mul(x, factor)  y = Add(t, o)")],
        {"inputs": ", float[1] factor"},
    ),
    "weight first, mixing tokens": (
        "d",
        [("d =", "d = MatMul(mix, y)")],
        {"constants": f", {tensor('mix', 3, 3)}"},
    ),
    "activation transposed": (
        "t",
        [("u =", "y2 = Reshape(y, flat)  t = Gemm<transA: int = 1>(y2, mix)  u = MatMul(n2, up)")],
        {"constants": f", {tensor('mix', 3, 3)}, int64[2] flat = {{3, 4}}"},
    ),
    "transposed stream": (
        "t",
        [("y =", "t = Transpose<perm: ints = [1, 0, 2]>(x)  y = Add(x, o)")],
        {},
    ),
}

TIED = """
    n2d = Reshape(n3, flat)
    l2d = Gemm<transB: int = 1>(n2d, embed)
    logits = Reshape(l2d, full)
"""
SHAPES = ", int64[2] flat = {3, 4}, int64[3] full = {1, 3, 5}"

STREAM_FREE: dict[str, tuple[list[Change], More]] = {
    "as it is": ([], {}),
    "scaled": (
        [("y =", "x2 = Mul(two, x)  y1 = Add(x2, o)  y = Div(y1, two)")],
        {"constants": ", float[1] two = {2}"},
    ),
    "added to itself": ([("z =", "y2 = Add(y, y)  z = Add(y2, d)")], {}),
    "reshaped": (
        [("y =", "xo = Add(x, o)  y2 = Reshape(xo, flat)  y = Unsqueeze(y2, zero)")],
        {"constants": ", int64[2] flat = {3, 4}, int64[1] zero = {0}"},
    ),
    "constant added": (
        [("y =", "xo = Add(x, o)  y = Add(xo, wide)")],
        {"constants": WIDE},
    ),
    "read without a norm": ([("n2 =", ""), ("u =", "u = MatMul(y, up)")], {}),
    "tied to the head": ([("logits =", TIED)], {"constants": SHAPES}),
    "one norm, weights stored both ways": (
        [
            (
                "k =",
                "n1f = Reshape(n1, flat)  kf = Gemm<transB: int = 1>(n1f, wk)  k = Reshape(kf, b)",
            )
        ],
        {"constants": ", int64[2] flat = {3, 4}, int64[3] b = {1, 3, 4}"},
    ),
    "tokens in another order": (
        [("n3 =", "last = Slice(z, start, stop, axis, step)  n3 = RMSNormalization(last, g3)")],
        {
            "constants": ", int64[1] start = {-1}, int64[1] stop = {-99}, int64[1] axis = {1}"
            ", int64[1] step = {-1}"
        },
    ),
    "tokens picked": (
        [("n3 =", "last = Gather<axis: int = 1>(z, picks)  n3 = RMSNormalization(last, g3)")],
        {"constants": ", int64[3] picks = {2, 2, 0}"},
    ),
    "tokens picked behind the last norm": (
        [("logits =", "last = Gather<axis: int = 1>(n3, picks)  logits = MatMul(last, head)")],
        {"constants": ", int64[3] picks = {2, 2, 0}"},
    ),
    "gain of two norms": ([("n2 =", "n2 = RMSNormalization(y, g1)")], {}),
}

PAST = ", float[1, 3, 4] past"
JOINED: list[Change] = [
    ("p =", "s2 = Concat<axis: int = 2>(s, s)  p = Softmax(s2)"),
    ("a =", "vc = Concat<axis: int = 1>(past, v)  a = MatMul(p, vc)"),
]
BEHIND = ("a =", "vc = Concat<axis: int = 1>(v, past)  a = MatMul(p, vc)")

VALUES_CACHED: dict[str, tuple[list[Change], More, set[str]]] = {
    "handed out": ([], {"outputs": ", float[1, 3, 4] v"}, {"v"}),
    "taken in": (JOINED, {"inputs": PAST}, {"past"}),
    "taken in and handed out": (
        JOINED,
        {"inputs": PAST, "outputs": ", float[1, 6, 4] vc"},
        {"past", "vc"},
    ),
    "past behind the new": ([JOINED[0], BEHIND], {"inputs": PAST}, {"past"}),
}
"""How a cache of values is held; the last item names its inputs and outputs."""

VALUES_BLOCKED: dict[str, tuple[list[Change], More]] = {
    "read by someone else": ([("d =", "dv = Add(n1, v)  d = MatMul(r, down)")], {}),
    "through an activation": ([("a =", "vr = Relu(v)  a = MatMul(p, vr)")], {}),
    "heads through an activation": ([("o =", "ar = Relu(a)  o = MatMul(ar, wo)")], {}),
    "heads taken twice": ([("d =", "d = MatMul(r, down)  e = Exp(a)")], {}),
    "heads an output": ([], {"outputs": ", float[1, 3, 4] a"}),
    "a cache read elsewhere": (
        [*JOINED, ("d =", "e = Exp(past)  d = MatMul(r, down)")],
        {"inputs": PAST},
    ),
    "a cache handed through": (JOINED, {"inputs": PAST, "outputs": PAST}),
    "a cache with a default": (
        JOINED,
        {"inputs": PAST, "constants": f", {tensor('past', 1, 3, 4)}"},
    ),
    "a constant past": (JOINED, {"constants": f", {tensor('past', 1, 3, 4)}"}),
    "two caches": (
        [
            ("p =", "s3 = Concat<axis: int = 2>(s, s, s)  p = Softmax(s3)"),
            ("a =", "vc = Concat<axis: int = 1>(past, v, older)  a = MatMul(p, vc)"),
        ],
        {"inputs": f"{PAST}, float[1, 3, 4] older"},
    ),
    "a cache of other features": (
        [
            ("a =", "vc = Concat<axis: int = -1>(past, v)  ac = MatMul(p, vc)"),
            ("o =", "a = Slice(ac, start, stop, axis)  o = MatMul(a, wo)"),
        ],
        {
            "inputs": PAST,
            "constants": ", int64[1] start = {4}, int64[1] stop = {8}, int64[1] axis = {2}",
        },
    ),
    "weight of another linear": ([("u =", "u0 = MatMul(n2, wv)  u = MatMul(n2, up)")], {}),
    "weight of the heads shared": ([("u =", "u0 = MatMul(n2, wo)  u = MatMul(n2, up)")], {}),
    "weight is an output": ([], {"outputs": ", float[4, 4] wv"}),
    "features transposed": (
        [
            (
                "a =",
                "v5 = Reshape(v, sixths)  vt = Transpose<perm: ints = [0, 3, 2, 1]>(v5)"
                "  vb = Reshape(vt, back)  a = MatMul(p, vb)",
            )
        ],
        {"constants": ", int64[4] sixths = {1, 4, 3, 1}, int64[3] back = {1, 3, 4}"},
    ),
    "rows sliced": (
        [("a =", "vs = Slice(v, start, stop, axis)  a = MatMul(p, vs)")],
        {"constants": ", int64[1] start = {-3}, int64[1] stop = {3}, int64[1] axis = {1}"},
    ),
    "pooled": (
        [("a =", "vp = MaxPool<kernel_shape: ints = [1]>(v)  a = MatMul(p, vp)")],
        {},
    ),
    "bias given at run time": (
        [("v =", "n1f = Reshape(n1, flat)  v1 = Gemm(n1f, wv, c)  v = Reshape(v1, full)")],
        {
            "inputs": ", float[4] c",
            "constants": ", int64[2] flat = {3, 4}, int64[3] full = {1, 3, 4}",
        },
    ),
    "no linear": ([("a =", "vn = Identity(n1)  a = MatMul(p, vn)")], {}),
    "weight first": (
        [("v =", "v = MatMul(mix, n1)")],
        {"constants": f", {tensor('mix', 3, 3)}"},
    ),
}

AT = ", int64[1] c0 = {0}, int64[1] c4 = {4}, int64[1] c8 = {8}, int64[1] c12 = {12}"
AT += (
    ", int64[1] last = {-1}, int64[1] lower = {-99}, int64[1] minus8 = {-8}, int64[1] minus4 = {-4}"
)
AT += ", int64[1] step = {2}, int64[3] three = {4, 4, 4}, int64[1] front = {1}"
AT += f", {tensor('fused', 4, 12)}, {tensor('mix', 12, 4)}"
SLICED = {
    "qkv =": "qkv = MatMul(n1, fused)",
    "q =": "q = Slice(qkv, c0, c4, last)",
    "k =": "k = Slice(qkv, c4, c8, last)",
    "v =": "v = Slice(qkv, c8, c12, last)",
}


def fused(*changes: Change, outputs: str = "") -> ir.Model:
    """The toy decoder with one linear for Q, K and V."""
    lines = SLICED | dict(changes)
    q = f"{lines.pop('qkv =')}  {lines.pop('q =')}"
    return toy(("q =", q), *lines.items(), constants=AT, outputs=outputs)


def embedded() -> ir.Model:
    """The toy decoder with embeddings for an input, as the language half of a larger model."""
    return toy(("x =", "x = Identity(embeddings)"), inputs=", float[1, 3, 4] embeddings")


def shared_biases(bias: str = "0, 0, 0, 0") -> ir.Model:
    """The toy decoder with one bias for its V, O and down projections, as left by deduplication."""
    changes = [
        (
            f"{name} =",
            f"{name}2 = Reshape({x}, flat)  {name}1 = Gemm({name}2, {w}, zeros)"
            f"  {name} = Reshape({name}1, back)",
        )
        for name, x, w in (("v", "n1", "wv"), ("o", "a", "wo"))
    ]
    changes += [("d =", "d2 = Reshape(r, wide)  d1 = Gemm(d2, down, zeros)  d = Reshape(d1, back)")]
    constants = ", int64[2] flat = {3, 4}, int64[2] wide = {3, 8}, int64[3] back = {1, 3, 4}"
    return toy(*changes, constants=constants + f", float[4] zeros = {{{bias}}}")
