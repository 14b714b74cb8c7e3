"""Llama and those built like it: Mistral, Qwen2 (and 2.5), Qwen3. RMSNorm, a gated feed-forward,
grouped queries; they differ in biases, window and q/k norm."""

from typing import Any

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError
from fuyu_jax.interop.fields import Fields, rotary, rotary_fields
from fuyu_jax.interop.mapping import FileTensor, linear, norm, table

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS = {
    "silu": "silu_gated",
    "swish": "silu_gated",
    "gelu_pytorch_tanh": "gelu_gated",
    "gelu_new": "gelu_gated",
}


def read(fields: Fields, model_type: str) -> dict[str, Any]:
    """Fields of `ModelConfig`; defaults are those of transformers' class."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", 8 if model_type == "mistral" else heads)
    if heads % kv_heads:
        raise UserError(f"{fields.where}: {heads} heads do not divide over {kv_heads} key heads")
    derived = 128 if model_type == "qwen3" else dim // heads
    biased = model_type in ("llama", "qwen3") and bool(fields.get("attention_bias", False))
    activation = fields.only("hidden_act", "silu", *_ACTIVATIONS)
    turning = rotary(fields, theta=10_000.0, fraction=1.0)
    if turning["rotary_fraction"] != 1:
        raise UserError(
            f'{fields.where}: "partial_rotary_factor": {turning["rotary_fraction"]} is not '
            f"{model_type}'s, which turns whole heads"
        )
    return {
        "vocab_size": fields.size("vocab_size"),
        "dim": dim,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_dim": fields.size("head_dim", derived),
        "mlp_dim": fields.size("intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "mlp": _ACTIVATIONS[activation],
        "qk_norm": model_type == "qwen3",
        "qkv_bias": biased or model_type == "qwen2",
        "out_bias": biased,
        "mlp_bias": model_type == "llama" and bool(fields.get("mlp_bias", False)),
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "window": _window(fields, model_type),
        "init_std": fields.number("initializer_range", 0.02),
        **turning,
    }


def _window(fields: Fields, model_type: str) -> int:
    """How far back every layer sees; 0 for all."""
    window = fields.values.get("sliding_window", 4096)
    if model_type == "llama":
        return 0
    if model_type == "mistral":
        return window or 0
    layers = fields.size("num_hidden_layers")
    kinds = fields.get("layer_types", None)
    if not kinds:
        full = fields.get("max_window_layers", 28)
        sliding = bool(fields.get("use_sliding_window", False) and window)
        kinds = [
            "sliding_attention" if sliding and i >= full else "full_attention"
            for i in range(layers)
        ]
    if set(kinds) == {"full_attention"}:
        return 0
    if set(kinds) == {"sliding_attention"} and window:
        return window
    raise UserError(
        f"{fields.where}: some layers have a sliding window and some none; only one window for "
        "all layers is supported"
    )


def write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The inverse of `read`; what it cannot say, reading it back shows."""
    written: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if config.mlp == "silu_gated" else "gelu_pytorch_tanh",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        **rotary_fields(config),
    }
    if model_type in ("llama", "qwen3"):
        written["attention_bias"] = config.qkv_bias
    if model_type == "llama":
        written["mlp_bias"] = config.mlp_bias
    if model_type == "mistral":
        written["sliding_window"] = config.window or None
    if model_type in ("qwen2", "qwen3"):
        written |= {
            "use_sliding_window": config.window > 0,
            "sliding_window": config.window or None,
            "max_window_layers": 0 if config.window else config.num_layers,
        }
    return written


def tensors(config: ModelConfig) -> list[FileTensor]:
    """The text model's tensors; names without what is before `layers`."""
    d, h, k, e, f = config.dim, config.num_heads, config.kv_heads, config.head_dim, config.mlp_dim
    a, m = "layers.{}.self_attn", "layers.{}.mlp"
    made = [
        table("embed_tokens.weight", "embedding", config.vocab_size, d),
        *norm("layers.{}.input_layernorm", "layers/attention_norm", d, False),
    ]
    for name, heads in (("q", h), ("k", k), ("v", k)):
        path = f"layers/attention/{name}"
        made += linear(f"{a}.{name}_proj", path, (d,), (heads, e), config.qkv_bias)
    made += linear(f"{a}.o_proj", "layers/attention/out", (h, e), (d,), config.out_bias)
    if config.qk_norm:
        made += norm(f"{a}.q_norm", "layers/attention/q_norm", e, False)
        made += norm(f"{a}.k_norm", "layers/attention/k_norm", e, False)
    made += norm("layers.{}.post_attention_layernorm", "layers/mlp_norm", d, False)
    for name in ("gate", "up"):
        made += linear(f"{m}.{name}_proj", f"layers/mlp/{name}", (d,), (f,), config.mlp_bias)
    made += linear(f"{m}.down_proj", "layers/mlp/down", (f,), (d,), config.mlp_bias)
    return [*made, *norm("norm", "final_norm", d, False)]


def rename(name: str) -> str:
    """All generations of these have the same names."""
    return name
