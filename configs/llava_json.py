"""Training on your own pictures: any LLaVA-style JSON, given by flags.

python train.py --config=configs/llava_json.py --workdir=runs/mine \
    --config.data.train_json=my/train.json --config.data.validation_json=my/validation.json

Image paths begin at the JSON file's folder, or at --config.data.image_dir. A sentencepiece
tokenizer is trained on the training text unless --config.data.tokenizer=FILE.model is given.
"""

from fuyu_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="llava_json",
        workdir="runs/llava_json",
        num_steps=1000,
        rows_per_batch=2,
        checkpoint_every=250,
        model=ModelConfig(
            dim=128,
            num_layers=3,
            num_heads=2,
            head_dim=64,
            mlp_dim=512,
            patch_size=30,
            init_std=0.09,  # about 1/√dim: Fuyu's 0.02 is for 4096
            patch_init="whiten",
            patch_init_std=1.0,
            embedding_init_std=0.5,
        ),
        data=DataConfig(source="llava", tokens_per_row=2048, patches_per_row=1920),
        optim=OptimConfig(
            name="muon",
            muon_lr=0.01,
            peak_lr=1e-3,
            warmup_steps=50,
            weight_decay=0.01,
            lr_multipliers=(("patch_projection", 0.05),),  # keeps the whitening (docs/learning.md)
        ),
        eval=EvalConfig(every=250, examples=64, batch_size=8, max_new_tokens=96),
    )
