"""What a compile is asked to do: one frozen dataclass, filled from TOML and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from qnpu.compiler.bit_budget import DEFAULT_WORKLOAD, parse_budget, parse_workload
from qnpu.compiler.bit_choices import BLOCK_BITS, BLOCK_SIZES, WEIGHT_BITS, BitChoices, read_plan
from qnpu.compiler.bit_plan import AUTO, CHOSEN_BITS, LEARNED_BITS, Scheme
from qnpu.compiler.bit_search import SENSITIVITIES
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.emit import emission
from qnpu.compiler.integer_cpu import Cpu
from qnpu.compiler.prefix import parse_prefix
from qnpu.compiler.rules import InvalidConfig, NoWeightBlocks, UnwritableEncodings
from qnpu.compiler.target import DEFAULT_TARGET, check_blocks, load_target
from qnpu.compiler.toml_file import read_toml
from qnpu.runtime_check.observer import RangeMethod

AI_HUB = "ai-hub"
_BYTE_BITS = 8
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """Options of ``qnpu-compile``; field names are the keys of a TOML file.

    Attributes:
        scheme: bits of weights and of linear inputs, e.g. ``w8a16``; ``auto`` where a budget or a
            plan says it linear by linear.
        budget: with ``auto``, what bits are searched for under: ``latency=80ms``, ``size=90MB``,
            ``ppl=1.05`` (times the float model's), or several (``qnpu.compiler.bit_budget``).
        workload: ``PROMPT/DECODE``, tokens, that latency is modelled for.
        sensitivity: how losses of single tensors are measured in a search.
        search_windows: windows of text to measure losses on, behind those of calibration.
        losses: folder to keep measured losses in; empty: that of the results.
        down_bits: bits of the inputs of down projections, 8 or 16.
        gate_bits: bits of what activation functions give in front of down projections, 8 or 16.
        query_bits: bits of queries where scores are computed, 8 or 16.
        logits_bits: bits of the last linear's result, 8 or 16.
        weight_block: features that share a whole block scale of a 4-bit weight (LPBQ): 16, 32, 64
            or 128; 0: one scale per output channel. With a budget a choice for each weight.
        promote: share of the down projections, 0 to 1, that get 16-bit inputs where ``down_bits``
            is 8: those that lose most at 8 bits; and that activation functions keep 16 bits for
            where ``gate_bits`` is 8.
        plan: a bit_plan.json, perhaps edited: bits of linears and caches; all else goes by the
            scheme, which is to be the plan's.
        target: name of a target profile.
        emit: further files to write, by name (see ``qnpu.compiler.emit``).
        calib: text file, Hugging Face data set, or .npz; empty: the built-in text.
        tokenizer: folder or Hugging Face id; empty: the one found with the model.
        calib_windows: windows of text to calibrate on.
        seq_len: tokens per run of the graph; of the prefill graph where there is a context.
        context: tokens that a cache and a run hold together; 0: no cache. Else a prefill and a
            decode graph are made (``qnpu.compiler.cached_decoder``).
        names: of caches where there is a context: those of the ``source``, or ``ai-hub``
            (past_key_0_in, past_key_0_out).
        range_method: how activation ranges are taken from data.
        weights: how weights are rounded: ``gptq`` (those of 4 bits so that outputs stay right),
            ``seqmse`` (to nearest codes, with the scales that outputs suffer least from; those of
            8 bits, too) or ``nearest``.
        learn: ``none``, or learn scales, zero points and 4-bit codes: ``blockwise``, one decoder
            layer at a time, or ``end-to-end``.
        learn_windows: windows of text, from the same place, to round weights and to learn on.
        learn_steps: of the optimizer, per block or end to end in all; None: the driver's.
        learn_batch: windows per step.
        learn_weights: ``codes`` and scales of 4-bit weights, or scales and ``rotations``: the
            paper's way, end to end only.
        learn_tensors: activations whose encodings learn: inputs of ``rotated`` linears, or ``all``.
        distill: part of the end-to-end loss that is KL to the float model, not cross-entropy.
        local_loss: part of the end-to-end steps in which activations' own errors count as well.
        learn_dtype: what is computed in end to end: ``float32``, ``bfloat16``, or ``auto``.
        learn_device: what that runs on: ``cpu``, ``cuda``, or ``auto``: the latter if there is one.
        learn_sharded: under torchrun, each process holds a part of what is learned.
        rotate: fuse the rotations R1 and R2 into the weights, where the graph is a decoder.
        online: rotations to run online: ``r3`` (queries and keys), ``r4`` (inputs of down
            projections).
        rotate_caches: rotate attention values that a cache holds too.
        prefix: tokens to put in front of every text as constants: ``none``, ``auto`` (those that
            leave the fewest outliers), or ids, ``1,2``.
        mask_value: constant that replaces minus infinity in attention masks, real; None: the
            target's.
        integer_io: graph inputs and outputs with an encoding are codes, not real numbers.
        integer: write model.int.onnx as well, which computes on integers alone.
        cpu: that integer graphs are right on: ``any``, or ``vnni``, where ONNX Runtime multiplies
            faster (x86 with VNNI or AMX, Arm).
        freeze_dims: dimension name or ``input:axis`` → size.
        keep_inputs: inputs that freeze-shapes must not bind.
        eval_text: as ``calib``, for perplexity; empty: the built-in text's other part.
        eval_windows: windows to measure perplexity on; 0 for none.
        max_ratio: what the quantized graph's perplexity may be of the float one's; None: anything.
        bos: where a BOS token goes: ``none``, ``stream`` (one in front), ``window`` (one in each),
            ``auto`` (``window`` where the tokenizer adds one).
        passes: further passes, ``MODULE:CLASS[key=value, …]`` or names of entry points
            (``qnpu.compiler.user_passes``).
        exporter: ``dynamo`` or ``optimum``, for models that are not ONNX yet.
        seed: of the rotations.
    """

    scheme: str = "w8a16"
    down_bits: int = 16
    gate_bits: int = 16
    query_bits: int = 16
    logits_bits: int = 16
    weight_block: int = 0
    promote: float = 0.0
    plan: str = ""
    budget: str = ""
    workload: str = DEFAULT_WORKLOAD
    sensitivity: str = "kl"
    search_windows: int = 1
    losses: str = ""
    target: str = DEFAULT_TARGET
    emit: tuple[str, ...] = ()
    calib: str = ""
    tokenizer: str = ""
    calib_windows: int = 8
    seq_len: int = 512
    context: int = 0
    names: str = "source"
    range_method: str = RangeMethod.MSE.value
    weights: str = "gptq"
    learn: str = "none"
    learn_windows: int = 16
    learn_steps: int | None = None
    learn_batch: int = 1
    learn_weights: str = "codes"
    learn_tensors: str = "rotated"
    distill: float = 0.9
    local_loss: float = 0.0
    learn_dtype: str = "auto"
    learn_device: str = "cpu"
    learn_sharded: bool = False
    rotate: bool = True
    rotate_caches: bool = True
    online: tuple[str, ...] = ()
    prefix: str = "none"
    mask_value: float | None = None
    integer_io: bool = False
    integer: bool = False
    cpu: str = "any"
    freeze_dims: Mapping[str, int] = field(default_factory=dict)
    keep_inputs: tuple[str, ...] = ()
    eval_text: str = ""
    eval_windows: int = 4
    max_ratio: float | None = None
    bos: str = "auto"
    passes: tuple[str, ...] = ()
    exporter: str = "dynamo"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: DiagnosticError: QN501, QN502 or QN503 for a value that cannot be meant."""
        self._check_sizes()
        Scheme.parse(self.scheme)
        load_target(self.target)
        for name in self.emit:
            emission(name)
        for option in ("down_bits", "gate_bits", "query_bits", "logits_bits"):
            if getattr(self, option) not in (8, 16):
                _fail(option, f"{getattr(self, option)} is neither 8 nor 16")
        _check_share("promote", self.promote)
        if self.promote and self.down_bits == self.gate_bits == 16:
            _fail("promote", "has no effect where down_bits and gate_bits are 16: all have 16 bits")
        if self.plan and (self.promote or self.down_bits == 8):
            _fail("plan", "says itself which inputs get 16 bits: no promote, no down_bits")
        self._check_search()
        self._check_blocks()
        _check_choice("range_method", self.range_method, [m.value for m in RangeMethod])
        _check_choice("weights", self.weights, ["gptq", "seqmse", "nearest"])
        self._check_learning()
        _check_choice("cpu", self.cpu, [item.value for item in Cpu])
        _check_choice("exporter", self.exporter, ["dynamo", "optimum"])
        for rotation in self.online:
            _check_choice("online", rotation, ["r3", "r4"])
        _check_prefix(self.prefix)
        _check_least("calib_windows", self.calib_windows, 1)
        self._check_evaluation()
        _check_least("search_windows", self.search_windows, 1)
        _check_least("seq_len", self.seq_len, 2)
        _check_choice("names", self.names, ["source", AI_HUB])
        if self.context:
            self._check_context()
        elif self.cpu != Cpu.ANY.value and not self.integer:
            _fail("cpu", "has no effect without integer or a context: no integer graph is made")
        elif self.names != "source":
            _fail("names", "has no effect without a context: no caches are named")
        if not -1e4 < self.mask_constant < 0:
            _fail("mask_value", f"{self.mask_constant:g} is not between -10000 and 0")
        for name, size in self.freeze_dims.items():
            _check_least(f"freeze_dims.{name}", size, 0)

    def _check_sizes(self) -> None:
        """Numbers go into int64 tensors, or become floats; Python has larger ones."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        given |= {f"freeze_dims.{name}": size for name, size in self.freeze_dims.items()}
        for key, value in given.items():
            if isinstance(value, int) and not -_INT64 <= value < _INT64:
                _fail(key, "does not fit into 64 bits")
        _check_least("seed", self.seed, 0)

    def _check_learning(self) -> None:
        _check_choice("learn", self.learn, ["none", "blockwise", "end-to-end"])
        _check_choice("learn_weights", self.learn_weights, ["codes", "rotations"])
        _check_choice("learn_tensors", self.learn_tensors, ["rotated", "all"])
        _check_choice("learn_dtype", self.learn_dtype, ["auto", "float32", "bfloat16"])
        _check_choice("learn_device", self.learn_device, ["auto", "cpu", "cuda"])
        if self.learn_device == "cuda" and not _has_gpu():
            _fail("learn_device", "torch finds no GPU here: cpu, or a torch that was built for one")
        if self.learn_weights == "rotations" and self.learn == "blockwise":
            _fail("learn_weights", "rotations are learned end to end: learn = end-to-end")
        _check_share("distill", self.distill)
        _check_share("local_loss", self.local_loss)
        _check_least("learn_windows", self.learn_windows, 1)
        _check_least("learn_steps", 1 if self.learn_steps is None else self.learn_steps, 1)
        _check_least("learn_batch", self.learn_batch, 1)

    def _check_evaluation(self) -> None:
        _check_choice("bos", self.bos, ["auto", "none", "stream", "window"])
        _check_least("eval_windows", self.eval_windows, 0)
        if self.max_ratio is None:
            return
        if not 0 < self.max_ratio < float("inf"):
            _fail("max_ratio", f"{self.max_ratio:g} is not positive and finite")
        if not self.eval_windows:
            _fail("max_ratio", "has nothing to go by where eval_windows is 0")

    def _check_search(self) -> None:
        parse_workload(self.workload)
        _check_choice("sensitivity", self.sensitivity, list(SENSITIVITIES))
        if self.scheme == AUTO:
            if bool(self.budget) == bool(self.plan):
                _fail("scheme", "auto needs a budget, such as latency=80ms, or a plan, not both")
            if self.promote or self.down_bits == 8:
                _fail("scheme", "auto says which inputs get 16 bits: no promote, no down_bits")
        elif self.budget:
            _fail("budget", f"has no effect with scheme {self.scheme}: take scheme auto")
        if self.budget:
            parse_budget(self.budget)

    def _check_blocks(self) -> None:
        size = self.weight_block
        if not size:
            return
        if self.plan:
            _fail("weight_block", "has no effect: a plan says itself which weights have blocks")
        if size not in BLOCK_SIZES:
            _fail("weight_block", f"{size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.scheme != AUTO and Scheme.parse(self.scheme).weight_bits != BLOCK_BITS:
            fault = NoWeightBlocks(size, f"scheme {self.scheme}", "take one of w4a16, w4a8, w4a4")
            raise DiagnosticError(fault.at())
        check_blocks(size, load_target(self.target))
        if "encodings-0.6.1" in self.emit:
            raise DiagnosticError(UnwritableEncodings("0.6.1").at())
        if self.learn != "none" and self.learn_weights == "rotations":
            _fail("weight_block", "blocks of learned rotations would have to be chosen anew")

    def _check_context(self) -> None:
        _check_least("context", self.context, self.seq_len + 1)
        if self.prefix != "none":
            _fail("prefix", "a cache slides, constant keys and values in front of it do not")
        if self.emit:
            _fail("emit", "has no effect with a context: two graphs are written")

    def check_processes(self, count: int) -> None:
        """Whether several processes can work on this together.

        Raises:
            DiagnosticError: QN503 they cannot.
        """
        if count > 1 and self.learn != "end-to-end":
            _fail("learn", f"{count} processes can share end-to-end learning, nothing else")
        if count > 1 and self.learn_device != "cpu":
            _fail("learn_device", f"{count} processes learn together on cpu alone")
        if self.learn_batch % count:
            _fail("learn_batch", f"{self.learn_batch} is no multiple of {count} processes")

    @property
    def windows(self) -> int:
        """Windows of text that are needed: to measure on and, where codes are chosen, for that."""
        least = min(WEIGHT_BITS) if self.scheme == AUTO else self.bits_by_role.weight_bits
        learns = self.learn != "none" or least <= self.chosen_bits
        return max(self.calib_windows, self.learn_windows * learns)

    @property
    def all_windows(self) -> int:
        """Those, and behind them the ones that a search measures losses on."""
        return self.windows + self.search_windows * bool(self.budget)

    @property
    def chosen_bits(self) -> int:
        """Widest weights whose codes or scales are chosen on data; 0 for none."""
        return {"gptq": CHOSEN_BITS, "seqmse": LEARNED_BITS, "nearest": 0}[self.weights]

    @property
    def bits_by_role(self) -> Scheme:
        """The scheme, with bits as asked."""
        return dataclasses.replace(
            Scheme.parse(self.scheme),
            down_bits=self.down_bits,
            gate_bits=self.gate_bits,
            query_bits=self.query_bits,
            logits_bits=self.logits_bits,
            block=self.weight_block,
        )

    @property
    def snaps_scales(self) -> bool:
        """An integer graph gains by scales of few bits: linears take 8, and no scale is learned.

        Where they take 16, sums need 64 bits or two bytes anyway, and few bits would only make
        results common that lie halfway between two codes.
        """
        integers = self.integer or self.context > 0
        return integers and self.learn == "none" and self.bits_by_role.input_bits <= _BYTE_BITS

    @property
    def bit_choices(self) -> BitChoices | None:
        """What the plan says.

        Raises:
            DiagnosticError: QN102 or QN540 it cannot be read, QN503 it is of another scheme.
        """
        if not self.plan:
            return None
        scheme, choices = read_plan(Path(self.plan))
        if scheme != self.scheme:
            _fail("scheme", f"is {self.scheme}, but {self.plan} is a plan for {scheme}")
        return choices

    @property
    def mask_constant(self) -> float:
        """``mask_value``, or the target's."""
        if self.mask_value is not None:
            return self.mask_value
        return load_target(self.target).mask_value

    def to_json(self) -> dict[str, object]:
        """A plain dictionary, as written to report.json."""
        return dataclasses.asdict(self)


def read_config(path: Traversable) -> dict[str, Any]:
    """Keys and values of a TOML file, checked against ``CompileConfig``.

    Raises:
        DiagnosticError: QN102 no such file, QN503 not TOML, an unknown key, or a wrong type.
    """
    table = read_toml(path)
    kinds = get_type_hints(CompileConfig)
    kinds |= {"mask_value": float, "max_ratio": float, "learn_steps": int}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(sorted(kinds))
            _fail(key, f"unknown key; known are {known}", str(path))
        if key in ("keep_inputs", "online", "emit", "passes"):
            if not isinstance(value, list) or not all(type(v) is str for v in value):
                _fail(key, "must be a list of names", str(path))
            table[key] = tuple(value)
        elif key == "freeze_dims":
            if not isinstance(value, dict) or not all(type(v) is int for v in value.values()):
                _fail(key, "must be a table of whole numbers", str(path))
        elif type(value) is not kinds[key] and not (kinds[key] is float and type(value) is int):
            _fail(key, f"must be {kinds[key].__name__}", str(path))
    return table


def _fail(key: str, reason: str, file: str = "") -> None:
    raise DiagnosticError(InvalidConfig(key, reason).at(file=file))


def _has_gpu() -> bool:
    import torch  # noqa: PLC0415  (takes a second)

    return torch.cuda.is_available()


def _check_choice(key: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        _fail(key, f"`{value}` is not one of {', '.join(choices)}")


def _check_share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        _fail(key, f"{value:g} is not between 0 and 1")


def _check_least(key: str, value: int, least: int) -> None:
    if value < least:
        _fail(key, f"{value} is less than {least}")


def _check_prefix(text: str) -> None:
    try:
        parse_prefix(text)
    except ValueError:
        _fail("prefix", f"`{text}` is neither auto, none nor token ids such as 1,2")
