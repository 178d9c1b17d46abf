"""Turns calibration and evaluation data into feed dictionaries for a graph's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qnpu.compiler.caches import is_past, past_length
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.graph_edit import name_of, static_shape
from qnpu.compiler.op_traits import is_float
from qnpu.compiler.rules import CalibrationMismatch, NoCalibrationData
from qnpu.runtime_check.session import Array, Feeds


class FeedSource(Protocol):
    """Anything that can feed a graph."""

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        """One feed dictionary per run.

        Raises:
            DiagnosticError: QN301 where shapes or names differ, QN305 where an input gets no data.
        """
        ...


@dataclass(frozen=True, slots=True)
class FirstRuns:
    """The first few of another source's runs.

    Attributes:
        source: of all runs.
        count: how many at most.
    """

    source: FeedSource
    count: int

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        """See ``FeedSource``."""
        return self.source.feeds(inputs)[: self.count]


@dataclass(frozen=True, slots=True)
class LastRuns:
    """The last few of another source's runs.

    Attributes:
        source: of all runs.
        count: how many at most, 1 or more.
    """

    source: FeedSource
    count: int

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        """See ``FeedSource``."""
        return self.source.feeds(inputs)[-self.count :]


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Token ids for a language model.

    Attributes:
        windows: int64, shape (windows, tokens). Other usual inputs follow from it: a mask of ones,
            positions from zero, token types of zero. Nothing comes before a window: caches of
            earlier tokens are zeros, which the mask leaves out.
    """

    windows: NDArray[np.int64]

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        """See ``FeedSource``; each window is one run of batch size 1."""
        by_name: list[tuple[str, ir.Value, NDArray[Any]]] = []
        faults: list[Diagnostic] = []
        past = past_length(inputs)
        masked = any(name_of(value) == "attention_mask" for value in inputs)
        caches: Feeds = {}
        for value in inputs:
            name, shape = name_of(value), static_shape(value)
            rows = self._rows(name, past)
            if is_past(value) and is_float(value) and shape is not None and masked:
                caches[name] = np.zeros(shape, _dtype(value))  # one array for all windows
            elif rows is None:
                reason = f"text gives token ids; input `{name}` wants something else"
                if is_past(value) and not masked:
                    reason = f"no attention_mask leaves out what text does not give, `{name}`"
                faults.append(NoCalibrationData(reason).at(value=name))
            elif shape != (1, rows.shape[1]):
                reason = f"windows are (1, {rows.shape[1]}), the graph takes {value.shape}"
                faults.append(CalibrationMismatch(name, reason).at(value=name))
            else:
                by_name.append((name, value, rows))
        if faults:
            raise DiagnosticError(faults)
        return [
            {name: row[i : i + 1].astype(_dtype(value)) for name, value, row in by_name} | caches
            for i in range(len(self.windows))
        ]

    def _rows(self, name: str, past: int) -> NDArray[np.int64] | None:
        match name:
            case "input_ids":
                return self.windows
            case "attention_mask":
                left_out = np.zeros((len(self.windows), past), np.int64)
                return np.concatenate([left_out, np.ones_like(self.windows)], axis=1)
            case "position_ids":
                return np.broadcast_to(np.arange(self.windows.shape[1]), self.windows.shape)
            case "token_type_ids":
                return np.zeros_like(self.windows)
        return None


@dataclass(frozen=True, slots=True)
class ArraySamples:
    """Arrays by input name, as in an .npz file.

    Attributes:
        arrays: input name → array whose first axis counts samples; an input of shape (b, …) takes
            b of them at a time.
    """

    arrays: Mapping[str, Array]

    def feeds(self, inputs: Sequence[ir.Value]) -> list[Feeds]:
        """See ``FeedSource``."""
        faults: list[Diagnostic] = []
        runs: dict[str, int] = {}
        for value in inputs:
            name = name_of(value)
            reason = self._fault(name, value)
            if reason:
                faults.append(CalibrationMismatch(name, reason).at(value=name))
            else:
                runs[name] = len(self.arrays[name]) // (static_shape(value) or (1,))[0]
        known = {value.name for value in inputs}
        faults += [
            CalibrationMismatch(name, "the graph has no such input").at(value=name)
            for name in self.arrays
            if name not in known
        ]
        if len(set(runs.values())) > 1:
            reason = f"arrays give different numbers of runs: {runs}"
            faults.append(CalibrationMismatch(next(iter(runs)), reason).at())
        if faults:
            raise DiagnosticError(faults)
        return [self._run(inputs, index) for index in range(min(runs.values(), default=0))]

    def _fault(self, name: str, value: ir.Value) -> str:
        """Why the array does not fit the input; empty where it does."""
        if name not in self.arrays:
            return "no array of this name"
        array, shape = self.arrays[name], static_shape(value)
        if shape is None or not shape:
            return "the input has no static shape with a first axis"
        if array.ndim != len(shape) or array.shape[1:] != shape[1:]:
            return f"array is {array.shape}, the graph takes {shape}"
        if len(array) == 0 or len(array) % shape[0]:
            return f"{len(array)} samples do not fill runs of {shape[0]}"
        if array.dtype.kind not in "fiub" or (array.dtype.kind == "f") != (
            _dtype(value).kind == "f"
        ):
            return f"array is {array.dtype}, the graph takes {value.dtype}"
        return ""

    def _run(self, inputs: Sequence[ir.Value], index: int) -> Feeds:
        run: Feeds = {}
        for value in inputs:
            size = (static_shape(value) or (1,))[0]
            rows = self.arrays[name_of(value)][index * size : (index + 1) * size]
            run[name_of(value)] = np.ascontiguousarray(rows.astype(_dtype(value)))
        return run


def _dtype(value: ir.Value) -> np.dtype[Any]:
    return np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32)
