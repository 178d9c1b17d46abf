"""Small decoders of real architectures with seeded random weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qnpu.models.quiet import quiet, require

if TYPE_CHECKING:
    import torch

HEAD_DIM = 16
POSITIONS = 512

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "gpt2")

_SLIDING_WINDOW = 8
_LOGIT_SPREAD = 3.0  # standard deviation of the logits: a softmax that is neither flat nor one-hot
_NORM_SPREAD = 0.2


def tiny_decoder(
    architecture: str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    vocab: int = 257,
) -> Any:
    """A transformers causal language model in eval mode with eager attention.

    Weights depend only on the seed, on parameter names and on shapes; norm weights and biases are
    random too, so that a rewrite that loses one of them shows. The global random state is left as
    it was. Heads are ``HEAD_DIM`` wide, two query heads share a key head (but in gpt2), and the
    MLP is ``2 * hidden`` wide. Gemma 3 alternates sliding and full attention.

    Args:
        architecture: one of ``ARCHITECTURES``.
        hidden: model width, a multiple of 32.

    Raises:
        DiagnosticError: QN114 transformers is not installed.
        ValueError: an unknown architecture or an odd width.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    if hidden < 2 * HEAD_DIM or hidden % (2 * HEAD_DIM):
        raise ValueError(f"hidden {hidden} is not a multiple of {2 * HEAD_DIM}")
    require("transformers")
    import torch  # noqa: PLC0415

    with quiet():
        import transformers  # noqa: PLC0415

        config = _CONFIGS[architecture](transformers, layers, hidden, vocab)
        with torch.random.fork_rng(devices=[]):
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(name, parameter, architecture, seed))
    model.eval()
    model.requires_grad_(False)
    return model


def _weights(name: str, parameter: torch.Tensor, architecture: str, seed: int) -> torch.Tensor:
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    if parameter.dim() == 1:
        ones = name.endswith("weight") and architecture != "gemma3"  # Gemma stores weight - 1
        return float(ones) + _NORM_SPREAD * noise
    if any(part in name for part in ("embed_tokens", "wte", "lm_head")):
        return noise * (_LOGIT_SPREAD / math.sqrt(parameter.shape[-1]))
    if "wpe" in name:
        return noise * _NORM_SPREAD
    fan_in = parameter.shape[0] if architecture == "gpt2" else parameter.shape[1]  # Conv1D
    return noise / math.sqrt(fan_in)


def _shared(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    heads = hidden // HEAD_DIM
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": vocab,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": vocab - 1,
        "eos_token_id": vocab - 1,
        "pad_token_id": None,
    }


def _llama(hf: Any, *sizes: int) -> Any:
    return hf.LlamaConfig(**_shared(*sizes), head_dim=HEAD_DIM, tie_word_embeddings=False)


def _qwen2(hf: Any, *sizes: int) -> Any:
    return hf.Qwen2Config(**_shared(*sizes), tie_word_embeddings=True)


def _qwen3(hf: Any, *sizes: int) -> Any:
    return hf.Qwen3Config(**_shared(*sizes), head_dim=HEAD_DIM, tie_word_embeddings=True)


def _mistral(hf: Any, *sizes: int) -> Any:
    return hf.MistralConfig(
        **_shared(*sizes), head_dim=HEAD_DIM, sliding_window=None, tie_word_embeddings=False
    )


def _phi3(hf: Any, *sizes: int) -> Any:
    return hf.Phi3Config(
        **_shared(*sizes),
        original_max_position_embeddings=POSITIONS,
        sliding_window=None,
        tie_word_embeddings=False,
    )


def _gemma3(hf: Any, *sizes: int) -> Any:
    layers = sizes[0]
    return hf.Gemma3TextConfig(
        **_shared(*sizes),
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=_SLIDING_WINDOW,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        tie_word_embeddings=True,
    )


def _gpt2(hf: Any, layers: int, hidden: int, vocab: int) -> Any:
    return hf.GPT2Config(
        n_layer=layers,
        n_embd=hidden,
        n_head=hidden // HEAD_DIM,
        n_inner=2 * hidden,
        n_positions=POSITIONS,
        vocab_size=vocab,
        bos_token_id=vocab - 1,
        eos_token_id=vocab - 1,
    )


_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "phi3": _phi3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}
