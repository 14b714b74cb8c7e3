"""Converts weights: `python -m fuyu_jax.interop.convert SRC DST`.

SRC a Hugging Face folder (Fuyu, Persimmon, Llama, Mistral, Qwen2, Qwen3): DST becomes a work folder
with checkpoint 0. SRC a work folder or WORKDIR/checkpoints/N: DST becomes a folder that
transformers opens.
"""

import re
from pathlib import Path

from fuyu_jax import cli, errors
from fuyu_jax.errors import UserError, nearest

_AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """`fsdp=8,tensor=2` as numbers."""
    mesh: dict[str, int] = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        if name not in _AXES:
            raise UserError(f'--mesh: axis "{name}" is unknown{nearest(name, _AXES)}')
        if not re.fullmatch(r"[1-9]\d*", number):
            raise UserError(f'--mesh: "{item}": write it as {name}=NUMBER')
        mesh[name] = int(number)
    return mesh


def main() -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("source", metavar="SRC")
    flags.add_argument("target", metavar="DST")
    flags.add_argument(
        "--mesh", help="to orbax: cut files for the shards of a run's mesh, as data=2,fsdp=8"
    )
    flags.add_argument(
        "--no_image_tokens",
        action="store_true",
        help="to orbax, of a text model: leave the vocabulary as it is",
    )
    flags.add_argument(
        "--patch_size", type=int, help="to orbax, of a text model: of its patches (default 30)"
    )
    flags.add_argument(
        "--seed", type=int, default=0, help="to orbax, of a text model: of what is new"
    )
    flags.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="to Hugging Face: of all tensors (default: as they came, else as stored)",
    )
    flags.add_argument(
        "--text_only",
        action="store_true",
        help="to Hugging Face: the text model alone, without the patch projection",
    )
    args, _ = cli.parse(flags)
    source, target = Path(args.source).expanduser(), Path(args.target).expanduser()
    if "://" in args.source + args.target:
        raise UserError(f"{args.source} {args.target}: only local folders are converted")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")

    from fuyu_jax.interop.files import is_work_folder

    if is_work_folder(source):
        _only_for(args, "a Hugging Face folder", "mesh", "no_image_tokens", "patch_size", "seed")

        from fuyu_jax.interop.exporting import to_hugging_face

        written = to_hugging_face(source, target, dtype=args.dtype, text_only=args.text_only)
        print(f"{target}: {written}")
        return
    _only_for(args, "a work folder", "dtype", "text_only")

    from fuyu_jax.config import MeshConfig
    from fuyu_jax.interop.importing import to_work_folder

    read = to_work_folder(
        source,
        target,
        image_tokens=not args.no_image_tokens,
        patch_size=args.patch_size or 30,
        seed=args.seed,
        mesh=MeshConfig(**{"data": 1, **parse_mesh(args.mesh)}) if args.mesh else None,
    )
    print(f"{target}: {read}")


def _only_for(args, other: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UserError(f"--{name} is for when SRC is {other}")


if __name__ == "__main__":
    errors.run_main(main)
