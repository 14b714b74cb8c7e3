"""Tiny random models of transformers, saved as it saves them, and both programs' forward passes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from fuyu_jax.batch import PackedBatch
from fuyu_jax.model import make_decoder

IMAGE, NEWLINE = 5, 6
TEXT = {
    "persimmon": dict(num_attention_heads=4, rope_theta=25_000.0),
    "persimmon-plain": dict(num_attention_heads=2, qk_layernorm=False, rope_theta=500.0),
    "llama": dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5),
    "llama-tied-biased": dict(
        num_attention_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-stretched": dict(
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-linear": dict(
        num_attention_heads=4,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "mistral": dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=5),
    "qwen2": dict(num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6),
    "qwen2-tied": dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
}
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    max_position_embeddings=128,
)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, norms and biases too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * noise)
    return model.eval()


def text_model(kind: str, **changes):
    name = kind.split("-")[0]
    config_class = {
        "persimmon": transformers.PersimmonConfig,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[name]
    config = config_class(**{**SIZES, **TEXT[kind], **changes})
    return randomise(transformers.AutoModelForCausalLM.from_config(config))


def fuyu_model(patch_size: int = 4, text: str = "persimmon", **changes):
    values = {**SIZES, **TEXT[text], "model_type": text.split("-")[0], **changes}
    config = transformers.FuyuConfig(
        text_config=values,
        patch_size=patch_size,
        image_token_id=IMAGE,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
    )
    return randomise(transformers.FuyuForCausalLM(config))


def save(model, folder: Path, **arguments) -> Path:
    model.save_pretrained(folder, **arguments)
    return folder


def pixels(patches: np.ndarray) -> torch.Tensor:
    """Raw patches as the reference's processor hands them to its model."""
    return torch.tensor((patches.astype(np.float32) / 255 - 0.5) / 0.5)


def one_batch(rows: list[list[int]], channels: int, seed: int = 0) -> PackedBatch:
    """Rows of tokens from index 0 on, with random patches for their placeholders.

    Of one shape as far as may be, so that less is compiled.
    """
    rng = np.random.default_rng(seed)
    patches = max(row.count(IMAGE) for row in rows)
    size = -(-max(map(len, rows)) // 96) * 96
    batch = PackedBatch.empty(len(rows), size, -(-patches // 64) * 64, channels)
    for i, row in enumerate(rows):
        batch.tokens[i, : len(row)] = row
        batch.segment_ids[i, : len(row)] = 1
        batch.positions[i, : len(row)] = np.arange(len(row))
        number = row.count(IMAGE)
        batch.patches[i, :number] = rng.integers(0, 256, (number, channels))
    return batch


def our_logits(config, params, batch: PackedBatch) -> np.ndarray:
    graph = nnx.split(
        nnx.eval_shape(lambda: make_decoder(config, image_id=IMAGE, newline_id=NEWLINE))
    )[0]

    @jax.jit
    def logits(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch))

    return np.asarray(logits(params, jax.tree.map(jnp.asarray, batch)))


def check_logits(ours, theirs, batch: PackedBatch) -> None:
    """max |Δ| ≤ 2e-4, the issue's bound, at all tokens that are no padding.

    float32 through a few layers, sums in another order; logits are of size 5, and 1e-5 is usual.
    """
    real = batch.segment_ids > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=2e-4)


def their_logits(model, tokens, **arguments) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(tokens)), **arguments).logits.numpy()
