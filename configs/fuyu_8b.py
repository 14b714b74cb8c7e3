"""Fuyu-8B: continue its training, or fine-tune it on your own images.

    python train.py --config=configs/fuyu_8b.py --config.init_from=FOLDER \
        --config.data.train_json=train.jsonl

FOLDER is Fuyu-8B as Hugging Face has it, or a work folder of an earlier run. Without `init_from` it
begins afresh, and needs a tokenizer (`data.tokenizer`).

A step's rows are `rows_per_batch` × `grad_accum`, of 8,192 tokens each. Per device, with AdamW's
moments and the parameters in float32, 9.4 billion parameters take 16 bytes each, divided by fsdp:

* v5p-64 (32 chips of 95 GB): as it stands: mesh fsdp=-1, so 32; 4.7 GB a chip.
      --config.rows_per_batch=32 --config.grad_accum=1
* one node of 8 GPUs of 80 GB: 18.8 GB a GPU.
      --config.rows_per_batch=8 --config.grad_accum=4
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
        name="fuyu_8b",
        workdir="runs/fuyu_8b",
        num_steps=2_000,
        rows_per_batch=32,
        grad_accum=1,
        checkpoint_every=200,
        log_every=5,
        model=ModelConfig(
            vocab_size=262_144,
            dim=4096,
            num_layers=36,
            num_heads=64,
            head_dim=64,
            mlp_dim=16_384,
            norm="layernorm",
            mlp="relu2",
            qk_norm=True,
            rotary_fraction=0.5,
            rotary_base=25_000.0,
            patch_size=30,
            # float16 gives no numbers with these weights; they were trained in bfloat16.
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="llava",
            tokens_per_row=8192,
            patches_per_row=7168,
            jpeg_draft=False,  # as Fuyu's own images were made
            balance_patches=True,
            workers=4,
            prefetch_rows=64,
        ),
        optim=OptimConfig(
            name="adamw",
            peak_lr=1e-5,
            end_lr_ratio=0.1,
            warmup_steps=50,
            b2=0.95,
            weight_decay=0.0,
        ),
        eval=EvalConfig(every=0, batch_size=8, summary=False),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
    )
