"""Persimmon, Fuyu's decoder: LayerNorm, relu², q/k norm, one fused query-key-value projection."""

import re
from typing import Any

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop.fields import Fields, rotary, rotary_fields
from fuyu_jax.interop.mapping import FileTensor, Part, linear, matrix, norm, table

MODEL_TYPES = ("persimmon",)


def read(fields: Fields, model_type: str) -> dict[str, Any]:
    """Fields of `ModelConfig`."""
    del model_type
    fields.only("hidden_act", "relu2", "relu2")
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if dim % heads:
        raise UserError(f"{fields.where}: hidden_size {dim} does not divide into {heads} heads")
    return {
        "vocab_size": fields.size("vocab_size"),
        "dim": dim,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": 0,
        "head_dim": dim // heads,
        "mlp_dim": fields.size("intermediate_size"),
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_eps", 1e-5),
        "mlp": "relu2",
        "qk_norm": bool(fields.get("qk_layernorm", True)),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "window": 0,
        "init_std": fields.number("initializer_range", 0.02),
        **rotary(fields, theta=None, fraction=0.5),
    }


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The inverse of `read`; what it cannot say, reading it back shows."""
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "relu2",
        "layer_norm_eps": config.norm_eps,
        "qk_layernorm": config.qk_norm,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "partial_rotary_factor": config.rotary_fraction,
        **rotary_fields(config),
    }


def tensors(config: ModelConfig) -> list[FileTensor]:
    """The text model's tensors; names without what is before `layers`."""
    d, h, e, f = config.dim, config.num_heads, config.head_dim, config.mlp_dim
    a, m = "layers.{}.self_attn", "layers.{}.mlp"
    fused = [Part(f"layers/attention/{n}/kernel", (2, 0, 1), (1, i)) for i, n in enumerate("qkv")]
    biases = [Part(f"layers/attention/{n}/bias", (0, 1), (1, i)) for i, n in enumerate("qkv")]
    made = [
        table("embed_tokens.weight", "embedding", config.vocab_size, d),
        *norm("layers.{}.input_layernorm", "layers/attention_norm", d, True),
        FileTensor(f"{a}.query_key_value.weight", (3 * h * e, d), (h, 3, e, d), tuple(fused)),
        FileTensor(f"{a}.query_key_value.bias", (3 * h * e,), (h, 3, e), tuple(biases)),
        *linear(f"{a}.dense", "layers/attention/out", (h, e), (d,), True),
    ]
    if config.qk_norm:
        made += norm(f"{a}.q_layernorm", "layers/attention/q_norm", e, True)
        made += norm(f"{a}.k_layernorm", "layers/attention/k_norm", e, True)
    return [
        *made,
        *norm("layers.{}.post_attention_layernorm", "layers/mlp_norm", d, True),
        *linear(f"{m}.dense_h_to_4h", "layers/mlp/up", (d,), (f,), True),
        *linear(f"{m}.dense_4h_to_h", "layers/mlp/down", (f,), (d,), True),
        *norm("final_layernorm", "final_norm", d, True),
    ]


def head(config: ModelConfig) -> FileTensor:
    return matrix("lm_head.weight", "head/kernel", (config.dim,), (config.vocab_size,))


# Adept's own names (of the checkpoints that transformers' converters read).
_ADEPT = (
    (r"^language_model\.embedding\.word_embeddings\.", "model.embed_tokens."),
    (r"^(language_model\.)?word_embeddings_for_head\.", "lm_head."),
    (r"^language_model\.encoder\.", "model."),
    (r"\.self_attention\.", ".self_attn."),
)


def rename(name: str) -> str:
    """A name of any generation as transformers' newest."""
    for pattern, new in _ADEPT:
        name = re.sub(pattern, new, name)
    return name
