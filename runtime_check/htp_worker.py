"""The process that loads Qualcomm's compiler: jobs come as JSON lines, one answer line each.

``qnpu.runtime_check.htp`` alone runs it, with the path of the provider library. That library prints
to both streams, may abort, and registers itself in ONNX Runtime for the whole process. So the
sessions on it are opened here and not in ``session.py``: no other process of ours ever loads it.
Everything printed during a job goes to the job's log file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PROVIDER = "QNNExecutionProvider"


def main() -> None:
    """Serves until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    _send_output_to(Path(os.devnull))
    device = _register(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        _send_output_to(Path(job["log"]))
        answers.write(json.dumps(_serve(job, device)) + "\n")
        answers.flush()


def _serve(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """Does one job. "error" is the refusal or empty; "outputs" names what a run has written."""
    options = ort.SessionOptions()
    options.log_severity_level = job["severity"]
    for key, value in job["session"].items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices([device], job["provider"])
    outputs: list[str] = []
    try:
        session = ort.InferenceSession(job["model"], options)
        if "feeds" in job:
            with np.load(job["feeds"]) as arrays:
                feeds = {name: arrays[f"arr_{k}"] for k, name in enumerate(job["names"])}
            np.savez(job["outputs"], *session.run(None, feeds))
            outputs = [output.name for output in session.get_outputs()]
    except Exception as error:  # ONNX Runtime's own classes share no base
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "", "outputs": outputs}


def _register(library: str) -> Any:
    """The QNN device of this machine, which stands for the emulator where there is no NPU."""
    ort.register_execution_provider_library(PROVIDER, library)
    return next(device for device in ort.get_ep_devices() if device.ep_name == PROVIDER)


def _send_output_to(path: Path) -> None:
    """Points both standard streams, also as C code sees them, to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    main()
