"""Tensors that lie in files: same numbers, same strides, nothing held, nothing left behind."""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from qnpu.compiler.stored_tensors import STORED_BYTES, stored_tensor, transposed_tensor

ROWS = 1030


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def mapped_files() -> int:
    """Temporary files of ours that this process has in its memory."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list mapped files")
    lines = maps.read_text().splitlines()
    return sum("(deleted)" in line and tempfile.gettempdir() in line for line in lines)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_numbers_and_strides_are_those_of_the_array(order: tuple[int, ...]) -> None:
    array = numbers(ROWS, 16, 17).transpose(order)
    tensor = stored_tensor(array, name="w")
    read = tensor.numpy()
    np.testing.assert_array_equal(read, array)
    assert read.strides == array.strides
    assert (tensor.name, tensor.dtype, tensor.shape.numpy()) == (
        "w",
        ir.DataType.FLOAT,
        array.shape,
    )
    assert tensor.tobytes() == array.tobytes()


def test_array_with_gaps_or_reversed_is_stored_dense() -> None:
    array = numbers(ROWS, 2, 300)[::-1, 0]
    np.testing.assert_array_equal(stored_tensor(array).numpy(), array)


def test_codes_of_four_bits_are_packed_when_written() -> None:
    codes = np.arange(STORED_BYTES).astype(np.int8) % 16 - 8
    tensor = stored_tensor(codes.astype(ml_dtypes.int4), ir.DataType.INT4)
    expected = ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4)
    assert tensor.nbytes == STORED_BYTES // 2
    assert tensor.tobytes() == expected.tobytes()


def test_memory_is_taken_only_while_an_array_is_held() -> None:
    tensor = stored_tensor(numbers(ROWS, 300))
    before = mapped_files()
    array = tensor.numpy()
    assert mapped_files() == before + 1
    del array
    gc.collect()
    assert mapped_files() == before


def test_array_outlives_its_tensor() -> None:
    array = numbers(ROWS, 300)
    tensor = stored_tensor(array)
    read = tensor.numpy()
    del tensor
    gc.collect()
    np.testing.assert_array_equal(read, array)


def test_who_writes_changes_a_copy_of_his_own() -> None:
    """Torch warns of arrays that cannot be written to."""
    array = numbers(ROWS, 300)
    tensor = stored_tensor(array)
    read = tensor.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.from_numpy(read).zero_()
    assert not read.any()
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_later_changes_of_the_array_do_not_reach_the_file() -> None:
    array = numbers(ROWS, 300)
    tensor = stored_tensor(array)
    array[:] = 0
    assert tensor.numpy().any()


def test_small_array_stays_in_memory() -> None:
    assert isinstance(stored_tensor(numbers(8, 8)), ir.Tensor)
    assert not isinstance(stored_tensor(numbers(ROWS, 300)), ir.Tensor)


def test_transposed_tensor_is_a_view_of_its_source() -> None:
    array = numbers(3, 4, 5)
    tensor = transposed_tensor(ir.tensor(array), [2, 0, 1], "t")
    assert (tensor.name, tensor.shape.numpy()) == ("t", (5, 3, 4))
    np.testing.assert_array_equal(tensor.numpy(), array.transpose(2, 0, 1))
    assert np.shares_memory(tensor.numpy(), array)
