"""A mixture, packed: lengths, plans, rows in order, batches for one host or many.

The state of it all is {plan hash, epoch, next row}: which rows come in which order does not depend
on workers, threads or hosts.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import DataConfig, check_data, digest
from fuyu_jax.data.cleaning import CleanedSource
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.lengths import BadExamples, Lengths, measure, measure_visit
from fuyu_jax.data.mixture import Draws, Mixture, Part
from fuyu_jax.data.plan import Plan, make_plan
from fuyu_jax.data.rows import Buffers, Row, RowSource, visit_of
from fuyu_jax.data.sources.base import Source
from fuyu_jax.data.sources.common import counted
from fuyu_jax.errors import UserError
from fuyu_jax.tokenizer import Tokenizer


class Position(NamedTuple):
    """Where the next global batch begins."""

    epoch: int
    row: int


class Batch(NamedTuple):
    """This host's rows of one global batch, their examples, and the position after the batch."""

    rows: PackedBatch
    ids: tuple[tuple[str, ...], ...]
    after: Position
    dropped: int = 0  # patches, by token dropping


# Worker processes are started anew for each run of epochs that has so many rows.
_ROWS_OF_WORKERS = 4096


def _digest(parts: Iterable[bytes]) -> str:
    """A short hash of byte strings and where each ends."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


class _Picked:
    """Some rows of one epoch or several, in order; unlike a slice of it, in any pattern."""

    def __init__(self) -> None:
        self._parts: list[tuple[RowSource, np.ndarray]] = []
        self._ends: list[int] = []

    def add(self, rows: RowSource, indices: np.ndarray) -> None:
        self._parts.append((rows, indices))
        self._ends.append(len(self) + len(indices))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        at = bisect.bisect_right(self._ends, index)
        rows, indices = self._parts[at]
        return rows[int(indices[index - (self._ends[at - 1] if at else 0)])]


class PackedData:
    """A source or a mixture, packed.

    Memory is that of lengths and plans (some 90 bytes an example), of the rows in flight
    (`prefetch_rows` of S·16 + P·(C + 8) bytes with threads, twice that with worker processes), and
    of one decoded image a thread.

    Args:
      source: examples by index, or a mixture of such.
      tokenizer: for their texts.
      policy: for their images; a mixture brings its own.
      config: budgets and loading.
      seed: of the order.
      balance_rows: of a global batch, whose rows are to have about equally many patches; 0: not.
      quiet: say nothing of bad examples (another host does).

    Raises:
      UserError: no example fits a row.
      TrainingStoppedError: too many images are missing or broken.
    """

    def __init__(
        self,
        source: Source | Mixture,
        tokenizer: Tokenizer,
        policy: LayoutPolicy,
        config: DataConfig,
        seed: int,
        balance_rows: int = 0,
        quiet: bool = False,
    ):
        check_data(config)
        if not isinstance(source, Mixture):
            source = Mixture([Part("all", source, 1.0, policy)], seed)
        self.mixture = source
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed
        self.balance_rows = balance_rows
        total = sum(source.sizes)
        cleaned = [p for p in source.parts if isinstance(p.source, CleanedSource)]
        left_out = sum(len(p.source.source) - len(p.source) for p in cleaned)
        self.bad = BadExamples.under(config, total + left_out, quiet=quiet)
        labels = {p.name: f"{p.name}/" if len(source.parts) > 1 else "" for p in source.parts}
        for part in cleaned:
            for id, reason in part.source.unreadable:
                self.bad.add(labels[part.name] + id, reason)
        self.lengths: list[Lengths] = [
            measure(part, tokenizer, self.bad, labels[part.name]) for part in source.parts
        ]
        self._buffers = Buffers()
        self._epochs: dict[int, RowSource] = {}
        self._sizes: dict[int, int] = {}  # rows of the epochs planned so far
        first = self.plan(0)
        if not first.rows:
            raise UserError(
                f"none of {total} examples fits a row of {config.tokens_per_row} tokens and "
                f"{config.patches_per_row} patches; raise data.tokens_per_row and "
                "data.patches_per_row, or lower data.max_image_height and data.max_image_width"
            )

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides which rows come in which order, and what that comes to."""
        config = self.config
        settings: dict[str, Any] = {
            "seed": self.seed,
            "tokens_per_row": config.tokens_per_row,
            "patches_per_row": config.patches_per_row,
            "plan_block": config.plan_block,
            "easy_first_epochs": config.easy_first_epochs,
            "balance_rows": self.balance_rows,
        }
        for part, lengths in zip(self.mixture.parts, self.lengths, strict=True):
            about: dict[str, Any] = {
                "weight": part.weight,
                "examples": len(part.source),
                "ids": _digest(part.source.id(i).encode() for i in range(len(part.source))),
                "lengths": _digest([lengths.tokens.tobytes(), lengths.patches.tobytes()]),
                "policy": dataclasses.asdict(part.policy),
            }
            if config.easy_first_epochs:
                about["difficulty"] = _digest([lengths.difficulty.tobytes()])
            if isinstance(part.source, CleanedSource):
                about |= {f"cleaning.{k}": v for k, v in part.source.settings.items()}
            settings |= {f"{part.name}.{k}": v for k, v in about.items()}
        # Another planner makes other rows of the same settings.
        settings["first_plan"] = self.plan(0).hash
        return json.loads(json.dumps(settings))

    @functools.cached_property
    def hash(self) -> str:
        return digest(self.settings)

    @property
    def images(self) -> int:
        return sum(x.images for x in self.lengths)

    @property
    def resized(self) -> int:
        """Images that are shrunk (as far as that is not left to chance)."""
        return sum(x.resized for x in self.lengths)

    # --- epochs -------------------------------------------------------------------------------

    def row_source(self, epoch: int) -> RowSource:
        """The rows of an epoch by index."""
        if epoch not in self._epochs:
            draws = self.mixture.draws(epoch)
            plan = self._make_plan(epoch, draws)
            # A batch may span two epochs; older ones are not needed again.
            self._epochs = {e: rows for e, rows in self._epochs.items() if e == epoch - 1}
            self._sizes[epoch] = plan.rows
            self._epochs[epoch] = RowSource(
                self.mixture, self.tokenizer, plan, draws, epoch, self.seed, self._buffers
            )
        return self._epochs[epoch]

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch; its examples are numbers of draws."""
        return self.row_source(epoch).plan

    def _make_plan(self, epoch: int, draws: Draws) -> Plan:
        tokens = np.zeros(len(draws.part), np.int32)
        patches, difficulty = tokens.copy(), np.ones(len(draws.part), np.float32)
        ordered = False
        for k, (part, lengths) in enumerate(zip(self.mixture.parts, self.lengths, strict=True)):
            here = np.flatnonzero(draws.part == k)
            index = draws.index[here]
            tokens[here], patches[here] = lengths.tokens[index], lengths.patches[index]
            difficulty[here] = lengths.difficulty[index]
            if part.policy.changes:
                ordered = True
                for d in here[tokens[here] > 0]:
                    visit = visit_of(self.mixture, draws, int(d), epoch, self.seed)
                    tokens[d], patches[d] = measure_visit(part, lengths, self.tokenizer, visit)
        usable = np.flatnonzero(tokens)
        plan = make_plan(
            tokens[usable],
            patches[usable],
            tokens_per_row=self.config.tokens_per_row,
            patches_per_row=self.config.patches_per_row,
            seed=self.seed,
            epoch=epoch,
            block=self.config.plan_block,
            difficulty=difficulty[usable] if epoch < self.config.easy_first_epochs else None,
            balance_rows=self.balance_rows,
            ordered=ordered,
        )
        return dataclasses.replace(
            plan, examples=usable[plan.examples], oversize=usable[plan.oversize]
        )

    @property
    def oversize(self) -> list[str]:
        """Ids of the first epoch's examples that fit no row."""
        rows = self.row_source(0)
        return [rows.name(int(d)) for d in rows.plan.oversize]

    def sample_patches(self, count: int) -> UInt8[np.ndarray, "N C"]:
        """Some `count` patches of the first epoch's first rows (fewer where there are no more)."""
        rows, found, taken = self.row_source(0), [], 0
        for index in range(len(rows)):
            batch = rows[index].batch
            used = int((batch.tokens[0] == self.tokenizer.image_id).sum())
            found.append(batch.patches[0, :used])
            taken += used
            if taken >= count:
                break
        return np.concatenate(found)[:count]

    def report(self) -> str:
        """What the plan does with the sources, in one line."""
        plan = self.plan(0)
        text = (
            f"{len(plan.examples) + len(plan.oversize)} examples, {plan.rows} rows an epoch of "
            f"{plan.tokens_per_row} tokens and {plan.patches_per_row} patches; padding "
            f"{plan.token_padding:.2%} of tokens, {plan.patch_padding:.2%} of patches"
        )
        if len(self.mixture.parts) > 1:
            passes = self.mixture.passes(self.mixture.epoch_draws)
            text += "; an epoch goes through " + ", ".join(
                f"{k} {v:.2f}×" for k, v in passes.items()
            )
        if self.resized:
            text += f"; {self.resized} of {self.images} images are shrunk"
        if left_out := self.oversize:
            first = ", ".join(left_out[:3])
            text += f"; {len(left_out)} examples fit no row and are left out ({first}, ...)"
        if empty := sum(x.empty for x in self.lengths):
            text += f"; {empty} examples are empty and are left out"
        for part in self.mixture.parts:
            source = getattr(part.source, "source", part.source)  # of one that is cleaned
            for told in counted(source).values():
                text += f"; {part.name}: {told}"
        if self.bad.reasons:
            text += f"; {len(self.bad.reasons)} examples have bad images and are left out"
        return text

    def save_plan(self, folder: Path) -> None:
        """Writes `plan.json` (settings, hash and figures) and `plan.npz` of the first epoch."""
        plan = self.plan(0)
        about = {
            "hash": self.hash,
            "rows": plan.rows,
            "examples": len(plan.examples),
            "oversize": len(plan.oversize),
            "token_padding": plan.token_padding,
            "patch_padding": plan.patch_padding,
            "max_wait_blocks": plan.max_wait_blocks,
            "first_epoch_hash": plan.hash,
            "settings": self.settings,
        }
        partial = folder / ".plan.json.partial"
        partial.write_text(json.dumps(about, indent=1) + "\n")
        partial.replace(folder / "plan.json")
        plan.save(folder / "plan.npz")

    # --- rows in order ------------------------------------------------------------------------

    def _host_rows(self, start: Position, per_batch: int, host: int, hosts: int) -> Iterator[Row]:
        """This host's rows of global batches of `per_batch`."""
        epoch, first = start
        place = 0  # of the epoch's next row in its global batch
        share = per_batch // hosts
        wanted = _ROWS_OF_WORKERS if self.config.workers else 1
        while True:
            picked = _Picked()
            while len(picked) < wanted:
                rows = self.row_source(epoch)
                indices = np.arange(first, len(rows))
                mine = indices[((indices - first + place) % per_batch) // share == host]
                picked.add(rows, mine)
                place = (place + len(indices)) % per_batch
                epoch, first = epoch + 1, 0
            for row in self._read(picked):
                for id, reason in row.skipped:
                    self.bad.add(id, reason)
                yield row

    def _read(self, picked: _Picked) -> Iterator[Row]:
        """The rows, made ahead by threads or processes, in order whatever their number."""
        config = self.config
        dataset = grain.MapDataset.source(picked)
        if not config.workers:
            options = grain.ReadOptions(
                num_threads=config.threads, prefetch_buffer_size=config.prefetch_rows
            )
            return iter(dataset.to_iter_dataset(options))
        if not flags.FLAGS.is_parsed():  # grain asks absl for flags, which we do not use
            flags.FLAGS.mark_as_parsed()
        each = max(1, config.prefetch_rows // config.workers)
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=each)
        processes = grain.MultiprocessingOptions(
            num_workers=config.workers, per_worker_buffer_size=each
        )
        return iter(dataset.to_iter_dataset(options).mp_prefetch(processes))

    def batches(
        self, rows_per_batch: int, start: Position, *, host: int = 0, hosts: int = 1
    ) -> Iterator[Batch]:
        """This host's share of global batches; one may span two epochs, so that no row is lost.

        Args:
          rows_per_batch: of the global batch, B.
          start: where the first global batch begins.
          host, hosts: this process and how many there are; host h has rows h·B/hosts onwards.

        Raises:
          UserError: the batch does not divide over the hosts.
        """
        if rows_per_batch % hosts:
            raise UserError(f"rows_per_batch={rows_per_batch} does not divide over {hosts} hosts")
        share = rows_per_batch // hosts
        rows = self._host_rows(start, rows_per_batch, host, hosts)
        position = start
        while True:
            taken = [next(rows) for _ in range(share)]
            position = self._advance(position, rows_per_batch)
            rows_of = zip(*(r.batch for r in taken), strict=True)
            batch = PackedBatch(*(np.concatenate(a) for a in rows_of))
            if not self.config.workers:
                for row in taken:
                    self._buffers.give_back(row.batch.patches)
            yield Batch(
                batch,
                tuple(r.ids for r in taken),
                position,
                sum(r.dropped for r in taken),
            )

    def _advance(self, position: Position, rows: int) -> Position:
        """The position `rows` rows further on."""
        epoch, row = position.epoch, position.row + rows
        while row >= (size := self._sizes.get(epoch) or self.plan(epoch).rows):
            epoch, row = epoch + 1, row - size
            if not row:  # the next epoch need not be planned yet
                break
        return Position(epoch, row)
