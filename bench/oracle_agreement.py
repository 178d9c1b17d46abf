"""Does our checker say of a graph what Qualcomm's compiler makes of it? On fresh random graphs.

    python -m bench.oracle_agreement                        # 1,000 random cases for v75 and v79
    python -m bench.oracle_agreement --seed 2 --count 300 --arch v68,v73 --workers 4
    python -m bench.oracle_agreement --cases sweep          # every single operation over all types

The compiler's verdicts are kept in a folder, one JSON line a case, so that a second run only asks
our checker. An int of ours where the compiler goes float or refuses is the worst disagreement; a
``silent`` of ours (integers, but not those asked for) counts as its int and is shown apart.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import typer
from onnx_ir.passes import common
from rich.console import Console
from rich.table import Table

from qnpu.compiler.target import TargetProfile, load_target
from qnpu.compiler.target_check import check_target
from qnpu.runtime_check.htp import HtpCompiler
from tests.htp_random import random_cases
from tests.htp_sweep import sweep
from tests.qdq_cases import Case

_COLUMNS = ("int", "float", "reject")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the compiler said of one case.

    Attributes:
        key: of the case.
        name: of the case.
        verdict: "int", "float" or "reject".
        ops: operations it became, as "FullyConnected(UF16,SF8e3)->UF16".
        refusal: why it refused.
    """

    key: str
    name: str
    verdict: str
    ops: list[str]
    refusal: str


class VerdictCache:
    """Verdicts of one architecture and one release of the compiler, in a file of JSON lines."""

    def __init__(self, folder: Path, arch: str) -> None:
        release = importlib.metadata.version("onnxruntime-qnn")
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{arch}-{release}.jsonl"
        self._lock = threading.Lock()
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        known = [Asked(**json.loads(line)) for line in lines]
        self.known = {asked.key: asked for asked in known}

    def add(self, asked: Asked) -> None:
        """Keeps a verdict at once: a run that is cut off loses nothing."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            self.known[asked.key] = asked
            file.write(json.dumps(asdict(asked)) + "\n")


@dataclass(frozen=True, slots=True)
class Compared:
    """Our verdict of one case beside the compiler's."""

    asked: Asked
    ours: str
    does: tuple[str, ...]

    @property
    def agree(self) -> bool:
        return self.asked.verdict == ("int" if self.ours == "silent" else self.ours)

    @property
    def worst(self) -> bool:
        """We promise integers and the compiler does not deliver."""
        return self.ours in {"int", "silent"} and not self.agree


def main(
    seed: Annotated[int, typer.Option(help="Of the random cases.")] = 1,
    count: Annotated[int, typer.Option(help="Random cases.")] = 1000,
    arch: Annotated[str, typer.Option(help="Separated by commas.")] = "v75,v79",
    cases: Annotated[str, typer.Option(help="random, sweep or random,sweep.")] = "random",
    workers: Annotated[int, typer.Option(help="Compilers at a time.")] = 2,
    cache: Annotated[Path, typer.Option(help="Folder of the compiler's verdicts.")] = Path(
        "oracle-cache"
    ),
    show: Annotated[int, typer.Option(help="Disagreements to list for each arch.")] = 40,
) -> None:
    """Ask the compiler, ask our checker, print where they differ."""
    console = Console(soft_wrap=True)
    chosen: list[Case] = []
    if "random" in cases.split(","):
        chosen += random_cases(seed, count)
    if "sweep" in cases.split(","):
        chosen += sweep()
    console.print(f"{len(chosen)} cases ({cases}), seed {seed}")
    failed = False
    for name in arch.split(","):
        known = VerdictCache(cache, name)
        ask(chosen, name, known, workers, console)
        target = load_target(f"qnn-htp-{name}")
        start = time.perf_counter()
        compared = [compare(case, known.known[case.key], target) for case in chosen]
        milliseconds = 1e3 * (time.perf_counter() - start) / len(chosen)
        console.print(confusion(compared, f"{name}: ours (rows) and the compiler's"))
        wrong = [c for c in compared if not c.agree]
        worst = [c for c in compared if c.worst]
        console.print(
            f"{name}: {100 * (1 - len(wrong) / len(compared)):.2f}% agree; {len(worst)} called "
            f"integer that are not; our checker took {milliseconds:.1f} ms a case\n"
        )
        for item in sorted(wrong, key=lambda c: not c.worst)[:show]:
            reason = item.asked.refusal or "; ".join(item.asked.ops)
            said = f"  {item.asked.name} [{item.asked.key}]: {item.ours} → {item.asked.verdict}"
            console.print(f"{said}: {reason}", markup=False, highlight=False)
        failed |= bool(worst) or len(wrong) > 0.01 * len(compared)
    raise typer.Exit(int(failed))


def ask(
    cases: Sequence[Case], arch: str, known: VerdictCache, workers: int, console: Console
) -> None:
    """Gets the verdicts that are not known yet, with several compilers at a time."""
    missing = list({case.key: case for case in cases if case.key not in known.known}.values())
    if not missing:
        return
    start = time.perf_counter()

    def work(part: list[Case]) -> None:
        with HtpCompiler() as htp:
            for case in part:
                graph = htp.compile(case.build(), arch)
                ops = [op.text for op in graph.inner_ops]
                verdict = graph.verdict.value
                known.add(Asked(case.key, case.name, verdict, ops, graph.refusal))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [missing[k::workers] for k in range(workers)]))
    seconds = time.perf_counter() - start
    each = 1e3 * seconds / len(missing)
    console.print(f"{arch}: {len(missing)} compiled, {each:.0f} ms each with {workers} at a time")


def compare(case: Case, asked: Asked, target: TargetProfile) -> Compared:
    """Our verdict of a case beside the compiler's."""
    model = ir.from_proto(case.build())
    common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    report = check_target(model, target)
    ours = report.verdict
    does = tuple(node.does for node in report.nodes if node.verdict is ours)
    return Compared(asked, ours.value, does)


def confusion(compared: Sequence[Compared], title: str) -> Table:
    """Counts of our verdicts (rows) against the compiler's (columns)."""
    table = Table("", *_COLUMNS, title=title)
    counts = Counter((c.ours, c.asked.verdict) for c in compared)
    for ours in sorted({c.ours for c in compared}):
        table.add_row(ours, *(str(counts[ours, theirs]) for theirs in _COLUMNS))
    return table


if __name__ == "__main__":
    typer.run(main)
