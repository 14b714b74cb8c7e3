"""Trains a model: `python train.py --config=configs/quickstart.py [--workdir=DIR]`.

The same command again goes on where a run stopped. Any field of the config can be given as a flag,
such as --config.optim.peak_lr=1e-3.

On several hosts: the same command on each. Cloud TPU, GKE, Slurm and Open MPI are found by
themselves; elsewhere give --coordinator, --num_processes and --process_id. See docs/launch.md.
"""

import sys

from fuyu_jax import cli, errors


def main() -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("--config", required=True, help="a file with get_config() -> TrainConfig")
    flags.add_argument("--workdir", help="where the run lives; overrides the config's")
    flags.add_argument("--profile_steps", help="FIRST:END, such as 10:13: trace these steps")
    flags.add_argument("--coordinator", help="several hosts: HOST:PORT of process 0")
    flags.add_argument("--num_processes", type=int, help="several hosts: how many processes")
    flags.add_argument("--process_id", type=int, help="several hosts: which of them, from 0")
    flags.add_argument(
        "--aot", help="a TPU topology, such as v5p:4x4x4: compile for it, report, train nothing"
    )
    args, overrides = cli.parse(flags)

    from fuyu_jax import config as config_lib  # after the flags, so that --help is quick

    if args.workdir:
        overrides.append(f"workdir={args.workdir}")
    if args.profile_steps:
        overrides.append(f"profile_steps={args.profile_steps}")
    config = config_lib.load(args.config, overrides)
    if args.aot:
        from fuyu_jax.parallel import topology

        topology.use_libtpu()  # before JAX is first used

        from fuyu_jax.train import aot

        sys.exit(0 if aot.run(config, args.aot) else 1)

    from fuyu_jax.parallel import hosts, use_cpu_cores

    # Before JAX is first used.
    processes = hosts.start_hosts(args.coordinator, args.num_processes, args.process_id)
    use_cpu_cores(config.rows_per_batch, processes)

    from fuyu_jax.train import Trainer

    with hosts.leaving_together():
        Trainer(config).run()


if __name__ == "__main__":
    errors.run_main(main)
