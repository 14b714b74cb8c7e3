"""From a language model to one that sees: Mistral-7B, a new patch projection, image tokens.

    python train.py --config=configs/solo_7b.py --config.init_from=FOLDER \
        --config.data.mixture='[{"name": "captions", "kind": "webdataset", ...}, ...]'

FOLDER is Mistral-7B as Hugging Face has it (v0.1: 32,000 tokens and a window of 4,096; of v0.2 and
v0.3 set --config.model.window=0, --config.model.rotary_base=1e6, and the vocabulary that the
error names). Its vocabulary is extended by the image tokens and by one token for each coordinate
of a box; the new rows lie around the mean row, the patch projection is drawn afresh. As SOLO does,
pre-train on captions with text alone mixed in (a source of kind "text"), then on instructions with
another run whose `init_from` is this one's work folder.

Per device, 7.3 billion parameters of 16 bytes (float32, AdamW), divided by fsdp:

* v5p-64 (32 chips of 95 GB): as it stands: mesh fsdp=-1, so 32; 3.6 GB a chip.
      --config.rows_per_batch=64 --config.grad_accum=1
* one node of 8 GPUs of 80 GB: 14.5 GB a GPU.
      --config.rows_per_batch=8 --config.grad_accum=8
"""

from fuyu_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="solo_7b",
        workdir="runs/solo_7b",
        num_steps=10_000,
        rows_per_batch=64,
        grad_accum=1,
        checkpoint_every=500,
        log_every=5,
        model=ModelConfig(
            vocab_size=33_024,  # 32,000, marks and 961 coordinates; a multiple of 128
            dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            norm="rmsnorm",
            norm_eps=1e-5,
            mlp="silu_gated",
            qk_norm=False,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            rotary_fraction=1.0,
            rotary_base=10_000.0,
            window=4096,
            patch_size=32,  # SOLO's
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="mixture",
            tokens_per_row=8192,
            patches_per_row=7168,
            # SOLO shrinks images to 1,024 pixels on the longer side: 32 × 32 patches at most.
            max_image_height=1024,
            max_image_width=1024,
            balance_patches=True,
            workers=4,
            prefetch_rows=64,
        ),
        optim=OptimConfig(
            name="adamw",
            peak_lr=5e-5,
            end_lr_ratio=0.1,
            warmup_steps=200,
            b2=0.95,
            weight_decay=0.1,
        ),
        eval=EvalConfig(every=0, batch_size=8, summary=False),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
    )
