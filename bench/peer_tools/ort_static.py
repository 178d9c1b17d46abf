"""ONNX Runtime's own quantizer: quantize_static's configuration for whole integer graphs.

    python ort_static.py model.onnx tokens.npz out --weights 8 --activations 16

Per channel, min-max, all operators: ``get_qdq_config`` also gives what only moves numbers the
encoding of its input.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
from onnxruntime.quantization import CalibrationDataReader, QuantType, get_qdq_config, quantize
from onnxruntime.quantization.shape_inference import quant_pre_process

_WEIGHTS = {4: QuantType.QInt4, 8: QuantType.QInt8}
_ACTIVATIONS = {8: QuantType.QUInt8, 16: QuantType.QUInt16}


class _Reader(CalibrationDataReader):
    """Gives each window once."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def main() -> None:
    given = common.arguments(__doc__.splitlines()[0])
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.out) as folder:
        source, prepared = Path(folder, "float.onnx"), Path(folder, "prepared.onnx")
        common.save(common.float_model(given.model), source)
        quant_pre_process(
            str(source),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
        )
        config = get_qdq_config(
            str(prepared),
            _Reader(common.feeds(given.tokens)),
            activation_type=_ACTIVATIONS[given.activations],
            weight_type=_WEIGHTS[given.weights],
            per_channel=True,
        )
        config.use_external_data_format = True
        quantize(str(prepared), str(given.out / common.MODEL), config)
    common.note(given.out, ["per channel, min-max"])


if __name__ == "__main__":
    main()
