"""From a configuration to its tokenizer and sources."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fuyu_jax.config import DataConfig
from fuyu_jax.data import demo
from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.demo import DemoSource
from fuyu_jax.data.sources.llava import LlavaSource
from fuyu_jax.errors import UserError, nearest
from fuyu_jax.tokenizer import Tokenizer, train_sentencepiece

TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class Sources:
    """Splits by name, opened when asked for."""

    config: DataConfig
    demo_dir: Path | None = None

    @property
    def _json_files(self) -> dict[str, str]:
        """Of LLaVA-style splits; "" where none is given."""
        c = self.config
        return {
            "train": c.train_json,
            "validation": c.validation_json,
            "test": c.test_json or c.validation_json,
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that there are."""
        if self.config.source == "demo":
            return ("train", "validation", "test", "compositional")
        return tuple(name for name, path in self._json_files.items() if path)

    def open(self, split: str) -> Source:
        """The source of a split.

        Raises:
          UserError: no such split.
        """
        if split not in self.splits:
            raise UserError(f'split "{split}" is not there{nearest(split, self.splits)}')
        if self.demo_dir is not None:
            return DemoSource(self.demo_dir, split)
        return LlavaSource(self._json_files[split], self.config.image_dir)


def open_sources(config: DataConfig) -> Sources:
    """Opens (for the demo set: prepares, where it is not there yet) what a configuration names.

    Raises:
      UserError: a needed path is not given.
    """
    if config.source == "demo":
        sizes = None
        if config.demo_train_images:
            sizes = {**demo.DEFAULT_SIZES, "train": config.demo_train_images}
        return Sources(config, demo.prepare(Path(config.data_dir).expanduser(), sizes=sizes))
    if not (config.train_json or config.validation_json or config.test_json):
        raise UserError("no data: give --config.data.train_json=FILE (LLaVA-style JSON or JSONL)")
    return Sources(config)


def open_tokenizer(sources: Sources, workdir: Path) -> Tokenizer:
    """The run's tokenizer, kept in its work folder so that a checkpoint is never without.

    Taken from `data.tokenizer` if given, else from the demo set, else trained on the training
    split's text.
    """
    kept = workdir / TOKENIZER_FILE
    if not kept.is_file():
        config = sources.config
        if config.tokenizer:
            given = Tokenizer(Path(config.tokenizer).expanduser()).path  # checked before it is kept
            _copy(given, kept)
        elif sources.demo_dir is not None:
            _copy(sources.demo_dir / demo.TOKENIZER_FILE, kept)
        else:
            train = sources.open("train")
            assert isinstance(train, LlavaSource)
            side = min(train.largest_side(), max(config.max_image_height, config.max_image_width))
            train_sentencepiece(
                train.texts(), kept, config.tokenizer_vocab, max_coordinate=-(-side // 2)
            )
    return Tokenizer(kept)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    partial.replace(target)
