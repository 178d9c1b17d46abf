"""What onnxruntime's own quantize_static makes of a float model: 8-bit codes, Q/DQ pairs.

    python -m bench.quantize_static model.onnx --out static.onnx --calib wiki.valid.tokens
    python -m bench.quantize_static cached/model.onnx --out static.onnx --calib wiki.valid.tokens

Per channel, MinMax, all other options as they are by default. A model with caches is measured on
whole windows with nothing in the caches.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import onnxruntime as ort
import typer
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bench.open_feeds import open_feeds
from qnpu.compiler.inputs import text_windows
from qnpu.models.load import load_tokenizer
from qnpu.runtime_check.session import Array


def main(
    model: Annotated[Path, typer.Argument(help="Float ONNX file, its tokenizer beside it.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    calib: Annotated[str, typer.Option(help="Text to measure ranges on.")] = "",
    windows: Annotated[int, typer.Option(help="To measure ranges on.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
) -> None:
    """Quantize."""
    found, text = text_windows(
        calib, "calibration", load_tokenizer(str(model)), seq_len, windows, "none"
    )
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    given = open_feeds(session, seq_len, 0)
    feeds = [given | {"input_ids": row[None]} for row in found.windows]
    del session
    print(f"calibrates on {text}")
    with TemporaryDirectory(dir=out.parent) as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(
            str(model),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
        )
        quantize_static(
            str(prepared),
            str(out),
            _Reader(feeds),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=True,
        )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives each batch once."""

    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


if __name__ == "__main__":
    typer.run(main)
