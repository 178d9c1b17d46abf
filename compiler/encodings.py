"""The table of encodings, alive from calibration until Q/DQ pairs carry them in the graph."""

from __future__ import annotations

from collections.abc import Iterator

from qnpu.compiler.bit_plan import spec_to_json
from qnpu.compiler.quant_types import Encoding


class EncodingTable:
    """Value name → encoding, in order of insertion.

    A side table rather than node metadata: onnxscript's rewrites drop metadata.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Encoding] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Encoding:
        return self._by_name[name]

    def __setitem__(self, name: str, encoding: Encoding) -> None:
        self._by_name[name] = encoding

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as written to encodings.json.

        ``scale`` and ``zero_point`` are lists, of length one per tensor. Floats are written so
        that reading them back gives the same float32.
        """
        return {
            "format": "qnpu-encodings",
            "version": 1,
            "tensors": {name: _to_json(encoding) for name, encoding in self._by_name.items()},
        }


def _to_json(encoding: Encoding) -> dict[str, object]:
    return {
        **spec_to_json(encoding.spec),
        "scale": [float(s) for s in encoding.scale.reshape(-1)],
        "zero_point": [int(z) for z in encoding.zero_point.reshape(-1)],
    }
