"""Seeded decoders and their export to ONNX, compared with torch in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.models.export import export_cached, export_dynamo, export_optimum
from qnpu.models.load import LoadedModel, load_onnx, load_tokenizer, load_torch, resolve
from qnpu.models.tiny_decoder import ARCHITECTURES, HEAD_DIM, tiny_decoder

LENGTH = 16
TOLERANCE = 1e-4  # of the largest logit


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def assert_same_logits(actual: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    reference = expected.numpy()
    assert np.abs(actual - reference).max() <= TOLERANCE * np.abs(reference).max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_is_deterministic_and_alive(architecture: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = tiny_decoder(architecture, seed=3)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    again, other = tiny_decoder(architecture, seed=3), tiny_decoder(architecture, seed=4)
    logits = first(tokens()).logits
    torch.testing.assert_close(again(tokens()).logits, logits, rtol=0, atol=0)
    assert not torch.allclose(other(tokens()).logits, logits, atol=0.1)
    assert 2 < float(logits.std()) < 5
    changed = tokens()
    changed[0, 0] += 1
    assert not torch.allclose(first(changed).logits[0, -1], logits[0, -1], atol=1e-3)


def test_decoders_have_the_features_of_their_kind() -> None:
    names = {kind: {n for n, _ in tiny_decoder(kind).named_parameters()} for kind in ARCHITECTURES}

    def has(architecture: str, part: str) -> bool:
        return any(part in name for name in names[architecture])

    assert has("qwen2", "k_proj.bias")
    assert not has("llama", "bias")
    assert has("qwen3", "q_norm")
    assert has("phi3", "qkv_proj") and has("phi3", "gate_up_proj")
    assert has("gemma3", "pre_feedforward_layernorm")
    assert has("gpt2", "c_attn.bias")
    assert has("llama", "lm_head") and not has("gemma3", "lm_head")
    attention = tiny_decoder("llama").model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features == 4 * HEAD_DIM
    assert tiny_decoder("gemma3").config.layer_types == ["sliding_attention", "full_attention"]


def test_decoder_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match="mamba"):
        tiny_decoder("mamba")
    with pytest.raises(ValueError, match="40"):
        tiny_decoder("llama", hidden=40)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dynamo_export_equals_torch(tmp_path: Path, architecture: str) -> None:
    loaded = load_torch(resolve(f"tiny-{architecture}"))
    path = export_dynamo(loaded, tmp_path / "new" / "model.onnx", sequence_length=LENGTH)
    session = ort.InferenceSession(path)
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape) == ("input_ids", "tensor(int64)", [1, LENGTH])
    assert (result.name, result.shape) == ("logits", [1, LENGTH, 257])
    (logits,) = session.run(None, {"input_ids": tokens().numpy()})
    assert_same_logits(logits, loaded.model(tokens()).logits)

    model = load_onnx(path)
    assert model.opset_imports == {"": 23}
    weights = [value.const_value for value in model.graph.initializers.values()]
    assert any(isinstance(weight, ir.ExternalTensor) for weight in weights)
    assert "RMSNormalization" in {node.op_type for node in model.graph} or architecture == "gpt2"
    files = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in path.parent.iterdir()} == files
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert tokenizer.encode("aé") == [97, 195, 169]


def test_export_bytes_do_not_depend_on_folder_or_run(tmp_path: Path) -> None:
    for folder in ("one", "another/deeper"):
        loaded = load_torch(resolve("tiny-qwen3"))
        export_dynamo(loaded, tmp_path / folder / "m.onnx", sequence_length=4)
    for name in ("m.onnx", "m.onnx.data", "tokenizer.json"):
        first, second = tmp_path / "one" / name, tmp_path / "another/deeper" / name
        assert first.read_bytes() == second.read_bytes()
    content = (tmp_path / "one" / "m.onnx").read_bytes()
    assert b".py" not in content
    assert b"pkg.torch" not in content
    assert b"decoder." not in content
    assert b"model.layers.1.mlp.down_proj" in content


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_optimum_export_equals_torch(tmp_path: Path, architecture: str) -> None:
    loaded = load_torch(resolve(f"tiny-{architecture}"))
    path = export_optimum(loaded, tmp_path / "model.onnx")
    session = ort.InferenceSession(path)
    feeds: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = np.zeros((1, 2, 0, HEAD_DIM), np.float32)
    assert len(feeds) == 4
    feeds["input_ids"] = tokens().numpy()
    feeds["attention_mask"] = np.ones((1, LENGTH), np.int64)
    feeds["position_ids"] = np.arange(LENGTH)[None]  # of Gemma as well, where optimum has none
    (logits,) = session.run(["logits"], feeds)
    assert_same_logits(logits, loaded.model(tokens()).logits)
    files = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert b".py" not in path.read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_text_read_piece_by_piece(tmp_path: Path, architecture: str) -> None:
    """Each piece goes on from the caches of the one before, whatever their lengths."""
    loaded = load_torch(resolve(f"tiny-{architecture}"))
    path = export_cached(loaded, tmp_path / "model.onnx")
    session = ort.InferenceSession(path)
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]
    assert inputs[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    heads = 4 if architecture == "gpt2" else 2
    past = {name: np.zeros((1, heads, 0, HEAD_DIM), np.float32) for name in inputs[3:]}
    ids, parts, start = tokens().numpy(), [], 0
    for length in (9, 1, 1, LENGTH - 11):
        feeds: dict[str, Any] = {
            "input_ids": ids[:, start : start + length],
            "attention_mask": np.ones((1, start + length), np.int64),
            "position_ids": np.arange(start, start + length)[None],
        }
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        parts.append(found["logits"])
        start += length
    assert_same_logits(np.concatenate(parts, axis=1), loaded.model(tokens()).logits)
    files = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert b".py" not in path.read_bytes()


def test_optimum_takes_a_folder(tmp_path: Path) -> None:
    tiny_decoder("qwen2").save_pretrained(tmp_path / "hub")
    path = export_optimum(tmp_path / "hub", tmp_path / "out" / "m.onnx", task="text-generation")
    names = {entry.name for entry in ort.InferenceSession(path).get_inputs()}
    assert "input_ids" in names
    assert not any(name.startswith("past") for name in names)


def test_progress_rises_to_one_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_torch(resolve("tiny"))
    for export, options in ((export_dynamo, {"sequence_length": 4}), (export_optimum, {})):
        seen: list[tuple[str, float]] = []
        run: Any = export
        run(
            loaded,
            tmp_path / "m.onnx",
            progress=lambda *step, seen=seen: seen.append(step),
            **options,
        )
        fractions = [fraction for _, fraction in seen]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


class Refuses(torch.nn.Module):
    """Fails when it is run."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        raise NotImplementedError("no kernel for this")


def test_a_failed_export_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = LoadedModel(Refuses(), None, "broken")
    with pytest.raises(DiagnosticError, match="no kernel for this") as caught:
        export_dynamo(broken, tmp_path / "m.onnx", sequence_length=4)
    assert caught.value.codes == ["QN115"]
    with pytest.raises(DiagnosticError) as caught:
        export_optimum(broken, tmp_path / "m.onnx")
    assert caught.value.codes == ["QN115"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="sequence length"):
        export_dynamo(broken, tmp_path / "m.onnx", sequence_length=0)


def test_export_into_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiagnosticError) as caught:
        export_dynamo(load_torch(resolve("tiny")), tmp_path / "file" / "m.onnx", sequence_length=4)
    assert caught.value.codes == ["QN901"]


def test_missing_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_torch(resolve("tiny"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optimum" else find(name)
    )
    with pytest.raises(DiagnosticError) as caught:
        export_optimum(loaded, tmp_path / "m.onnx")
    assert caught.value.codes == ["QN114"]
