"""Zero-shot scores of a float ONNX file beside lm-evaluation-harness's own, item by item.

    pip install lm_eval==0.4.13     # into an environment with qnpu; not a dependency of it
    python -m bench.zero_shot_agreement model.onnx smollm2-135m --task piqa --data piqa.jsonl

The harness takes its task as its package has it, prompts and all, its tokenizer from transformers
and its numbers from the torch model. It gets the items with the fields of its own data sets; qnpu
reads the file as it is. Items whose verdict differs are listed; exit code 1 if there are any.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from qnpu.models.load import load_onnx, load_tokenizer, load_torch, resolve
from qnpu.runtime_check.session import Mode, open_session
from qnpu.runtime_check.zero_shot import (
    Scored,
    Task,
    TokenGraph,
    item_windows,
    metrics_of,
    read_items,
    score_items,
    static_length,
    token_inputs,
)

_HARNESS_TASKS = {
    Task.LAMBADA: "lambada/lambada_openai.yaml",
    Task.PIQA: "piqa/piqa.yaml",
    Task.ARC_EASY: "arc/arc_easy.yaml",
    Task.WINOGRANDE: "winogrande/default.yaml",
}


@dataclass(frozen=True)
class Theirs:
    """What the harness says.

    Attributes:
        metrics: value and standard error by name.
        likelihoods: of each item's answers, nats.
        verdicts: of each item, by name of the metric.
    """

    metrics: dict[str, tuple[float, float]]
    likelihoods: list[list[float]]
    verdicts: list[dict[str, float]]


def main(
    model: Annotated[Path, typer.Argument(help="Float ONNX file, its tokenizer beside it.")],
    torch_model: Annotated[str, typer.Argument(help="What it was exported from.")],
    task: Annotated[Task, typer.Option(help="What to answer.")],
    data: Annotated[Path, typer.Option(help="Its items, .jsonl.")],
    items: Annotated[int, typer.Option(help="From the start.")] = 100,
    longest: Annotated[int, typer.Option(help="Tokens, where the graph leaves it open.")] = 512,
) -> None:
    """Score with both and compare."""
    longest = static_length(load_onnx(model).graph.inputs) or longest
    started = time.process_time()
    ours = _ours(model, task, data, items, longest)
    between = time.process_time()
    theirs = _theirs(model.parent, torch_model, task, data, items, longest)
    ended = time.process_time()
    same = _compare(task, ours, theirs)
    print(f"CPU seconds: qnpu {between - started:.0f}, harness {ended - between:.0f}")
    sys.exit(not same)


def _ours(model: Path, task: Task, data: Path, count: int, longest: int) -> list[Scored]:
    inputs = token_inputs(load_onnx(model).graph.inputs)
    tokenizer = load_tokenizer(str(model))
    if tokenizer is None:
        sys.exit("no tokenizer lies beside the model")
    items = read_items(data, task, count)
    windows = item_windows(items, tokenizer, longest, bos=tokenizer.adds_bos, file=str(data))
    graph = TokenGraph(open_session(model, Mode.REFERENCE), inputs)
    return score_items(graph, items, windows)


# ------------------------------------------------------------------------------------- the harness


def _theirs(
    folder: Path, torch_model: str, task: Task, data: Path, count: int, longest: int
) -> Theirs:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    import lm_eval  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    lm = HFLM(
        pretrained=load_torch(resolve(torch_model)).model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=longest,
        batch_size=1,
        device="cpu",
    )
    lines = [line for line in data.read_text("utf-8").split("\n") if line.strip()]
    rows = [json.loads(line) for line in lines[:count]]
    with TemporaryDirectory() as place:
        file = Path(place, "items.jsonl")
        written = [json.dumps(_harness_row(task, row)) for row in rows]
        file.write_text("\n".join(written) + "\n", "utf-8")
        definition = Path(place, f"{task.value}.yaml")
        base = Path(lm_eval.__file__).parent / "tasks" / _HARNESS_TASKS[task]
        definition.write_text(yaml.safe_dump(_local(base, file)), "utf-8")
        os.environ["HF_DATASETS_CACHE"] = place
        tasks = TaskManager(include_defaults=False).load([str(definition)])
        found = lm_eval.evaluate(lm, tasks, bootstrap_iters=10_000, log_samples=True)
    ((name, results),) = found["results"].items()
    names = [key.partition(",")[0] for key in results if key.endswith(",none")]
    metrics = {
        key: (results[f"{key},none"], results[f"{key}_stderr,none"])
        for key in names
        if not key.endswith("_stderr")
    }
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return Theirs(
        metrics,
        [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples],
        [{key: sample[key] for key in metrics} for sample in samples],
    )


def _local(base: Path, items: Path) -> dict[str, Any]:
    """The harness's definition of a task with a local file in the place of its data set."""
    return {
        "include": str(base),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def _harness_row(task: Task, row: dict[str, Any]) -> dict[str, Any]:
    """Fields of the harness's data set, from those of llm-foundry's file."""
    match task:
        case Task.LAMBADA if "context" in row:
            return {"text": f"{row['context']} {row['continuation']}"}
        case Task.PIQA if "query" in row:
            goal = row["query"].removeprefix("Question: ").removesuffix("\n")
            first, second = row["choices"]
            return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}
        case Task.ARC_EASY if "query" in row:
            labels = [str(index) for index in range(len(row["choices"]))]
            return {
                "question": row["query"].removeprefix("Question: "),
                "choices": {"text": row["choices"], "label": labels},
                "answerKey": labels[row["gold"]],
            }
        case Task.WINOGRANDE if "context_options" in row:
            before = os.path.commonprefix(row["context_options"])  # noqa: RUF071
            first, second = (option.removeprefix(before) for option in row["context_options"])
            return {
                "sentence": f"{before}_ {row['continuation']}",
                "option1": first,
                "option2": second,
                "answer": str(row["gold"] + 1),
            }
    return row


# ---------------------------------------------------------------------------------------- compared


def _compare(task: Task, ours: Sequence[Scored], theirs: Theirs) -> bool:
    """Prints both; returns whether all verdicts are the same."""
    table = Table(title=f"{task.value}, {len(ours)} items", title_justify="left")
    for heading in ("metric", "qnpu", "±", "harness", "±", "verdicts that differ"):
        table.add_column(heading, justify="right")
    notes: list[str] = []
    for metric in metrics_of(task, ours):
        figures = [metric.value, metric.stderr or 0.0, *theirs.metrics[metric.name]]
        differing = ""
        if metric.name != "perplexity":
            found = [
                _note(metric.name, entry, likelihoods)
                for entry, likelihoods, verdicts in zip(
                    ours, theirs.likelihoods, theirs.verdicts, strict=True
                )
                if _verdict(task, metric.name, entry) != verdicts[metric.name]
            ]
            notes += found
            differing = str(len(found))
        table.add_row(metric.name, *(f"{figure:.5f}" for figure in figures), differing)
    gaps = [
        abs(mine - other)
        for entry, likelihoods in zip(ours, theirs.likelihoods, strict=True)
        for mine, other in zip(entry.log_likelihoods, likelihoods, strict=True)
    ]
    Console(soft_wrap=True).print(table)
    print(*notes, sep="\n", end="\n" if notes else "")
    cut = sum(entry.cut for entry in ours)
    print(
        f"largest difference of log-likelihoods {max(gaps):.1e} of {len(gaps)} answers; {cut} cut"
    )
    return not notes


def _verdict(task: Task, metric: str, entry: Scored) -> float:
    return next(item.value for item in metrics_of(task, [entry]) if item.name == metric)


def _note(metric: str, entry: Scored, theirs: Sequence[float]) -> str:
    mine = ", ".join(f"{value:.5f}" for value in entry.log_likelihoods)
    other = ", ".join(f"{value:.5f}" for value in theirs)
    return f"line {entry.item.line}, {metric}: qnpu {mine}; harness {other}"


if __name__ == "__main__":
    typer.run(main)
