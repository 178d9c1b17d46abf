"""loss_record: numbers stay, whatever moment a process is killed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.runtime_check.loss_record import LossRecord

WORK, OTHER = "a1" * 32, "b2" * 32


def opened(folder: Path | None, work: str = WORK) -> LossRecord:
    record = LossRecord(folder)
    record.open(work)
    return record


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    first = opened(tmp_path / "new" / "folder")
    first.add("kl weight é 4", 0.1 + 0.2)
    first.add("kl input x 8", 0.0)
    again = opened(tmp_path / "new" / "folder")
    assert again.get("kl weight é 4") == 0.1 + 0.2
    assert again.get("kl input x 8") == 0.0
    assert again.get("unknown") is None


def test_of_another_model_nothing_is_known(tmp_path: Path) -> None:
    opened(tmp_path).add("x", 1.0)
    assert opened(tmp_path, OTHER).get("x") is None
    assert opened(tmp_path).get("x") == 1.0


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_a_kill_cut_off(tmp_path: Path, cut: int) -> None:
    record = opened(tmp_path)
    record.add("x", 1.5)
    record.add("y", 2.25)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    again = opened(tmp_path)
    assert again.get("x") == 1.5
    assert again.get("y") in (None, 2.25)
    again.add("z", 3.0)
    last = opened(tmp_path)
    assert (last.get("x"), last.get("z")) == (1.5, 3.0)


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    opened(tmp_path).add("x", 1.5)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b'\xff\n{"x": 3}\n["x"]\n[1, 2, 3]\n["y", "many"]\n' + file.read_bytes())
    again = opened(tmp_path)
    assert again.get("x") == 1.5
    assert again.get("y") is None


def test_without_a_folder_numbers_are_kept_in_memory() -> None:
    record = opened(None)
    record.add("x", 1.0)
    assert record.get("x") == 1.0
    record.open(OTHER)
    assert record.get("x") is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError) as caught:
        opened(tmp_path / "file")
    assert caught.value.codes == ["QN901"]
