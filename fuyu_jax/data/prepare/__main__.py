"""Prepares a source into ArrayRecord shards with a sidecar of lengths, from image headers alone.

    python -m fuyu_jax.data.prepare SOURCE OUT [--kind=webdataset] [--tokenizer=FILE.model]
    python -m fuyu_jax.data.prepare OUT --config=FILE --source=NAME [--config.data...=...]

With `--runner` it is an Apache Beam pipeline, and flags that are not ours (as `--NAME=VALUE`) are
Beam's.
"""

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fuyu_jax import cli, config, errors
from fuyu_jax.config import SourceConfig
from fuyu_jax.data.opening import SPLITS
from fuyu_jax.data.prepare.job import Settings
from fuyu_jax.data.prepare.run import prepare
from fuyu_jax.data.sources import common
from fuyu_jax.errors import UserError, nearest

KINDS = get_args(get_type_hints(SourceConfig)["kind"])
_BY_SUFFIX = {".tar": "webdataset", ".parquet": "parquet", ".json": "llava"}
_FIELDS = ("image_dir", "prompt", "max_images", "max_chars", "text_field")


def guess_kind(source: str) -> str:
    """What a source is, by its suffix, its folder, or its first line.

    Raises:
      UserError: it cannot be told.
    """
    if (Path(source).expanduser() / "info.json").is_file():
        return "array_record"
    folder, colon, split = source.partition(":")
    if colon and split and Path(folder).expanduser().is_dir():
        return "tfds"
    suffix = Path(source).suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix == ".jsonl":
        path = common.expand(source, "JSON Lines files")[0]
        with path.open("rb") as file:
            line = next((line for line in file if line.strip()), b"{}")
        record = common.read_json(line, f"{path}, first line")
        for fields, kind in (
            ({"conversations"}, "llava"),
            ({"texts", "images"}, "interleaved"),
            ({"text_list"}, "interleaved"),
            ({"text"}, "text"),
        ):
            if fields <= record.keys():
                return kind
    raise UserError(f"{source}: its kind cannot be told; give --kind={{{','.join(KINDS)}}}")


def _flags() -> Any:
    flags = cli.parser(str(__doc__).partition("\n")[0])
    flags.add_argument("paths", nargs="*", metavar="SOURCE OUT", help="path, pattern; folder")
    flags.add_argument("--kind", help=f"of SOURCE, one of {', '.join(KINDS)}; default: guessed")
    flags.add_argument("--split", choices=SPLITS, default="train")
    flags.add_argument("--image_dir", default="", help="llava, interleaved")
    flags.add_argument("--prompt", default="", help="webdataset, parquet: asked before captions")
    flags.add_argument("--max_images", type=int, default=0, help="interleaved: of one example")
    flags.add_argument("--max_chars", type=int, default=0, help="interleaved, text")
    flags.add_argument("--text_field", default="text", help="text")
    flags.add_argument("--columns", default="", help='parquet: JSON, as {"caption": "alt"}')
    flags.add_argument("--config", help="in place of SOURCE: a configuration ...")
    flags.add_argument("--source", help="... and one of its sources, by name")
    flags.add_argument("--tokenizer", default="", help="a sentencepiece model, to count tokens")
    flags.add_argument("--check", choices=("header", "decode"), default="header", help="of images")
    flags.add_argument("--shard_size_mb", type=int, default=256)
    flags.add_argument("--examples_per_shard", type=int, default=0, help="0: by size")
    flags.add_argument("--max_bad_share", type=float, default=0.01)
    flags.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    flags.add_argument("--runner", help="of Apache Beam, as DirectRunner")
    return flags


def _parse(argv: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    """Our flags, `--config.` ones, and with `--runner` those for Beam."""
    flags = _flags()
    known = {name for action in flags._actions for name in action.option_strings}
    paths: list[str] = []
    ours: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:  # argparse wants all paths in one place
        arg = rest.pop(0)
        name, equals, _ = arg.partition("=")
        if not arg.startswith("-"):
            paths.append(arg)
        elif name not in known and not name.startswith("--config."):
            others.append(arg)
        else:
            ours += [arg] if equals or not rest else [arg, rest.pop(0)]
    with_runner = any(arg.partition("=")[0] == "--runner" for arg in ours)
    args, overrides = cli.parse(flags, paths + ours + ([] if with_runner else others))
    return args, overrides, others


def _part(args: Any, overrides: list[str]) -> tuple[SourceConfig, str]:
    """The source, and OUT."""
    if args.config:
        if len(args.paths) != 1:
            raise UserError("with --config give OUT alone: the source is --source=NAME")
        given = [f for f in ("kind", "columns", *_FIELDS) if getattr(args, f) not in (None, "", 0)]
        if given and given != ["text_field"]:
            raise UserError(f"--{given[0]}: with --config it is the source's own")
        parts = {part.name: part for part in config.load(args.config, overrides).data.mixture}
        if args.source not in parts:
            name = args.source or ""
            raise UserError(f'--source="{name}": not in {args.config}{nearest(name, parts)}')
        part = parts[args.source]
    else:
        if overrides or args.source:
            raise UserError("--source and --config.NAME=VALUE need --config=FILE")
        if len(args.paths) != 2:
            raise UserError(f"give SOURCE and OUT, not {len(args.paths)} paths (see --help)")
        source = args.paths[0]
        kind = args.kind or guess_kind(source)
        if kind not in KINDS:
            raise UserError(f'--kind="{kind}"{nearest(kind, KINDS)}')
        part = SourceConfig("source", kind, source, source, source)
        part = config.replace(part, {name: getattr(args, name) for name in _FIELDS})
        if args.columns:
            columns = common.read_json(args.columns.encode(), "--columns")
            part = config.replace(part, {f"columns.{k}": v for k, v in columns.items()})
    if not (path := getattr(part, args.split)):
        raise UserError(f'source "{part.name}" has no "{args.split}"')
    # The same from every folder and in every process.
    changes = {args.split: _absolute(path)}
    if part.image_dir:
        changes["image_dir"] = _absolute(part.image_dir)
    return config.replace(part, changes), args.paths[-1]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def main(argv: Sequence[str] | None = None) -> None:
    """The program; prints one JSON object.

    Raises:
      UserError: bad flags, a bad source, another set in OUT, too many bad examples.
    """
    args, overrides, beams = _parse(sys.argv[1:] if argv is None else argv)
    part, out = _part(args, overrides)
    if not 0 <= args.max_bad_share <= 1:
        raise UserError(f"--max_bad_share={args.max_bad_share}: must be in 0..1")
    if args.workers < 0:
        raise UserError(f"--workers={args.workers}: must be 0 or more")
    runner = None
    if args.runner:
        if args.workers:
            raise UserError("--workers: with --runner processes are Beam's, see its own flags")
        from fuyu_jax.data.prepare import beam

        runner = functools.partial(beam.run, options=beam.pipeline_options(args.runner, beams))
    settings = Settings(
        part,
        args.split,
        _absolute(args.tokenizer) if args.tokenizer else "",
        args.check,
        args.shard_size_mb,
        args.examples_per_shard,
    )
    told = prepare(
        settings,
        out if "://" in out else _absolute(out),
        workers=args.workers,
        max_bad_share=args.max_bad_share,
        runner=runner,
    )
    print(json.dumps(told))


if __name__ == "__main__":
    errors.run_main(main)
