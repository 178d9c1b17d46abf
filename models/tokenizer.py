"""Tokenizers behind one small interface; the ``tokenizers`` package does the work.

transformers is needed only where a folder or hub model has no tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qnpu.compiler.diagnostics import DiagnosticError, first_line
from qnpu.compiler.rules import UnknownModel
from qnpu.models.quiet import quiet, require

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>")
_EOS_NAMES = ("<eos>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer(Protocol):
    """What qnpu needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the begin-of-sequence token, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own settings put BOS before a text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""


class FastTokenizer:
    """A ``tokenizers.Tokenizer`` with what its tokenizer_config.json says about BOS and EOS."""

    def __init__(
        self,
        backend: Any,
        *,
        bos_token_id: int | None,
        adds_bos: bool,
        eos_token_id: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bos_token_id = bos_token_id
        self._eos_token_id = eos_token_id
        self._adds_bos = adds_bos and bos_token_id is not None

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self._eos_token_id

    @property
    def adds_bos(self) -> bool:
        return self._adds_bos

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        bos, eos = (
            None if token is None else self._backend.id_to_token(token)
            for token in (self.bos_token_id, self.eos_token_id)
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "add_bos_token": self.adds_bos,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / TOKENIZER_JSON), pretty=False)
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, BOS and EOS as 256; needs no package and no file."""

    vocab_size = 257

    @property
    def bos_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def eos_token_id(self) -> int:
        return self.bos_token_id

    @property
    def adds_bos(self) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < self.bos_token_id).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """The same ids as a tokenizer.json without merges, for whoever reads the export."""
        require("tokenizers", install="tokenizers")
        from tokenizers import Tokenizer as Backend  # noqa: PLC0415
        from tokenizers import decoders, models, pre_tokenizers  # noqa: PLC0415

        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<bos>"])
        bos, eos = self.bos_token_id, self.eos_token_id
        FastTokenizer(backend, bos_token_id=bos, adds_bos=False, eos_token_id=eos).save(folder)


def tokenizer_from_json(file: Path) -> FastTokenizer:
    """Read a tokenizer.json, and the tokenizer_config.json beside it if there is one.

    Without the latter BOS is what the tokenizer itself puts first, or a token named like one; EOS
    is a token named like one.

    Raises:
        DiagnosticError: QN113 either file is malformed; QN114 ``tokenizers`` is not installed.
    """
    require("tokenizers", install="tokenizers")
    from tokenizers import Tokenizer as Backend  # noqa: PLC0415

    config_file = file.parent / TOKENIZER_CONFIG
    try:
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        backend = Backend.from_str(file.read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        reason = f"tokenizer files beside it are not readable: {first_line(error)}"
        raise DiagnosticError(UnknownModel(str(file), reason).at(file=str(file))) from error
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    first = whole[0] if whole[:1] != plain[:1] else None
    said = first is None or "bos_token" in config
    bos = _named(backend, config, "bos_token", _BOS_NAMES) if said else first
    adds_bos = config.get("add_bos_token")
    return FastTokenizer(
        backend,
        bos_token_id=bos,
        adds_bos=bool(adds_bos) if adds_bos is not None else bos is not None and first == bos,
        eos_token_id=_named(backend, config, "eos_token", _EOS_NAMES),
    )


def _named(backend: Any, config: dict[str, Any], key: str, candidates: Sequence[str]) -> int | None:
    """Id of the token that the configuration names, or where it is silent of one named so."""
    name = config.get(key)
    if isinstance(name, dict):  # older files write a serialized AddedToken
        name = name.get("content")
    if name is not None:
        found: int | None = backend.token_to_id(name)
        return found
    if key in config:
        return None
    known = (backend.token_to_id(candidate) for candidate in candidates)
    return next((token for token in known if token is not None), None)


def tokenizer_from_transformers(model: str, **options: Any) -> FastTokenizer:
    """AutoTokenizer's fast form of a folder or hub id.

    Raises:
        DiagnosticError: QN113 there is none, or it cannot be loaded; QN114 a package is missing.
    """
    require("transformers", "sentencepiece")
    with quiet():
        from transformers import AutoTokenizer  # noqa: PLC0415

        try:
            auto: Any = AutoTokenizer
            hub = auto.from_pretrained(model, use_fast=True, **options)
            backend = hub.backend_tokenizer
            whole = hub("a", verbose=False)["input_ids"]
        except Exception as error:  # of many libraries
            reason = f"no tokenizer: {first_line(error)}"
            raise DiagnosticError(UnknownModel(model, reason).at(file=model)) from error
    bos, eos = hub.bos_token_id, hub.eos_token_id
    adds = whole[:1] == [bos]
    return FastTokenizer(backend, bos_token_id=bos, adds_bos=adds, eos_token_id=eos)


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(0x100)]
