"""Fuyu-8B: continue its training, or fine-tune it on your own images.

    python train.py --config=configs/fuyu_8b.py --config.init_from=FOLDER \
        --config.data.train_json=train.jsonl

FOLDER is Fuyu-8B as Hugging Face has it, or a work folder of an earlier run. Without `init_from` it
begins afresh, and needs a tokenizer (`data.tokenizer`).

A step's rows are `rows_per_batch` × `grad_accum`, of 8,192 tokens each. With AdamW's moments and
the parameters in float32, 9.4 billion parameters take 12 bytes each, divided by fsdp:

* TPU pods, as it stands: groups of fsdp=16 chips share the state, 7.2 GB a chip. With 256 rows it
  fits v5p:4x4x4 and v6e:16x16 (`--aot=v5p:4x4x4` shows it without one). fsdp=16 and not all chips:
  over 64 or 256 chips the compiler makes all-reduces of gathers and scatters, at twice the bytes
  (docs/performance.md).
* v5p with 32 chips:
      --config.rows_per_batch=64
* one node of 8 GPUs of 80 GB: 14 GB a GPU.
      --config.mesh.fsdp=8 --config.rows_per_batch=8 --config.grad_accum=4
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
        rows_per_batch=256,
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
        mesh=MeshConfig(data=-1, fsdp=16, tensor=1),
    )
