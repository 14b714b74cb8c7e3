"""Counts and names what the cleaning rules would leave out of a LLaVA-style file.

    python -m fuyu_jax.data.cleaning --llava=FILE [--image_dir=DIR] [--RULE=VALUE ...] --out=FILE

prints the counts as one JSON object and names what is left out in FILE (JSON Lines).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuyu_jax import cli, errors
from fuyu_jax.config import CleaningConfig
from fuyu_jax.data.cleaning import clean
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import UserError


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "1", "false", "0"):
        raise ValueError
    return value.lower() in ("true", "1")


def _flags() -> Any:
    flags = cli.parser(__doc__.partition("\n")[0])
    flags.add_argument("--llava", required=True, help="a LLaVA-style JSON or JSONL file")
    flags.add_argument("--image_dir", default="", help="default: the JSON file's folder")
    flags.add_argument("--out", required=True, help="where to name what is left out (JSON Lines)")
    flags.add_argument("--workers", type=int, default=0, help="threads; 0: one a core")
    for f in dataclasses.fields(CleaningConfig):
        options: dict[str, Any] = {"type": type(f.default)}
        if f.name == "drop_unreadable":
            options = {"choices": ("header", "decode")}
        elif isinstance(f.default, bool):
            options = {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
        flags.add_argument(
            f"--{f.name}", default=f.default, help=f"default: {f.default}", **options
        )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """The program; prints `{"examples", "kept", "counts", "out"}`.

    Raises:
      UserError: a wrong flag or value, no such file or folder.
    """
    args, overrides = cli.parse(_flags(), argv)
    if overrides:
        raise UserError(f'unknown flag "--config.{overrides[0]}": give rules as --RULE=VALUE')
    config = CleaningConfig(
        **{f.name: getattr(args, f.name) for f in dataclasses.fields(CleaningConfig)}
    )
    config.check()
    out = Path(args.out).expanduser()
    if not out.parent.is_dir():  # told now, not after hours of decoding
        raise UserError(f"--out={args.out}: no folder {out.parent}")
    source = LlavaSource(args.llava, args.image_dir)
    report = clean(source, config, workers=args.workers)
    report.write(out)
    told = {"examples": len(source), "kept": len(report.kept), "counts": report.counts}
    print(json.dumps({**told, "out": str(out)}))


if __name__ == "__main__":
    errors.run_main(main)
