"""The tokenizer inside a GGUF file.

transformers converts these too, but reads SentencePiece scores as Unigram log-probabilities where
llama.cpp, Gemma and Llama 2 mean merge ranks (" capital" becomes four tokens, not one), and splits
every byte-level vocabulary as GPT-2 does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qnpu.models.gguf_header import read_header
from qnpu.models.quiet import require
from qnpu.models.tokenizer import FastTokenizer, tokenizer_from_transformers

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "▁"  # SentencePiece writes a space as U+2581

# tokenizer.ggml.pre → the pattern that text is split by before merging.
_PATTERNS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_GPT2, _DIGITS = {"gpt-2"}, {"smollm"}


def tokenizer_from_gguf(path: Path) -> FastTokenizer:
    """Build the tokenizer from the header alone.

    Raises:
        DiagnosticError: QN102, QN113 the file is missing or not GGUF, or has no tokenizer that
            can be read; QN114 a package is missing.
    """
    require("tokenizers", install="tokenizers")
    header = read_header(path)
    kind = header.get("tokenizer.ggml.model")
    pre = header.get("tokenizer.ggml.pre", "gpt-2")
    if kind == "llama":
        backend = _sentencepiece(header)
    elif kind == "gpt2" and pre in {*_PATTERNS, *_GPT2, *_DIGITS}:
        backend = _byte_level(header, pre)
    else:
        return tokenizer_from_transformers(str(path.parent), gguf_file=path.name)
    _add_tokens(backend, header)
    bos = header.get("tokenizer.ggml.bos_token_id")
    adds_bos = header.get("tokenizer.ggml.add_bos_token", kind == "llama")
    eos = header.get("tokenizer.ggml.eos_token_id")
    return FastTokenizer(backend, bos_token_id=bos, adds_bos=adds_bos, eos_token_id=eos)


def _sentencepiece(header: dict[str, Any]) -> Any:
    """BPE over the whole text, bytes where no token fits; merges follow from the scores."""
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        normalizers,
    )

    tokens = [_escaped(token) for token in header["tokenizer.ggml.tokens"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[int(header.get("tokenizer.ggml.unknown_token_id", 0))]
    prefix = bool(header.get("tokenizer.ggml.add_space_prefix", True))
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(tokens, vocab, header["tokenizer.ggml.scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([*undo, *strip])
    return backend


def _merges(
    tokens: list[str], vocab: dict[str, int], scores: np.ndarray[Any, Any]
) -> list[tuple[str, str]]:
    """Each way to make a token of two others, best token first, as SentencePiece merges."""
    found = []
    for index in np.argsort(-scores, kind="stable"):
        token = tokens[index]
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        found += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return found


def _byte_level(header: dict[str, Any], pre: str) -> Any:
    from tokenizers import (  # noqa: PLC0415
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    vocab = {token: index for index, token in enumerate(header["tokenizer.ggml.tokens"])}
    pairs = (merge.split(" ", 1) for merge in header["tokenizer.ggml.merges"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs]))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in _DIGITS else []
    if pre in _PATTERNS:
        steps = [pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, plain])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Any, header: dict[str, Any]) -> None:
    """Control tokens, and those the vocabulary's author defined, are never split or merged."""
    from tokenizers import AddedToken  # noqa: PLC0415

    tokens = header["tokenizer.ggml.tokens"]
    kinds = header["tokenizer.ggml.token_type"]
    control = [tokens[i] for i in np.flatnonzero(kinds == _CONTROL)]
    defined = [_escaped(tokens[i]) for i in np.flatnonzero(kinds == _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=True) for token in defined])


def _escaped(token: str) -> str:
    return token.replace(" ", _SPACE)
