"""AMD Quark's ONNX quantizer: SmoothQuant, per channel, min-max, all operators.

    python quark_onnx.py model.onnx tokens.npz out --weights 8 --activations 16

QuaRot is left out: it wants a file that names each rotated weight, so more than the model.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import (
    Int8Spec,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    SmoothQuantConfig,
    UInt8Spec,
    UInt16Spec,
)
from quark.onnx.quantization.config.spec import CalibMethod, QuantGranularity

_ACTIVATIONS = {8: UInt8Spec, 16: UInt16Spec}


class _Reader(CalibrationDataReader):
    """Gives each window once, again after a rewind."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._feeds = feeds
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self._feeds)

    reset_iter = rewind  # Quark's name of it


def main() -> None:
    given = common.arguments(__doc__.splitlines()[0])
    given.out.mkdir(parents=True, exist_ok=True)
    config = QConfig(
        QLayerConfig(
            input_tensors=_ACTIVATIONS[given.activations](calibration_method=CalibMethod.MinMax),
            weight=Int8Spec(
                calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel
            ),
        ),
        algo_config=[SmoothQuantConfig()],
        use_external_data_format=True,
        QuantizeAllOpTypes=True,
    )
    with TemporaryDirectory(dir=given.out) as folder:
        source = Path(folder, "float.onnx")
        common.save(common.float_model(given.model), source)
        ModelQuantizer(config).quantize_model(
            str(source), str(given.out / common.MODEL), _Reader(common.feeds(given.tokens))
        )
    common.note(given.out, ["per channel, SmoothQuant, min-max"])


if __name__ == "__main__":
    main()
