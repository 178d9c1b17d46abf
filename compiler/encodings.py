"""The table of encodings, alive from calibration until Q/DQ pairs carry them in the graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from numpy.typing import NDArray

from qnpu.compiler.bit_plan import spec_to_json
from qnpu.compiler.quant_types import Encoding, FloatArray

Codes = NDArray[Any]


class EncodingTable:
    """Value name → encoding, in order of insertion.

    A side table rather than node metadata: onnxscript's rewrites drop metadata. A weight may have
    codes of its own, chosen with regard to data, where rounding to the nearest would do worse.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Encoding] = {}
        self._codes: dict[str, Codes] = {}
        self._learned: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Encoding:
        return self._by_name[name]

    def __setitem__(self, name: str, encoding: Encoding) -> None:
        """Codes that were chosen for another encoding are dropped."""
        self._by_name[name] = encoding
        self._codes.pop(name, None)
        self._learned.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def choose_codes(self, name: str, encoding: Encoding, codes: Codes) -> None:
        """Sets a constant's encoding, and its codes in the type of the encoding's codes."""
        self[name] = encoding
        self._codes[name] = codes

    def has_codes(self, name: str) -> bool:
        """True where codes were chosen."""
        return name in self._codes

    def mark_learned(self, names: Iterable[str], driver: str) -> None:
        """Says of encodings that they were learned, and by which way of learning."""
        self._learned.update(dict.fromkeys(names, driver))

    def is_learned(self, name: str, driver: str | None = None) -> bool:
        """True where ``mark_learned`` said so, of this driver or any, and nothing was set since."""
        found = self._learned.get(name)
        return found is not None and driver in (None, found)

    def forget(self, name: str) -> None:
        """Takes an encoding out."""
        self._by_name.pop(name, None)
        self._codes.pop(name, None)
        self._learned.pop(name, None)

    def quantize(self, name: str, real: FloatArray) -> Codes:
        """Codes of a constant: those chosen, else the nearest to its real values."""
        return self._codes[name] if name in self._codes else self._by_name[name].quantize(real)

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as written to encodings.json.

        ``scale`` and ``zero_point`` are lists, of length one per tensor. Floats are written so
        that reading them back gives the same float32. Of blocks there are ``block_scales``,
        whole numbers times ``scale``: nested lists, a matrix as the weight with one for each block.
        """
        return {
            "format": "qnpu-encodings",
            "version": 1,
            "tensors": {name: _to_json(encoding) for name, encoding in self._by_name.items()},
        }


def _to_json(encoding: Encoding) -> dict[str, object]:
    plain = {
        **spec_to_json(encoding.spec),
        "scale": [float(s) for s in encoding.scale.reshape(-1)],
        "zero_point": [int(z) for z in encoding.zero_point.reshape(-1)],
    }
    if encoding.block_scales is not None:
        plain["block_scales"] = encoding.block_scales.tolist()
    return plain
