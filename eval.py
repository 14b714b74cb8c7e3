"""Evaluates a checkpoint: `python eval.py --checkpoint=WORKDIR --split=test [--out=DIR]`.

Generates an answer to every question of a split and writes samples.jsonl, metrics.json and
sheet.png. Any field of the run's data config can be given as a flag, such as
--config.data.test_json=FILE.
"""

from pathlib import Path

from fuyu_jax import cli, errors


def main() -> None:
    flags = cli.parser(__doc__)
    flags.add_argument(
        "--checkpoint", required=True, help="a work folder, or WORKDIR/checkpoints/N"
    )
    flags.add_argument("--split", default="test")
    flags.add_argument("--out", help="default: WORKDIR/eval/SPLIT-step_N")
    flags.add_argument("--limit", type=int, default=0, help="examples at most; 0: all")
    flags.add_argument("--batch_size", type=int, default=0, help="default: the config's")
    flags.add_argument("--max_new_tokens", type=int, default=0, help="default: the config's")
    flags.add_argument("--blind", action="store_true", help="zero all patches")
    args, overrides = cli.parse(flags)

    from fuyu_jax.evals.checkpointed import evaluate_checkpoint

    evaluate_checkpoint(
        Path(args.checkpoint),
        args.split,
        out=Path(args.out) if args.out else None,
        limit=args.limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        blind=args.blind,
        overrides=overrides,
    )


if __name__ == "__main__":
    errors.run_main(main)
