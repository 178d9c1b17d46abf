"""Zero-shot tasks: questions answered by what a language model finds most likely.

Prompts, tokens and scores are those of EleutherAI's lm-evaluation-harness 0.4.13 without examples:
an answer's score is the log-likelihood of its ending, token by token, behind its context.
"""

from __future__ import annotations

import enum
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.special import log_softmax

from qnpu.compiler.caches import ENTRIES_AXIS, is_past, past_length
from qnpu.compiler.diagnostics import Diagnostic, DiagnosticError
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.pass_base import ProgressCallback, no_progress
from qnpu.compiler.rules import CalibrationUnreadable, InvalidTaskItem, MissingFile
from qnpu.models.tokenizer import Tokenizer
from qnpu.runtime_check.feeds import TokenWindows
from qnpu.runtime_check.session import Array, run

_PADDING = 0  # any token: what stands behind the others changes nothing before it

# ------------------------------------------------------------------------------------------- items


class Task(enum.StrEnum):
    """Tasks by the harness's names; ``lambada`` is its ``lambada_openai``."""

    LAMBADA = "lambada"
    PIQA = "piqa"
    ARC_EASY = "arc_easy"
    WINOGRANDE = "winogrande"


@dataclass(frozen=True, slots=True)
class Request:
    """One possible answer.

    Attributes:
        context: text that is given.
        ending: text whose likelihood counts; the space between the two belongs to it.
    """

    context: str
    ending: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        line: of the file, from 1.
        requests: its answers; lambada has one, the word that is looked for.
        gold: index of the right one.
        lengths: characters of each, which ``acc_norm`` divides by; empty where it is not reported.
    """

    line: int
    requests: tuple[Request, ...]
    gold: int
    lengths: tuple[int, ...] = ()


def _encodable(text: str) -> str:
    """Raises: UnicodeEncodeError, which is a ValueError: JSON can hold half a character."""
    text.encode("utf-8")
    return text


_String = Annotated[str, AfterValidator(_encodable)]
_Text = Annotated[_String, Field(min_length=1)]
_Choices = Annotated[list[_Text], Field(min_length=2)]


class _Form(BaseModel):
    """Fields of a line, as one source of a task has them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    def item(self, line: int) -> Item:
        raise NotImplementedError


class _LambadaText(_Form):
    """EleutherAI/lambada_openai: the last word is looked for."""

    text: _String

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(self.text.rpartition(" ")[::2]):
            raise ValueError("text has no last word behind a space")
        return self

    def item(self, line: int) -> Item:
        context, _, word = self.text.rpartition(" ")
        return Item(line, (Request(context, f" {word}"),), 0)


class _LambadaParts(_Form):
    """The same, as mosaicml/llm-foundry has it."""

    context: _Text
    continuation: _Text

    def item(self, line: int) -> Item:
        return Item(line, (Request(self.context, f" {self.continuation}"),), 0)


class _PiqaGoal(_Form):
    """piqa as the harness reads it."""

    goal: _String
    sol1: _Text
    sol2: _Text
    label: Literal[0, 1]

    def item(self, line: int) -> Item:
        return _question(line, f"Question: {self.goal}", [self.sol1, self.sol2], self.label)


class _ArcChoices(BaseModel):
    model_config = ConfigDict(strict=True)

    text: _Choices
    label: list[str]


class _ArcQuestion(_Form):
    """allenai/ai2_arc."""

    question: _String
    choices: _ArcChoices
    answerKey: str  # noqa: N815  (the data set's name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.choices.label) != len(self.choices.text):
            raise ValueError("choices has not as many labels as texts")
        if self.answerKey not in self.choices.label:
            raise ValueError("answerKey is none of the labels")
        return self

    def item(self, line: int) -> Item:
        gold = self.choices.label.index(self.answerKey)
        return _question(line, f"Question: {self.question}", self.choices.text, gold)


class _Query(_Form):
    """piqa and arc_easy as mosaicml/llm-foundry has them; the query begins with ``Question:``."""

    query: _String
    choices: _Choices
    gold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError("gold is no index of choices")
        return self

    def item(self, line: int) -> Item:
        return _question(line, self.query.removesuffix("\n"), self.choices, self.gold)


class _WinograndeSentence(_Form):
    """allenai/winogrande: ``_`` stands for one of the options."""

    sentence: _String
    option1: _Text
    option2: _Text
    answer: Literal["1", "2"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sentence.partition("_")[2].strip():
            raise ValueError("sentence has no `_` with an ending behind it")
        return self

    def item(self, line: int) -> Item:
        before, _, behind = self.sentence.partition("_")
        contexts = [before + option for option in (self.option1, self.option2)]
        return _same_ending(line, contexts, behind.strip(), int(self.answer) - 1)


class _WinograndeParts(_Form):
    """The same, as mosaicml/llm-foundry has it."""

    context_options: Annotated[list[_Text], Field(min_length=2, max_length=2)]
    continuation: _Text
    gold: Literal[0, 1]

    def item(self, line: int) -> Item:
        return _same_ending(line, self.context_options, self.continuation, self.gold)


_FORMS: dict[Task, tuple[type[_Form], type[_Form]]] = {
    Task.LAMBADA: (_LambadaText, _LambadaParts),
    Task.PIQA: (_PiqaGoal, _Query),
    Task.ARC_EASY: (_ArcQuestion, _Query),
    Task.WINOGRANDE: (_WinograndeSentence, _WinograndeParts),
}


def _question(line: int, question: str, choices: Sequence[str], gold: int) -> Item:
    """Each choice stands behind the same question."""
    context = f"{question}\nAnswer:"
    requests = tuple(Request(context, f" {choice}") for choice in choices)
    return Item(line, requests, gold, tuple(len(choice) for choice in choices))


def _same_ending(line: int, contexts: Sequence[str], ending: str, gold: int) -> Item:
    """The same ending stands behind each choice (partial evaluation)."""
    return Item(line, tuple(Request(context, f" {ending}") for context in contexts), gold)


def read_items(path: Path, task: Task, count: int | None = None) -> list[Item]:
    """Items of a .jsonl file: one JSON object a line, blank lines left out.

    Args:
        path: its fields are those of the data set the harness takes, or of llm-foundry's files.
        task: what to read.
        count: at most so many, from the start; None for all.

    Raises:
        DiagnosticError: QN102 no such file, QN302 not UTF-8 or without an item, QN313 a line is no
            item.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # other ends of lines may stand in strings
    except OSError as error:
        raise DiagnosticError(MissingFile(str(path)).at(file=str(path))) from error
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 at byte {error.start}") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise _unreadable(path, "has no item")
    return [_read_item(path, task, number, line) for number, line in filled[:count]]


def _read_item(path: Path, task: Task, number: int, line: str) -> Item:
    names = [", ".join(form.model_fields) for form in _FORMS[task]]
    fix = f"give each line the fields {names[0]}; or {names[1]}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"it is no JSON: {error}"
        raise _fault(path, number, reason, "write one JSON object on each line") from error
    if not isinstance(fields, dict):
        raise _fault(path, number, "it is no JSON object", fix)
    known = [form for form in _FORMS[task] if set(form.model_fields) <= set(fields)]
    if not known:
        raise _fault(path, number, f"fields of {task.value} are missing", fix)
    try:
        return known[0].model_validate(fields).item(number)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"`{place}`: {first['msg']}" if place else first["msg"]
        raise _fault(path, number, reason, fix) from error


def _unreadable(path: Path, reason: str) -> DiagnosticError:
    return DiagnosticError(CalibrationUnreadable(str(path), reason).at(file=str(path)))


def _fault(path: Path, line: int, reason: str, fix: str) -> DiagnosticError:
    return DiagnosticError(InvalidTaskItem(line, reason, fix).at(file=str(path)))


# ------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of one request.

    Attributes:
        fed: what the graph reads: all tokens but the last.
        ending: tokens that count; the last so many rows of logits predict them.
        cut: tokens of the context that were left out in front.
    """

    fed: tuple[int, ...]
    ending: tuple[int, ...]
    cut: int


def encode_request(
    request: Request, tokenizer: Tokenizer, *, bos: bool
) -> tuple[list[int], list[int]]:
    """Tokens of context and ending, cut out of the tokens of both together.

    White space at the end of the context goes to the ending: tokens begin with it.

    Args:
        request: texts.
        tokenizer: of the model.
        bos: put the BOS token in front.
    """
    context = request.context.rstrip()
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    whole = tokenizer.encode(request.context + request.ending)
    given = tokenizer.encode(context)
    return first + given, whole[len(given) :]


def _window(context: list[int], ending: list[int], length: int) -> Window:
    """The last ``length`` tokens before the last one: a long context is cut on the left."""
    whole = [*context, *ending]
    fed = whole[-length - 1 : -1]
    return Window(tuple(fed), tuple(ending), len(whole) - 1 - len(fed))


def item_windows(
    items: Sequence[Item], tokenizer: Tokenizer, length: int, *, bos: bool, file: str
) -> list[list[Window]]:
    """Windows of each item's requests.

    Args:
        items: see ``read_items``.
        tokenizer: of the model.
        length: tokens that a run takes at most.
        bos: put the BOS token in front of each.
        file: where the items came from.

    Raises:
        DiagnosticError: QN313 for each item with an ending that is longer than a run, or with a
            text that has no token.
    """
    found: list[list[Window]] = []
    faults: list[Diagnostic] = []
    for item in items:
        pairs = [encode_request(request, tokenizer, bos=bos) for request in item.requests]
        reason, fix = "", "leave the line out"
        if not all(context and ending for context, ending in pairs):
            reason = "a context or an answer has no token"
        longest = max(len(ending) for _, ending in pairs)
        if longest > length:
            reason = f"an answer of {longest} tokens does not fit in a run of {length}"
            fix = "leave the line out, or compile the model for more tokens (--seq-len)"
        if reason:
            faults.append(InvalidTaskItem(item.line, reason, fix).at(file=file))
        found.append([_window(context, ending, length) for context, ending in pairs])
    if faults:
        raise DiagnosticError(faults)
    return found


# -------------------------------------------------------------------------------------------- runs


class TokenGraph:
    """A causal language model of batch 1, run on texts no longer than what it takes.

    Where its length is static, a shorter text is filled up behind its end, which changes no logits
    before it and costs a whole run; where it is dynamic, a run has the text's own length.

    Args:
        session: with ``input_ids`` (1, S) and logits (1, S, vocabulary).
        inputs: of the graph, or ``token_inputs`` of it.
        logits_name: which output holds the logits.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[ir.Value],
        logits_name: str = "logits",
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._logits_name = logits_name

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits at each token, (tokens, vocabulary).

        Args:
            ids: one token or more.

        Raises:
            DiagnosticError: QN116 the graph does not run, QN301 or QN305 it takes something else
                than a text of this length.
        """
        size = max(static_length(self._inputs) or 0, len(ids))
        tokens = np.full((1, size), _PADDING, np.int64)
        tokens[0, : len(ids)] = ids
        past = past_length(self._inputs)
        inputs = [_bound(value, _usual_sizes(value, size, past)) for value in self._inputs]
        feed = TokenWindows(tokens).feeds(inputs)[0]
        whole: Array = run(self._session, [self._logits_name], feed)[0][0]
        return whole[: len(ids)]


def token_inputs(inputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Copies of a graph's inputs that do not hold the graph, and its weights, in memory."""
    return [_bound(value, {}) for value in inputs]


def static_length(inputs: Sequence[ir.Value]) -> int | None:
    """Tokens that ``input_ids`` takes, or None where that is open."""
    for value in inputs:
        if value.name == "input_ids" and value.shape is not None and len(value.shape) == 2:
            size = value.shape[1]
            return size if isinstance(size, int) else None
    return None


def _usual_sizes(value: ir.Value, tokens: int, past: int) -> dict[int, int]:
    """Sizes by axis of a decoder's inputs."""
    if is_past(value):
        return {0: 1, ENTRIES_AXIS: past}
    return {0: 1, 1: past + tokens if name_of(value) == "attention_mask" else tokens}


def _bound(value: ir.Value, sizes: dict[int, int]) -> ir.Value:
    """A copy of an input, with these sizes where its own are open."""
    shape = value.shape
    if shape is not None:
        dims = [d if isinstance(d, int) else sizes.get(i, d) for i, d in enumerate(shape)]
        shape = ir.Shape(dims)
    return ir.Value(name=value.name, shape=shape, type=value.type)


# ----------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True)
class Scored:
    """What the model makes of an item.

    Attributes:
        item: the question.
        log_likelihoods: of each request's ending, nats.
        greedy: whether each token of it is the most likely one; the least id of several that are.
        cut: whether a context was too long and lost its beginning.
    """

    item: Item
    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    cut: bool


def score_items(
    graph: TokenGraph,
    items: Sequence[Item],
    windows: Sequence[Sequence[Window]],
    *,
    progress: ProgressCallback = no_progress,
    label: str = "evaluate",
) -> list[Scored]:
    """Runs each request once; holds the logits of one run at a time.

    Args:
        graph: what to run.
        items: questions.
        windows: of each, from ``item_windows``.
        progress: called with the fraction done.
        label: step name for progress.

    Raises:
        DiagnosticError: see ``TokenGraph.logits``.
    """
    scored: list[Scored] = []
    for item, requests in zip(items, windows, strict=True):
        results = [_likelihood(graph.logits(window.fed), window.ending) for window in requests]
        values, greedy = zip(*results, strict=True)
        scored.append(Scored(item, values, greedy, any(window.cut for window in requests)))
        progress(label, len(scored) / len(items))
    return scored


def _likelihood(logits: Array, ending: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of an ending, nats, and whether each of its tokens is the most likely.

    Args:
        logits: (tokens, vocabulary); the last rows predict the ending.
        ending: token ids.
    """
    rows, columns = logits[-len(ending) :], np.asarray(ending)
    known = log_softmax(rows.astype(np.float64), axis=-1)
    value = known[np.arange(len(columns)), columns].sum()
    return float(value), bool((rows.argmax(axis=-1) == columns).all())


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure over all items.

    Attributes:
        name: ``acc``, ``acc_norm`` or ``perplexity``, as in the harness.
        value: a share, or exp(mean negative log-likelihood of an ending).
        stderr: standard error; None of a single item.
    """

    name: str
    value: float
    stderr: float | None


def metrics_of(task: Task, scored: Sequence[Scored]) -> list[Metric]:
    """What the harness reports for a task.

    lambada: ``perplexity`` of the last word, and ``acc``, whether it is what the model would write.
    The others: ``acc``, whether the right answer is the most likely; piqa and arc_easy also
    ``acc_norm``, the same by likelihood per character. Of equal answers the first one counts.

    Standard errors of shares are s / √n. That of a perplexity is the perplexity times the standard
    error of the mean log-likelihood, which the harness's bootstrap estimates.

    Args:
        task: which.
        scored: one item or more.
    """
    if task is Task.LAMBADA:
        values = [entry.log_likelihoods[0] for entry in scored]
        mean, error = _mean(values)
        perplexity = math.exp(-mean)
        spread = None if error is None else perplexity * error
        right = [float(entry.greedy[0]) for entry in scored]
        return [Metric("perplexity", perplexity, spread), Metric("acc", *_mean(right))]
    right = [float(_best(entry.log_likelihoods) == entry.item.gold) for entry in scored]
    metrics = [Metric("acc", *_mean(right))]
    if all(entry.item.lengths for entry in scored):
        per_character = [
            np.divide(entry.log_likelihoods, entry.item.lengths).tolist() for entry in scored
        ]
        right = [
            float(_best(values) == entry.item.gold)
            for values, entry in zip(per_character, scored, strict=True)
        ]
        metrics.append(Metric("acc_norm", *_mean(right)))
    return metrics


def _best(values: Sequence[float]) -> int:
    return int(np.argmax(values))


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
