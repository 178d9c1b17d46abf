"""What every torch operator of ``torch_ops`` and ``torch_layers`` is made of: types and attributes.

An operator is built once per node, which reads its attributes, and then called once per run. What a
builder did not read it does not know, so an attribute that is left over is a fault: nothing is
ignored silently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

Result = Tensor | Sequence[Tensor]
Kernel = Callable[..., Result]
"""Takes a node's inputs by position, None for an absent one, and returns its outputs."""

OLDEST_OPSET = 13

# Types that torch has no arithmetic for travel in a wider one; every number of theirs fits it.
_TYPES = {
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT2: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.UINT32: torch.int64,
}
_NUMPY_CARRIERS = {
    ir.DataType.INT2: np.int8,
    ir.DataType.INT4: np.int8,
    ir.DataType.UINT2: np.uint8,
    ir.DataType.UINT4: np.uint8,
    ir.DataType.UINT16: np.int32,
    ir.DataType.UINT32: np.int64,
}


class Unsupported(Exception):  # noqa: N818 never seen outside: a coded diagnostic takes its place
    """An operator, attribute or type that has no torch counterpart here."""


def torch_type(dtype: ir.DataType | None, working: torch.dtype) -> torch.dtype:
    """The torch type that values of an ONNX type have.

    Args:
        dtype: of the value.
        working: what float32 values are computed in; every other type stands for itself.

    Raises:
        Unsupported: strings, complex numbers, 8-bit and 4-bit floats, uint64.
    """
    if dtype is ir.DataType.FLOAT:
        return working
    if dtype is None or dtype not in _TYPES:
        raise Unsupported(f"type {dtype.name if dtype else 'unknown'}")
    return _TYPES[dtype]


def tensor_of(
    source: ir.TensorProtocol, working: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """An ONNX tensor as a torch one; shares memory wherever both have the same type.

    Raises:
        Unsupported: see ``torch_type``.
    """
    wanted = torch_type(source.dtype, working)
    array = source.numpy()
    if source.dtype in _NUMPY_CARRIERS:
        array = array.astype(_NUMPY_CARRIERS[source.dtype])
    if source.dtype is ir.DataType.BFLOAT16:
        return shared(array.view(np.int16)).view(torch.bfloat16).to(device)
    return shared(array).to(device=device, dtype=wanted)


def shared(array: NDArray[Any]) -> Tensor:
    """A torch view of an array, which may be read-only: nothing here writes into its inputs."""
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)


class Form:
    """What a node asks for besides its inputs. Keeps count of the attributes that were read.

    Attributes:
        node: the node.
        working: torch type of float32 values.
        version: opset of the node's domain.
        outputs: how many outputs are asked for, up to the last one with a name.
    """

    def __init__(self, node: ir.Node, working: torch.dtype) -> None:
        self.node = node
        self.working = working
        self.version = _version(node)
        named = [index for index, value in enumerate(node.outputs, start=1) if value.name]
        self.outputs = max(named, default=0)
        self._read: set[str] = set()

    def _attribute(self, name: str) -> ir.Attr | None:
        self._read.add(name)
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            raise Unsupported(f"attribute `{name}` of a function")
        return attribute

    def integer(self, name: str, default: int = 0) -> int:
        """An INT attribute."""
        attribute = self._attribute(name)
        return attribute.as_int() if attribute else default

    def flag(self, name: str, default: bool = False) -> bool:
        """An INT attribute that is 0 or 1."""
        return bool(self.integer(name, int(default)))

    def number(self, name: str, default: float = 0.0) -> float:
        """A FLOAT attribute."""
        attribute = self._attribute(name)
        return float(attribute.as_float()) if attribute else default

    def text(self, name: str, default: str = "") -> str:
        """A STRING attribute."""
        attribute = self._attribute(name)
        return attribute.as_string() if attribute else default

    def integers(self, name: str) -> list[int] | None:
        """An INTS attribute; None where it is not given."""
        attribute = self._attribute(name)
        return [int(item) for item in attribute.as_ints()] if attribute else None

    def numbers(self, name: str) -> list[float] | None:
        """A FLOATS attribute; None where it is not given."""
        attribute = self._attribute(name)
        return [float(item) for item in attribute.as_floats()] if attribute else None

    def tensor(self, name: str) -> Tensor | None:
        """A TENSOR attribute; None where it is not given."""
        attribute = self._attribute(name)
        return tensor_of(attribute.as_tensor(), self.working) if attribute else None

    def input_type(self, index: int) -> ir.DataType | None:
        """ONNX type of an input; None where it is absent or not known."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return value.dtype if value is not None else None

    def has_input(self, index: int) -> bool:
        """True where an input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def only(self, name: str, *allowed: Any) -> None:
        """Reads an attribute that has to be absent or to have one of these values.

        Raises:
            Unsupported: it has another.
        """
        attribute = self._attribute(name)
        value = attribute.value if attribute else None
        if attribute is not None and value not in allowed:
            raise Unsupported(f"`{name}` = {value}")

    def one_output(self) -> None:
        """States that only the first output is computed.

        Raises:
            Unsupported: someone uses another.
        """
        used = [v for v in self.node.outputs[1:] if v.uses() or v.is_graph_output()]
        if used:
            raise Unsupported(f"output `{used[0].name}`")

    def unread(self) -> list[str]:
        """Names of attributes that nobody has read."""
        return [name for name in self.node.attributes if name not in self._read]


def _version(node: ir.Node) -> int:
    imports = node.graph.opset_imports if node.graph is not None else {}
    default = imports.get("ai.onnx", 23) if node.domain == "" else 1
    return node.version or imports.get(node.domain, default)


@dataclass(frozen=True, slots=True)
class Operator:
    """How an ONNX operator is run.

    Attributes:
        build: reads the attributes and returns the kernel.
        parameters: inputs that say how the node works; the kernel gets them as Python numbers.
        precise: inputs that stay float32 where floats are otherwise computed in fewer bits.
    """

    build: Callable[[Form], Kernel]
    parameters: tuple[int, ...] = ()
    precise: tuple[int, ...] = ()


def plain(function: Kernel) -> Operator:
    """An operator without attributes."""
    return Operator(lambda form: function)


def normalized(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis + rank if axis < 0 else axis


def in_float32(x: Tensor) -> Tensor:
    """The numbers in float32 at least, for statistics of tensors of fewer bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
