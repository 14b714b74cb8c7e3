"""The whole path in minutes on two CPU cores: the demo set, a small Fuyu, evaluation, pictures.

`docs/learning.md` tells why the settings are as they are.
"""

from fuyu_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="quickstart",
        workdir="workdir",
        num_steps=1900,
        rows_per_batch=2,
        checkpoint_every=600,
        model=ModelConfig(
            dim=128,
            num_layers=4,
            num_heads=4,
            head_dim=32,
            mlp_dim=512,
            patch_size=16,
            init_std=0.09,  # about 1/√dim: Fuyu's 0.02 is for 4096
            patch_init="whiten",
            patch_init_std=0.5,
            embedding_init_std=0.5,
        ),
        data=DataConfig(
            source="demo",
            tokens_per_row=1024,
            patches_per_row=512,
            plan_block=1024,
            easy_first_epochs=1,
        ),
        optim=OptimConfig(name="muon", muon_lr=0.02, peak_lr=2e-3, warmup_steps=30),
        eval=EvalConfig(every=380, examples=256, batch_size=64, max_new_tokens=48),
    )
