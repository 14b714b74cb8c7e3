"""The whole path in minutes on two CPU cores: the demo set, a small Fuyu, evaluation, pictures."""

from fuyu_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="quickstart",
        workdir="workdir",
        num_steps=1500,
        rows_per_batch=4,
        checkpoint_every=500,
        model=ModelConfig(
            dim=128, num_layers=4, num_heads=4, head_dim=32, mlp_dim=512, patch_size=16
        ),
        data=DataConfig(source="demo", tokens_per_row=1024, patches_per_row=768),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=100),
        eval=EvalConfig(every=500, examples=128, batch_size=64, max_new_tokens=48),
    )
