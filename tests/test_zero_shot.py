"""Zero-shot tasks: fields, tokens, likelihoods and scores against direct ones, and the command."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from qnpu.compiler.cli_eval import eval_app
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.output import save_model
from qnpu.models.load import load_onnx
from qnpu.models.tokenizer import ByteTokenizer
from qnpu.passes.lower_io import LowerIo
from qnpu.runtime_check.session import Mode, open_session
from qnpu.runtime_check.zero_shot import (
    Item,
    Request,
    Scored,
    Task,
    TokenGraph,
    Window,
    encode_request,
    item_windows,
    metrics_of,
    read_items,
    score_items,
    static_length,
    token_inputs,
)
from tests.commands import Done, call
from tests.conftest import normal, parse, shared_file

WORDS = ByteTokenizer()
VOCABULARY = 257

ROWS: dict[Task, tuple[dict[str, Any], dict[str, Any]]] = {
    Task.LAMBADA: (
        {"text": "He took the cup and drank the tea"},
        {"context": "He took the cup and drank the", "continuation": "tea"},
    ),
    Task.PIQA: (
        {"goal": "Open a tin.", "sol1": "Pull.", "sol2": "Wait for it.", "label": 1},
        {"query": "Question: Open a tin.\n", "choices": ["Pull.", "Wait for it."], "gold": 1},
    ),
    Task.ARC_EASY: (
        {
            "question": "What melts?",
            "choices": {"text": ["ice", "a rock", "gas"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {"query": "Question: What melts?", "choices": ["ice", "a rock", "gas"], "gold": 0},
    ),
    Task.WINOGRANDE: (
        {
            "sentence": "The cup missed the plate as _ was small. ",
            "option1": "the cup",
            "option2": "the plate",
            "answer": "2",
        },
        {
            "context_options": [
                "The cup missed the plate as the cup",
                "The cup missed the plate as the plate",
            ],
            "continuation": "was small.",
            "gold": 1,
        },
    ),
}
ITEMS = {
    Task.LAMBADA: Item(1, (Request("He took the cup and drank the", " tea"),), 0),
    Task.PIQA: Item(
        1,
        (
            Request("Question: Open a tin.\nAnswer:", " Pull."),
            Request("Question: Open a tin.\nAnswer:", " Wait for it."),
        ),
        1,
        (5, 12),
    ),
    Task.ARC_EASY: Item(
        1,
        tuple(
            Request("Question: What melts?\nAnswer:", text) for text in (" ice", " a rock", " gas")
        ),
        0,
        (3, 6, 3),
    ),
    Task.WINOGRANDE: Item(
        1,
        (
            Request("The cup missed the plate as the cup", " was small."),
            Request("The cup missed the plate as the plate", " was small."),
        ),
        1,
    ),
}


def put(folder: Path, *rows: object) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


# ------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("task", Task)
def test_both_forms_of_a_task_give_the_same_item(task: Task, tmp_path: Path) -> None:
    """The prompts are written out here as lm-evaluation-harness forms them."""
    first, second = read_items(put(tmp_path, *ROWS[task]), task)
    assert first == ITEMS[task]
    assert second == Item(2, first.requests, first.gold, first.lengths)


def test_lines_and_counts(tmp_path: Path) -> None:
    """Blank lines are none, a line separator in a string ends no line, more fields are left."""
    row = {"text": "one\u2028two three", "domain": None}
    path = tmp_path / "items.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    path.write_text(f"\ufeff{text}\r\n\n{text}\n{text}", "utf-8")
    assert [item.line for item in read_items(path, Task.LAMBADA)] == [1, 3, 4]
    (item,) = read_items(path, Task.LAMBADA, 1)
    assert item.requests == (Request("one\u2028two", " three"),)


PIQA, ARC = ROWS[Task.PIQA], ROWS[Task.ARC_EASY]


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (Task.LAMBADA, "{"),
        (Task.LAMBADA, "[" * 100_000),
        (Task.LAMBADA, "[1]"),
        (Task.LAMBADA, {"context": "a"}),
        (Task.LAMBADA, {"text": "alone"}),
        (Task.LAMBADA, {"text": "ends with a space "}),
        (Task.LAMBADA, {"text": 3}),
        (Task.LAMBADA, {"text": "\ud800 lone"}),
        (Task.LAMBADA, {"context": "", "continuation": "a"}),
        (Task.PIQA, ROWS[Task.LAMBADA][0]),
        (Task.PIQA, PIQA[0] | {"label": 2}),
        (Task.PIQA, PIQA[0] | {"label": "1"}),
        (Task.PIQA, PIQA[0] | {"sol2": ""}),
        (Task.PIQA, PIQA[1] | {"gold": 2}),
        (Task.PIQA, PIQA[1] | {"gold": -1}),
        (Task.PIQA, PIQA[1] | {"choices": ["one"]}),
        (Task.ARC_EASY, ARC[0] | {"answerKey": "D"}),
        (Task.ARC_EASY, ARC[0] | {"choices": {"text": ["a", "b"], "label": ["A"]}}),
        (Task.ARC_EASY, ARC[0] | {"choices": ["a", "b"]}),
        (Task.WINOGRANDE, ROWS[Task.WINOGRANDE][0] | {"sentence": "No gap."}),
        (Task.WINOGRANDE, ROWS[Task.WINOGRANDE][0] | {"answer": 1}),
        (Task.WINOGRANDE, ROWS[Task.WINOGRANDE][1] | {"context_options": ["a", "b", "c"]}),
    ],
)
def test_lines_that_are_no_items(task: Task, line: object, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(ROWS[task][0]) + "\n" + text, "utf-8")
    with pytest.raises(DiagnosticError) as caught:
        read_items(path, task)
    (fault,) = caught.value.diagnostics
    assert fault.code == "QN313"
    assert fault.location.file == str(path)
    assert fault.rule.message().startswith("line 2: ")
    assert len(read_items(path, task, 1)) == 1


@pytest.mark.parametrize(("content", "code"), [(b"\n \n", "QN302"), (b"\xff", "QN302")])
def test_files_without_items(content: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    for place, expected in ((path, code), (tmp_path / "absent", "QN102"), (tmp_path, "QN102")):
        with pytest.raises(DiagnosticError) as caught:
            read_items(place, Task.PIQA)
        assert caught.value.codes == [expected]


def test_the_shared_files_are_read() -> None:
    counts = {"lambada_openai": 5153, "piqa": 1838, "arc_easy": 2376, "winogrande": 1267}
    for (name, count), task in zip(counts.items(), Task, strict=True):
        items = read_items(shared_file(f"data/{name}.jsonl"), task)
        assert len(items) == count
        sizes = {len(item.requests) for item in items}
        assert sizes == {1 if task is Task.LAMBADA else 4 if task is Task.ARC_EASY else 2}


# ------------------------------------------------------------------------------------------ tokens


class Pairs:
    """Joins a space with the byte behind it into a token, as real tokenizers do."""

    bos_token_id = 1000
    eos_token_id = 1000
    adds_bos = True

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for byte in text.encode("utf-8"):
            if found and found[-1] == ord(" "):
                found[-1] = 256 + byte
            else:
                found.append(byte)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def test_spaces_belong_to_the_ending() -> None:
    expected = [ord("a")], [256 + ord("b"), ord("c")]
    for request in (Request("a", " bc"), Request("a ", "bc")):
        assert encode_request(request, Pairs(), bos=False) == expected
    context, ending = encode_request(Request("a", " bc"), Pairs(), bos=True)
    assert (context, ending) == ([1000, *expected[0]], expected[1])


@given(context=st.text(max_size=9), ending=st.text(max_size=9), bos=st.booleans())
def test_context_and_ending_are_the_tokens_of_both(context: str, ending: str, bos: bool) -> None:
    given_ids, ending_ids = encode_request(Request(context, ending), WORDS, bos=bos)
    first = [WORDS.bos_token_id] * bos
    assert given_ids == first + WORDS.encode(context.rstrip())
    assert given_ids + ending_ids == first + WORDS.encode(context + ending)


def windows(text: str, ending: str, length: int, bos: bool = False) -> Window:
    item = Item(7, (Request(text, ending),), 0)
    ((window,),) = item_windows([item], WORDS, length, bos=bos, file="x.jsonl")
    return window


def test_a_long_context_loses_its_beginning() -> None:
    """One token more than the run fits: the last one is not fed."""
    assert windows("abcd", " ef", 6) == Window(tuple(b"abcd e"), tuple(b" ef"), 0)
    assert windows("abcd", " ef", 9) == Window(tuple(b"abcd e"), tuple(b" ef"), 0)
    assert windows("abcd", " ef", 5) == Window(tuple(b"bcd e"), tuple(b" ef"), 1)
    assert windows("abcd", " ef", 3) == Window(tuple(b"d e"), tuple(b" ef"), 3)
    assert windows("abcd", " ef", 5, bos=True).cut == 2


@pytest.mark.parametrize(
    ("request_", "length"),
    [(Request("abcd", " ef"), 2), (Request(" ", "a"), 9), (Request("a", ""), 9)],
)
def test_what_does_not_fit(request_: Request, length: int) -> None:
    items = [Item(line, (Request("a", " b"), request_), 0) for line in (3, 5)]
    with pytest.raises(DiagnosticError) as caught:
        item_windows(items, WORDS, length, bos=False, file="x.jsonl")
    assert caught.value.codes == ["QN313"] * 2
    starts = [fault.rule.message()[:7] for fault in caught.value.diagnostics]
    assert starts == ["line 3:", "line 5:"]


# -------------------------------------------------------------------------------------------- runs

TABLE = normal(VOCABULARY * VOCABULARY, scale=2.0)


def bigrams(length: str) -> TokenGraph:
    """A model whose next token depends on the last one alone."""
    table = ", ".join(map(str, TABLE))
    model = parse(
        f"""
        g (int64[1, {length}] input_ids) => (float[1, {length}, {VOCABULARY}] logits)
        <float[{VOCABULARY}, {VOCABULARY}] t = {{{table}}}> {{ logits = Gather(t, input_ids) }}
        """
    )
    return TokenGraph(open_session(model), token_inputs(model.graph.inputs))


def test_likelihoods_against_a_direct_formula() -> None:
    known = TABLE.reshape(VOCABULARY, VOCABULARY).astype(np.float64)
    known = known - np.log(np.exp(known).sum(-1, keepdims=True))
    best = int(known[ord("a")].argmax())
    items = [
        Item(1, (Request("xa", "bc"), Request("pa", "qqq")), 0),
        Item(2, (Request("longer than the rest a", "d"),), 0),
    ]
    found = []
    for graph in (bigrams("12"), bigrams("S")):
        cuts = item_windows(items, WORDS, 12, bos=False, file="")
        found.append(score_items(graph, items, cuts))
    assert found[0] == found[1]
    (first, second) = found[0]
    expected = [sum(known[a, b] for a, b in pairwise(text)) for text in (b"abc", b"aqqq")]
    assert first.log_likelihoods == pytest.approx(expected, rel=1e-6)
    assert second.log_likelihoods == pytest.approx([known[ord("a"), ord("d")]], rel=1e-6)
    assert (first.cut, second.cut) == (False, True)
    written = Window((ord("a"),), (best,), 0)
    other = Window((ord("a"),), ((best + 1) % 256,), 0)
    (answered,) = score_items(bigrams("S"), items[:1], [[written, other]])
    assert answered.greedy == (True, False)


def test_padding_changes_nothing(tiny_file: Path) -> None:
    inputs = token_inputs(load_onnx(tiny_file).graph.inputs)
    assert static_length(inputs) == 16
    graph = TokenGraph(open_session(tiny_file), inputs)
    short, long = [5, 6, 7, 200, 9], [5, 6, 7, 200, 9, *range(30, 41)]
    rows = graph.logits(short), graph.logits(long)
    assert (rows[0].shape[0], rows[1].shape[0]) == (5, 16)
    np.testing.assert_array_equal(rows[0], rows[1][:5])


def test_open_lengths_are_those_of_the_text_and_caches_are_empty() -> None:
    """The logits of this graph are what it is fed with."""
    model = parse(
        """
        g (int64[batch, S] input_ids, int64[batch, T] attention_mask, int64[batch, S] position_ids,
           float[batch, 2, P, 4] past_key_0) => (int64[1, S, 4] logits)
        <int64[1] last = {2}>
        {
            ids = Unsqueeze(input_ids, last)
            positions = Unsqueeze(position_ids, last)
            zeros = Sub(ids, ids)
            seen = ReduceSum<keepdims = 0>(attention_mask)
            masks = Add(zeros, seen)
            entries = Shape<start = 2, end = 3>(past_key_0)
            pasts = Add(zeros, entries)
            logits = Concat<axis = 2>(ids, positions, masks, pasts)
        }
        """
    )
    inputs = token_inputs(model.graph.inputs)
    assert static_length(inputs) is None
    graph = TokenGraph(open_session(model), inputs)
    assert graph.logits([9, 8, 7]).tolist() == [[9, 0, 3, 0], [8, 1, 3, 0], [7, 2, 3, 0]]
    assert graph.logits([6]).tolist() == [[6, 0, 1, 0]]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("g (float[1, 4] x) => (float[1, 4] logits) { logits = Relu(x) }", "QN305"),
        (
            "g (int64[1, 4] input_ids, int64[N, M] more) => (int64[1, 4] logits)"
            "{ logits = Add(input_ids, more) }",
            "QN305",
        ),
        ("g (int64[2, 4] input_ids) => (int64[2, 4] y) { y = Neg(input_ids) }", "QN301"),
        ("g (int64[1, 2] input_ids) => (int64[1, 2] logits) { logits = Neg(input_ids) }", "QN301"),
        ("g (int64[1, S] input_ids) => (int64[1, S] y) { y = Neg(input_ids) }", "QN116"),
    ],
)
def test_graphs_that_take_no_text(text: str, code: str) -> None:
    model = parse(text)
    graph = TokenGraph(open_session(model), token_inputs(model.graph.inputs))
    with pytest.raises(DiagnosticError) as caught:
        graph.logits([1, 2, 3])
    assert caught.value.codes == [code]


# ----------------------------------------------------------------------------------------- scoring


def scored(*entries: tuple[list[float], int, tuple[int, ...]]) -> list[Scored]:
    return [
        Scored(Item(line, (), gold, lengths), tuple(values), (line == 1,) * len(values), False)
        for line, (values, gold, lengths) in enumerate(entries, start=1)
    ]


def test_accuracy_by_likelihood_and_per_character() -> None:
    found = scored(
        ([-4.0, -6.0], 1, (4, 8)),  # -1, -0.75: right per character alone
        ([-4.0, -9.0], 0, (4, 9)),  # a tie per character: the first counts
        ([-4.0, -3.0], 0, (8, 1)),
        ([-3.0, -4.0], 0, (3, 1)),
    )
    acc, norm = metrics_of(Task.PIQA, found)
    assert (acc.name, acc.value, norm.name, norm.value) == ("acc", 0.5, "acc_norm", 1.0)
    assert acc.stderr == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)
    assert norm.stderr == 0
    (only,) = metrics_of(Task.WINOGRANDE, scored(([-4.0, -3.0], 1, ())))
    assert (only.name, only.value, only.stderr) == ("acc", 1.0, None)


def test_perplexity_of_the_last_word() -> None:
    values = [-1.0, -3.0, -2.0]
    perplexity, acc = metrics_of(Task.LAMBADA, scored(*(([value], 0, ()) for value in values)))
    assert perplexity.value == pytest.approx(math.exp(2))
    assert perplexity.stderr == pytest.approx(math.exp(2) / math.sqrt(3))
    assert acc.name == "acc"
    assert acc.value == pytest.approx(1 / 3)


def test_the_error_of_a_perplexity_is_what_resampling_gives() -> None:
    values = -np.abs(normal(400, scale=2.0)).astype(np.float64)
    perplexity = metrics_of(Task.LAMBADA, scored(*(([float(v)], 0, ()) for v in values)))[0]
    draws = np.random.default_rng(0).choice(values, (4000, len(values))).mean(axis=1)
    assert perplexity.stderr == pytest.approx(np.exp(-draws).std(), rel=0.05)


# ----------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path) -> Path:
    """The tiny model in all forms, of 16 tokens, and a file for each task."""
    folder = tmp_path_factory.mktemp("home")
    options = ("--seq-len", "16", "--calib-windows", "2", "--eval-windows", "2", "--quiet")
    done = call("qnpu-compile", tiny_file, "--scheme", "w8a8", "--integer", *options, folder=folder)
    assert done.exit_code == 0, done.stderr
    codes = load_onnx(folder / "qnpu-out" / "model.qdq.onnx")
    assert LowerIo()(codes).modified
    save_model(codes, folder / "codes.onnx")
    for task, rows in ROWS.items():
        put(folder, *rows).rename(folder / f"{task}.jsonl")
    return folder


def evaluate(home: Path, model: str | Path, *options: str) -> Done:
    """The command in this process: many runs of it are quick."""
    with contextlib.chdir(home):
        done = CliRunner().invoke(eval_app, [str(model), *options, "--quiet"])
    return Done(done.exit_code, done.stdout, done.stderr)


def data(task: str) -> tuple[str, ...]:
    return ("--tokenizer", "tiny", "--task", task, "--task-data", f"{task}.jsonl")


def result(done: Done) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("task", Task)
def test_quantized_graphs_score_about_as_the_float_one(
    task: Task, home: Path, tiny_file: Path
) -> None:
    quantized = [f"qnpu-out/model.{form}.onnx" for form in ("qdq", "int")]
    forms = [str(tiny_file), *quantized, "codes.onnx"]
    found = [result(evaluate(home, form, *data(task), "--json")) for form in forms]
    values = [
        np.concatenate([answer["log_likelihoods"] for answer in one["answers"]]) for one in found
    ]
    for one, likelihoods in zip(found, values, strict=True):
        assert (one["task"], one["items"]) == (task.value, 2)
        names = {Task.LAMBADA: ["perplexity", "acc"], Task.WINOGRANDE: ["acc"]}
        assert list(one["metrics"]) == names.get(task, ["acc", "acc_norm"])
        np.testing.assert_allclose(likelihoods, values[0], rtol=0.05)
        assert np.abs(likelihoods - values[0]).max() > 0 or one is found[0]
    np.testing.assert_allclose(values[3], values[1], rtol=1e-6)


def test_weights_of_a_qdq_graph_are_decoded_once(
    home: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that ONNX Runtime is to fuse, and nothing of a float graph."""
    opened: list[tuple[bool, bool]] = []

    def spy(model: Path | ir.Model, mode: Mode, *, pack: bool = True) -> ort.InferenceSession:
        opened.append((isinstance(model, ir.Model), pack))
        return open_session(model, mode, pack=pack)

    monkeypatch.setattr("qnpu.compiler.cli_eval.open_session", spy)
    options = [*data("arc_easy"), "--items", "1", "--json"]
    qdq = "qnpu-out/model.qdq.onnx"
    for model, mode in ((qdq, "reference"), (qdq, "optimized"), (tiny_file, "reference")):
        result(evaluate(home, model, *options, "--mode", mode))
    assert opened == [(True, False), (False, True), (False, True)]


def test_what_is_printed(home: Path, tiny_file: Path) -> None:
    done = evaluate(home, tiny_file, *data("arc_easy"), "--items", "1")
    assert done.exit_code == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert "1 items, 1 cut to 16 tokens, BOS none" in done.stdout
    found = result(evaluate(home, tiny_file, *data("arc_easy"), "--bos", "window", "--json"))
    assert "BOS window" in found["data"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--task", "piqa"), "QN503"),
        (("--task-data", "piqa.jsonl"), "QN503"),
        (("--items", "3"), "QN503"),
        (("--task", "piqa", "--task-data", "absent.jsonl"), "QN102"),
        (("--task", "piqa", "--task-data", "lambada.jsonl"), "QN313"),
        (("--task", "piqa", "--task-data", "piqa.jsonl", "--text", "a.txt"), "QN503"),
        (("--task", "piqa", "--task-data", "piqa.jsonl", "--windows", "4"), "QN503"),
        (("--task", "piqa", "--task-data", "piqa.jsonl", "--window", "32"), "QN503"),
        (("--task", "piqa", "--task-data", "piqa.jsonl", "--bos", "stream"), "QN503"),
    ],
)
def test_faults(options: tuple[str, ...], code: str, home: Path, tiny_file: Path) -> None:
    done = evaluate(home, tiny_file, *options)
    assert (done.exit_code, done.codes) == (1, [code]), done.stderr


def test_an_answer_longer_than_the_graph(home: Path, tiny_file: Path) -> None:
    (home / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b" * 17}) + "\n")
    done = evaluate(home, tiny_file, "--task", "lambada", "--task-data", "long.jsonl")
    assert (done.exit_code, done.codes) == (1, ["QN313"])
    assert "long.jsonl" in done.stderr


def test_wrong_use(home: Path, tiny_file: Path) -> None:
    for options in (("--task", "hellaswag"), ("--task", "piqa", "--items", "0")):
        assert evaluate(home, tiny_file, *options).exit_code == 2


def test_the_command_as_a_user_runs_it(home: Path, tiny_file: Path) -> None:
    done = call("qnpu-eval", tiny_file, *data("piqa"), folder=home)
    assert done.exit_code == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert "100 %" in done.stderr
