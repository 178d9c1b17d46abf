"""Text sources, token windows and arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.models.token_data import Bos, load_arrays, read_text, token_windows

BOS = 7


def code(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(DiagnosticError) as caught:
        call(*args, **options)
    (only,) = caught.value.codes
    return only


def test_built_in_parts_share_no_paragraph() -> None:
    calibration, description = read_text(None, split="calibration")
    evaluation, _ = read_text(None, split="evaluation")
    assert len(calibration) > 150_000
    assert len(evaluation) > 80_000
    assert "calibration" in description
    shared = {" ".join(p.split()) for p in calibration.split("\n\n")} & {
        " ".join(p.split()) for p in evaluation.split("\n\n")
    }
    assert shared == set()
    assert read_text(None, split="evaluation")[0] == evaluation


def test_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\nend")
    assert read_text(str(path), split="calibration") == ("naïve\r\nend", str(path))


def test_file_without_suffix_wins_over_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert read_text("org/name", split="calibration")[0] == "here"


def test_text_faults(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "empty.txt").write_text(" \n")
    assert code(read_text, str(tmp_path / "latin.txt"), split="calibration") == "QN302"
    assert code(read_text, str(tmp_path / "empty.txt"), split="calibration") == "QN302"
    assert code(read_text, str(tmp_path), split="calibration") == "QN302"
    assert code(read_text, str(tmp_path / "none.txt"), split="calibration") == "QN102"
    assert code(read_text, "data/none.txt", split="calibration") == "QN102"


def test_data_set_names_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"id": [1, 2], "body": ["first", "second"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("org/set", split="calibration") == ("first\n\nsecond", "org/set:train")
    read_text("org/set:small", split="evaluation")
    read_text("org/set:validation", split="evaluation")
    _, description = read_text("wikitext2", split="evaluation")
    assert asked == [
        ("org/set", None, "train"),
        ("org/set", "small", "test"),
        ("org/set", None, "validation"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ]
    assert description == "Salesforce/wikitext:wikitext-2-raw-v1:test"


def test_data_set_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("hub is down")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DiagnosticError, match="hub is down") as caught:
        read_text("org/set", split="calibration")
    assert caught.value.codes == ["QN302"]


@given(
    total=st.integers(0, 200),
    window=st.integers(2, 40),
    count=st.none() | st.integers(1, 9),
    bos=st.sampled_from(["none", "stream", "window"]),
)
def test_windows_are_the_stream_cut(total: int, window: int, count: int | None, bos: Bos) -> None:
    ids = list(range(100, 100 + total))
    stream = [BOS, *ids] if bos == "stream" else ids
    room = window - 1 if bos == "window" else window
    whole = len(stream) // room
    if whole == 0:
        assert code(token_windows, ids, window=window, count=count, bos=bos, bos_id=BOS) == "QN302"
        return
    cut = token_windows(ids, window=window, count=count, bos=bos, bos_id=BOS)
    rows = min(count or whole, whole)
    assert cut.shape == (rows, window)
    assert cut.dtype == np.int64
    text = cut[:, 1:] if bos == "window" else cut
    assert text.reshape(-1).tolist() == stream[: rows * room]
    if bos == "window":
        assert set(cut[:, 0].tolist()) == {BOS}


def test_window_faults() -> None:
    assert code(token_windows, [1, 2], window=2, bos="stream", bos_id=None) == "QN302"
    for options in ({"window": 0}, {"window": 1, "bos": "window"}, {"window": 2, "count": 0}):
        with pytest.raises(ValueError, match="windows"):
            token_windows([1, 2, 3], bos_id=BOS, **options)


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.ones((2, 4), np.int64),
    }
    np.savez(tmp_path / "data.npz", **arrays)
    loaded = load_arrays(tmp_path / "data.npz")
    assert list(loaded) == ["x", "ids"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


def test_array_faults(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros(1000))
    path.write_bytes(path.read_bytes()[:500])
    assert code(load_arrays, path) == "QN302"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    assert code(load_arrays, path) == "QN302"
    np.savez(path)
    assert code(load_arrays, path) == "QN302"
    path.write_bytes(b"")
    assert code(load_arrays, path) == "QN302"
    path.write_text("not an archive")
    assert code(load_arrays, path) == "QN302"
    np.save(tmp_path / "bare.npy", np.zeros(3))
    assert code(load_arrays, tmp_path / "bare.npy") == "QN302"
    assert code(load_arrays, tmp_path) == "QN302"
    assert code(load_arrays, tmp_path / "none.npz") == "QN102"
