"""Trains a model: `python train.py --config=configs/quickstart.py [--workdir=DIR]`.

The same command again goes on where a run stopped. Any field of the config can be given as a flag,
such as --config.optim.peak_lr=1e-3.
"""

from fuyu_jax import cli, errors


def main() -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("--config", required=True, help="a file with get_config() -> TrainConfig")
    flags.add_argument("--workdir", help="where the run lives; overrides the config's")
    args, overrides = cli.parse(flags)

    from fuyu_jax import config as config_lib  # after the flags, so that --help is quick

    if args.workdir:
        overrides.append(f"workdir={args.workdir}")
    config = config_lib.load(args.config, overrides)

    from fuyu_jax.parallel import use_cpu_cores
    from fuyu_jax.train import Trainer

    use_cpu_cores(config.rows_per_batch)
    Trainer(config).run()


if __name__ == "__main__":
    errors.run_main(main)
