"""The whole path in minutes on two CPU cores: the demo set, a small Fuyu, evaluation, pictures.

`docs/learning.md` tells why the settings are as they are.
"""

from fuyu_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="quickstart",
        workdir="workdir",
        num_steps=2500,
        rows_per_batch=2,
        checkpoint_every=625,
        model=ModelConfig(
            dim=128,
            num_layers=4,
            num_heads=4,
            head_dim=32,
            mlp_dim=512,
            patch_size=16,
            init_std=0.09,  # about 1/√dim: Fuyu's 0.02 is for 4096
            patch_init="whiten",
            patch_init_std=1.0,
            embedding_init_std=0.5,
            image_positions="fourier",
        ),
        data=DataConfig(
            source="demo",
            tokens_per_row=1024,
            patches_per_row=512,
            plan_block=1024,
        ),
        optim=OptimConfig(
            name="muon",
            muon_lr=0.01,
            peak_lr=1e-3,
            warmup_steps=30,
            # 768 inputs that move together: at Adam's full rate the whitening is gone in 100 steps.
            lr_multipliers=(("patch_projection", 0.05),),
        ),
        eval=EvalConfig(every=500, examples=256, batch_size=64, max_new_tokens=48),
    )
