"""Flags: `--config=FILE`, `--config.a.b=VALUE`, and a program's own."""

import argparse
import sys
from collections.abc import Sequence

from fuyu_jax.errors import UserError, nearest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line."""
    return _Parser(description=description, allow_abbrev=False)


def parse(
    flags: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The program's flags, and what was given as `--config.NAME=VALUE` or `--config.NAME VALUE`.

    Raises:
      UserError: an unknown flag; names the nearest one.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    own: list[str] = []
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--config."):
            own.append(arg)
            continue
        name = arg.removeprefix("--config.")
        if "=" not in name:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--config.{name}: give it a value, as --config.{name}=VALUE")
            name = f"{name}={rest.pop(0)}"
        overrides.append(name)
    known, unknown = flags.parse_known_args(own)
    if unknown:
        names = [s for a in flags._actions for s in a.option_strings if s.startswith("--")]
        flag = unknown[0].partition("=")[0]
        raise UserError(f'unknown flag "{flag}"{nearest(flag, names)}')
    return known, overrides
