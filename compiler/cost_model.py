"""A model of a language model's latency and size on an NPU. All that comes out is modelled.

A roofline: a matrix product takes as long as the slower of computing it and reading its weights.
Figures of a chip are data of the target's profile (``CostTable``), each with its source. They were
derived from whole runs, so they hold what those spent on norms, activation functions and the like;
only tensors that do not fit into the NPU's own memory cost extra. No start of a graph run is
counted, for no source gives its time.

Linears and caches have one number each for each choice of bits, and the rest depends on no choice::

    seconds = other_seconds + Σ linear_seconds(linear, its bits) + Σ cache_seconds(its bits)

so that an integer program can choose bits under a budget of time or bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from qnpu.compiler.bit_choices import LinearBits
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import InvalidConfig, NoCostModel
from qnpu.compiler.target import CostTable, Speed, TargetProfile

_CHANNEL_SCALE_BITS = 32  # float32, one for each output channel of a weight
_CACHES = 2  # of each layer: keys and values
_LEAST_OUTPUT_BITS = 8  # of a linear, however few its input has


@dataclass(frozen=True, slots=True)
class LinearShape:
    """y = x·W with W of shape (features, channels).

    Attributes:
        name: unique within the model.
        features: inputs of each channel.
        channels: outputs.
        role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, ``head``; for reports alone.
        wide_output: y joins the residual stream or leaves the graph, and so keeps its bits
            whatever x has.
    """

    name: str
    features: int
    channels: int
    role: str = ""
    wide_output: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder: its linears, and the sizes that the rest depends on.

    Attributes:
        linears: of all layers, and the head.
        layers: how many.
        heads: of queries, in each layer.
        kv_heads: of keys and of values.
        head_dim: numbers of each head.
        hidden: numbers of a token in the residual stream.
        intermediate: numbers of a token between gate and down projection.
        embedding: numbers of the embedding table; 0 where the head's weight is used for it.
    """

    linears: tuple[LinearShape, ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    embedding: int = 0

    @classmethod
    def llama(
        cls,
        *,
        hidden: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        vocabulary: int,
        tied: bool = False,
    ) -> ModelShape:
        """A decoder of the Llama kind, from the numbers of its published configuration.

        Args:
            hidden, layers, heads, kv_heads, head_dim, intermediate: as the attributes.
            vocabulary: tokens.
            tied: the head multiplies by the embedding table. A rotation unties them.
        """
        queries, keys = heads * head_dim, kv_heads * head_dim
        layer = (
            LinearShape("q", hidden, queries, "q"),
            LinearShape("k", hidden, keys, "k"),
            LinearShape("v", hidden, keys, "v"),
            LinearShape("o", queries, hidden, "o", wide_output=True),
            LinearShape("gate", hidden, intermediate, "gate"),
            LinearShape("up", hidden, intermediate, "up"),
            LinearShape("down", intermediate, hidden, "down", wide_output=True),
        )
        linears = [
            LinearShape(f"layers.{i}.{s.name}", s.features, s.channels, s.role, s.wide_output)
            for i in range(layers)
            for s in layer
        ]
        linears.append(LinearShape("head", hidden, vocabulary, "head", wide_output=True))
        embedding = 0 if tied else vocabulary * hidden
        sizes = layers, heads, kv_heads, head_dim, hidden, intermediate
        return cls(tuple(linears), *sizes, embedding)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a graph.

    Attributes:
        tokens: read at once.
        attended: positions of the caches that they attend to, their own included.
    """

    tokens: int
    attended: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt, and what is generated after it.

    Attributes:
        prompt: tokens; read in runs of ``chunk``, of which the last is padded.
        decode: tokens generated; each is a run of one token.
        chunk: tokens of a prefill run.
        context: positions that every run attends to, in graphs of a fixed context; None: those
            that are there, more with every run.

    Raises:
        DiagnosticError: QN503 a number below 1 (``decode``: below 0), or more tokens than
            ``context``.
    """

    prompt: int
    decode: int
    chunk: int = 128
    context: int | None = None

    def __post_init__(self) -> None:
        for name, number, least in (
            ("prompt", self.prompt, 1),
            ("decode", self.decode, 0),
            ("chunk", self.chunk, 1),
            ("context", self.prompt + self.decode if self.context is None else self.context, 1),
        ):
            if number < least:
                raise DiagnosticError(InvalidConfig(name, f"{number} is less than {least}").at())
        if self.context is not None and self.context < self.prompt + self.decode:
            reason = f"{self.context} has no room for {self.prompt} + {self.decode} tokens"
            raise DiagnosticError(InvalidConfig("context", reason).at())

    @property
    def prefill_runs(self) -> list[Run]:
        """In order."""
        chunks = range(1, ceil(self.prompt / self.chunk) + 1)
        return [Run(self.chunk, self.context or i * self.chunk) for i in chunks]

    @property
    def decode_runs(self) -> list[Run]:
        """In order."""
        steps = range(1, self.decode + 1)
        return [Run(1, self.context or self.prompt + i) for i in steps]

    @property
    def runs(self) -> list[Run]:
        """All, in order."""
        return self.prefill_runs + self.decode_runs


@dataclass(frozen=True, slots=True)
class Cost:
    """What a workload takes. Modelled, not measured.

    Attributes:
        target: the profile that the figures are from.
        prefill_s: time of reading the prompt, s.
        decode_s: time of generating, s.
        weight_bytes: of weights with their scales, the embedding table included.
        kv_bytes: of keys and values of the longest run.
        parts: name of a linear, ``attention`` or ``other`` → s, of both phases together.
    """

    target: str
    prefill_s: float
    decode_s: float
    weight_bytes: int
    kv_bytes: int
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of both phases."""
        return self.prefill_s + self.decode_s

    def to_json(self) -> dict[str, object]:
        """A plain dictionary that says what it is."""
        return {
            "kind": "modelled",
            "target": self.target,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            "parts_s": dict(self.parts),
        }


@dataclass(frozen=True, slots=True)
class CostModel:
    """Time and size on one target. Modelled, not measured.

    Bits that the target does not have are run, and stored, as the next wider ones that it has.
    Activations other than inputs and outputs of linears have the widest it has.

    Attributes:
        target: name of the profile.
        table: its figures.
    """

    target: str
    table: CostTable

    @classmethod
    def of(cls, target: TargetProfile) -> CostModel:
        """The model of a target.

        Raises:
            DiagnosticError: QN508 the profile has no figures.
        """
        if target.cost is None:
            raise DiagnosticError(NoCostModel(target.id, "any bits").at())
        return cls(target.id, target.cost)

    def has(self, weight: int, input: int, *, block: int = 0) -> bool:
        """The profile lists this pair of bits, with a scale per channel or with those of blocks."""
        wanted = input, weight, bool(block)
        rows = self.table.speeds
        return any((r.input, r.weight, bool(r.block_scale_bits)) == wanted for r in rows)

    def linear_bytes(self, shape: LinearShape, bits: LinearBits) -> int:
        """Bytes of a weight: its codes, a scale for each channel, and those of its blocks.

        Raises:
            DiagnosticError: QN508 the profile has no figure for these bits.
        """
        speed = self._speed(bits)
        stored = shape.features * speed.weight + _CHANNEL_SCALE_BITS
        if bits.block:
            stored += ceil(shape.features / bits.block) * speed.block_scale_bits
        return ceil(shape.channels * stored / 8)

    def linear_seconds(self, shape: LinearShape, bits: LinearBits, workload: Workload) -> float:
        """Time of a linear over all runs, and of making its input's codes of wider ones, s.

        Linears that share an input share those codes; the time of that is counted for each.

        Raises:
            DiagnosticError: QN508 the profile has no figure for these bits.
        """
        return self._linear_over(workload.runs, shape, bits)

    def cache_bytes(self, model: ModelShape, bits: int, workload: Workload) -> float:
        """Bytes of the keys of one layer, or of its values, in the longest run.

        Args, raises: as ``cache_seconds``.
        """
        return self._cache_bytes(model, bits, _longest(workload))

    def embedding_bytes(self, model: ModelShape) -> int:
        """Bytes of the embedding table, where it is none of the linears' weights."""
        return ceil(model.embedding * self._widest / 8)

    def cache_seconds(self, model: ModelShape, bits: int, workload: Workload) -> float:
        """Time of the products with the keys of one layer, or with its values, over all runs, s.

        Args:
            model: its sizes.
            bits: of the keys, or of the values.
            workload: what is run.

        Raises:
            DiagnosticError: QN508 the profile has no figure for these bits.
        """
        return self._cache_over(workload.runs, model, bits)

    def other_seconds(self, model: ModelShape, workload: Workload) -> float:
        """Time of what no choice of bits changes, over all runs, s."""
        return self._other_over(workload.runs, model)

    def total(
        self,
        model: ModelShape,
        bits: Mapping[str, LinearBits],
        kv_bits: int,
        workload: Workload,
    ) -> Cost:
        """All together.

        Args:
            model: its sizes.
            bits: name of a linear → its bits, for each linear of the model.
            kv_bits: of keys and values.
            workload: what is run.

        Raises:
            DiagnosticError: QN508 the profile has no figure for some bits.
        """
        prefill = self._parts(workload.prefill_runs, model, bits, kv_bits)
        decode = self._parts(workload.decode_runs, model, bits, kv_bits)
        weights = sum(self.linear_bytes(shape, bits[shape.name]) for shape in model.linears)
        caches = _CACHES * model.layers * self.cache_bytes(model, kv_bits, workload)
        return Cost(
            self.target,
            sum(prefill.values()),
            sum(decode.values()),
            weights + self.embedding_bytes(model),
            ceil(caches),
            {name: seconds + decode[name] for name, seconds in prefill.items()},
        )

    def _parts(
        self, runs: list[Run], model: ModelShape, bits: Mapping[str, LinearBits], kv_bits: int
    ) -> dict[str, float]:
        parts = {
            shape.name: self._linear_over(runs, shape, bits[shape.name]) for shape in model.linears
        }
        parts["attention"] = _CACHES * model.layers * self._cache_over(runs, model, kv_bits)
        parts["other"] = self._other_over(runs, model)
        return parts

    def _linear_over(self, runs: Iterable[Run], shape: LinearShape, bits: LinearBits) -> float:
        sizes = Counter(run.tokens for run in runs)
        return sum(count * self._linear(tokens, shape, bits) for tokens, count in sizes.items())

    def _linear(self, tokens: int, shape: LinearShape, bits: LinearBits) -> float:
        speed = self._speed(bits)
        read = tokens * shape.features * speed.input / 8
        wide = tokens * shape.features * self._widest / 8
        output_bits = self._widest if shape.wide_output else max(speed.input, _LEAST_OUTPUT_BITS)
        written = tokens * shape.channels * output_bits / 8
        moved = self.linear_bytes(shape, bits) + self._spilled(read + written)
        if speed.input < self._widest:
            moved += self._spilled(wide + read)
        return self._roofline(2 * tokens * shape.features * shape.channels, speed, moved)

    def _cache_over(self, runs: Iterable[Run], model: ModelShape, bits: int) -> float:
        speed = self._speed(LinearBits(bits, self._widest))
        seconds = 0.0
        for run in runs:
            operations = 2 * run.tokens * run.attended * model.heads * model.head_dim
            moved = self._cache_bytes(model, bits, run.attended)
            seconds += self._roofline(operations, speed, moved)
        return seconds

    def _cache_bytes(self, model: ModelShape, bits: int, positions: int) -> float:
        """Of the keys of one layer, or of its values."""
        stored = self._speed(LinearBits(bits, self._widest)).weight
        return positions * model.kv_heads * model.head_dim * stored / 8

    def _other_over(self, runs: Iterable[Run], model: ModelShape) -> float:
        moved = sum(model.layers * self._other_bytes(run, model) for run in runs)
        return moved / self.table.bandwidth.value

    def _other_bytes(self, run: Run, model: ModelShape) -> float:
        """What a layer's operators besides products move, where it does not fit on the chip."""
        hidden, inner = run.tokens * model.hidden, run.tokens * model.intermediate
        rotated = run.tokens * (model.heads + model.kv_heads) * model.head_dim
        scores = run.tokens * run.attended * model.heads
        operators = (
            *(2 * hidden, 3 * hidden) * 2,  # twice a norm and an addition
            2 * rotated,  # rotary positions
            2 * scores,  # softmax
            2 * inner,  # activation function
            3 * inner,  # its product with the gate's other half
        )
        return sum(self._spilled(numbers * self._widest / 8) for numbers in operators)

    def _roofline(self, operations: float, speed: Speed, moved: float) -> float:
        """Seconds of a product, which reads and computes at once."""
        rate = self.table.throughput.value * speed.speed / self.table.base
        return max(operations / rate, moved / self.table.bandwidth.value)

    def _spilled(self, size: float) -> float:
        """Bytes of an operator's activations that go through DRAM: all, if they are too many."""
        return size if size > self.table.on_chip.value else 0.0

    @property
    def _widest(self) -> int:
        return max(row.input for row in self.table.speeds)

    def _speed(self, bits: LinearBits) -> Speed:
        """The narrowest pair that holds these bits."""
        rows = [
            row
            for row in self.table.speeds
            if row.input >= bits.input
            and row.weight >= bits.weight
            and bool(row.block_scale_bits) == bool(bits.block)
        ]
        if not rows:
            kind = " in blocks" if bits.block else ""
            missing = f"{bits.weight}-bit weights{kind} and {bits.input}-bit inputs"
            raise DiagnosticError(NoCostModel(self.target, missing).at())
        return min(rows, key=lambda row: (row.input, row.weight))


def _longest(workload: Workload) -> int:
    return max(run.attended for run in workload.runs)
