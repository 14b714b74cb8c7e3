"""The loop of generation: prompts in, packed into chunks; rows decoded; finished rows refilled.

What prompts begin alike is computed once, as long as the cache has room for it.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fuyu_jax.config import ModelConfig
from fuyu_jax.generate import programs
from fuyu_jax.generate.chunks import LARGE, ChunkMaker
from fuyu_jax.generate.compiling import compiled
from fuyu_jax.generate.pages import Pages
from fuyu_jax.generate.programs import NOTHING, STEPS, Drawing, Prefilled, Rows, Words
from fuyu_jax.generate.prompts import Prompt
from fuyu_jax.generate.sampling import Sampling
from fuyu_jax.generate.work import Usage, Work
from fuyu_jax.model.paged import PAGE, PagedCache, cache_specs
from fuyu_jax.parallel import hosts
from fuyu_jax.parallel.mesh import batch_sharding, row_devices

_LEAST_TABLE = 64  # pages of a row


def _rounded(pages: int) -> int:
    """A little more, so that the next call's need is often the same: four sizes an octave."""
    step = max(1 << max(pages.bit_length() - 3, 0), 8)
    return -(-pages // step) * step


class Session:
    """A model's cache, and what is in it.

    Args:
      graph: the model's graph definition.
      config: of the model.
      mesh: rows and pages over `data` and `fsdp`, heads over `tensor`.
      usage: where tokens and seconds are added up.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        usage: Usage | None = None,
    ):
        self.graph = graph
        self.config = config
        self.mesh = mesh
        self.shards = row_devices(mesh) if mesh is not None else 1
        self.usage = usage or Usage()
        self.whole_images = config.image_attention == "bidirectional"
        self.pools: list[Pages] = []
        self.cache: PagedCache | None = None
        self.table_size = _LEAST_TABLE
        self.set(Words((), ()), 1)

    def set(self, words: Words, batch_size: int) -> None:
        """What ends answers, and what is never said; how many are decoded together, rounded up to
        what the mesh divides."""
        self.words = words
        self.rows = -(-batch_size // self.shards)  # of a shard

    # --- Room ---

    def make_room(self, prompts: Sequence[Prompt], beams: int = 1) -> None:
        """A cache for these prompts; a smaller one is given up, with what is in it.

        Args:
          prompts: of a call.
          beams: of each prompt, which hold pages of their own.
        """
        own = [(beams - 1) * (-(-p.max_new // PAGE) + 2) if beams > 1 else 0 for p in prompts]
        needs = sorted((p.pages + n for p, n in zip(prompts, own, strict=True)), reverse=True)
        together = -(-self.rows // beams) + self.ahead
        # What is scored needs no row: room for the chunk that runs and the next.
        size = _rounded(1 + sum(needs[:together]) + 2 * LARGE // PAGE)
        longest = max(p.pages for p in prompts)
        self.table_size = max(self.table_size, 1 << (longest - 1).bit_length())
        if self.cache is not None and self.pools[0].count >= size:
            return
        c = self.config
        self.cache = None  # its memory is wanted now
        count = size * self.shards

        def make() -> PagedCache:
            dtype = jnp.dtype(c.dtype)
            return PagedCache.empty(c.num_layers, count, c.kv_heads, c.head_dim, dtype)

        if self.mesh is None:
            self.cache = jax.jit(make)()
        else:
            specs = cache_specs(c.kv_heads, self.mesh)
            laid = PagedCache(*(NamedSharding(self.mesh, s) for s in specs))
            self.cache = jax.jit(make, out_shardings=laid)()
        self.pools = [Pages(size) for _ in range(self.shards)]

    @property
    def ahead(self) -> int:
        """Prompts of a shard that may wait for a row with their pages computed."""
        return max(self.rows // 2, 1)

    def row_arrays(self, tree: Any) -> Any:
        """Arrays of rows, laid over the mesh."""
        return tree if self.mesh is None else hosts.place(tree, batch_sharding(self.mesh))

    def everywhere(self, tree: Any) -> Any:
        """Arrays that all devices have."""
        return tree if self.mesh is None else hosts.place(tree, NamedSharding(self.mesh, P()))

    @contextlib.contextmanager
    def calling(self) -> Iterator[list[float]]:
        """The context in which a compiled function is called; what it gives are the seconds that
        this took, if the function had to be compiled first (else the call returns at once)."""
        before, began = compiled().number, time.perf_counter()
        compiling: list[float] = []
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield compiling
        if compiled().number > before:
            compiling.append(time.perf_counter() - began)
            self.usage.compile_seconds += compiling[0]

    # --- Prompts and their pages ---

    def known(self, prompt: Prompt, shard: int) -> int:
        """How many of a prompt's pages a shard has."""
        return len(self.pools[shard].find(prompt.keys)[0])

    def waits_for_others(self, prompt: Prompt, shard: int) -> bool:
        """Whether more of it is about to be computed."""
        return self.pools[shard].find(prompt.keys)[1]

    def admit(self, prompt: Prompt, shard: int) -> Work | None:
        """Gives a prompt its pages; None if it must wait: for pages, or for what others are about
        to compute of it.

        Raises:
          BadImageError: an image that is wanted is missing or broken.
        """
        pool = self.pools[shard]
        found, more = pool.find(prompt.keys)
        if more:
            return None
        while found and self.whole_images and prompt.inside(len(found) * PAGE):
            found.pop()
        pool.hold(found)
        if prompt.pages - len(found) > pool.available:
            pool.release(found)
            return None
        done = len(found) * PAGE
        try:
            prompt.patches(done, prompt.length)  # opened here, or not at all
        except Exception:
            pool.release(found)
            raise
        taken = pool.take(prompt.pages - len(found))
        for page, key in zip(taken, prompt.keys[len(found) :], strict=False):
            pool.name(page, key)
        self.usage.reused_tokens += done
        return Work(prompt, shard, found + taken, done)

    def release(self, work: Work) -> None:
        """Gives a prompt's pages back."""
        self.pools[work.shard].release(work.pages)
        work.pages = []
        work.prompt.close()

    # --- The loop ---

    def run(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        steps: int = STEPS,
        on_said: Callable[[Work], None] | None = None,
    ) -> Iterator[Work]:
        """Runs prompts; each as it is finished, in any order.

        Args:
          params: of the model.
          prompts: to be answered or scored.
          sampling: how tokens are chosen; the likeliest if not given.
          steps: of decoding between calls of `on_said`, `STEPS` at most.
          on_said: told of every work that has new tokens.
        """
        if not prompts:
            return
        self.make_room(prompts)
        try:
            yield from self._run(params, prompts, sampling, min(steps, STEPS), on_said)
        except BaseException:
            self.forget()  # who holds what is not known any more
            raise

    def forget(self) -> None:
        """Gives the cache's memory back."""
        self.cache, self.pools = None, []

    def _run(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling | None,
        steps: int,
        on_said: Callable[[Work], None] | None,
    ) -> Iterator[Work]:
        waiting = collections.deque(prompts)
        maker = ChunkMaker(self, prompts)
        slots: list[list[Work | None]] = [[None] * self.rows for _ in range(self.shards)]
        ready: list[collections.deque[Work]] = [collections.deque() for _ in slots]
        drawing, sampled = self.drawing(sampling)
        while waiting or maker.begun or any(ready) or _works(slots):
            for row, queue in zip(slots, ready, strict=True):
                for i, work in enumerate(row):
                    if work is None and queue:
                        row[i] = queue.popleft()
            free = [row.count(None) for row in slots]
            came: list[Work] = []
            if (waiting or maker.begun) and any(free) and not any(ready):
                room = [n + self.ahead for n in free]
                came, ran = self.prefill(params, maker, waiting, room, drawing, sampled)
                for work in came:
                    if not self._is_done(work):
                        ready[work.shard].append(work)
                if not ran and not came and not _works(slots):
                    raise RuntimeError("prompts wait, and nothing runs that would give them room")
            if not came:
                # To go on with a prompt is cheap; to begin some pays for several at once.
                waits = bool(waiting or maker.begun)
                leave = 1 if any(ready) else -(-self.rows * self.shards // 4) if waits else 2**30
                self._decode(params, slots, drawing, steps, leave, sampled)
                came = _works(slots)
            for work in came:
                if on_said and work.said:
                    on_said(work)
                if self._is_done(work):
                    self.release(work)
                    for row in slots:
                        if work in row:
                            row[row.index(work)] = None
                    yield work

    def _is_done(self, work: Work) -> bool:
        said, prompt = work.said, work.prompt
        if work.error or not prompt.max_new:
            return True
        return len(said) >= prompt.max_new or said[-1] in self.words.ends

    def drawing(self, sampling: Sampling | None) -> tuple[Drawing, bool]:
        """Settings for compiled functions, and whether tokens are drawn by chance."""
        s = sampling or Sampling()
        made = Drawing(np.float32(s.temperature or 1), np.float32(s.top_p), np.uint32(s.seed))
        return self.everywhere(made), s.temperature > 0

    def prefill(
        self,
        params: Any,
        maker: ChunkMaker,
        waiting: collections.deque[Prompt],
        room: list[int],
        drawing: Drawing,
        sampled: bool = False,
        top: int = 0,
    ) -> tuple[list[Work], bool]:
        """Runs one chunk of what waits.

        Returns:
          Works that came to their prompts' ends or failed; and whether anything was run.
        """
        began = time.perf_counter()
        made = maker.fill(waiting, room)
        came = list(made.failed)
        if not made.parts:
            return came, False
        assert self.cache is not None
        with self.calling() as compiling:
            self.cache, found = programs.prefill(
                self.graph,
                params,
                self.cache,
                self.row_arrays(made.chunk),
                drawing,
                words=self.words,
                top=top,
                sampled=sampled,
            )
        if any(part.end is not None or part.scored for part in made.parts):
            found = Prefilled(*jax.tree.map(hosts.fetch, found))
        for part in made.parts:
            work = part.work
            work.done += part.count
            self.usage.prompt_tokens += part.count
            whole = min(work.done // PAGE, len(work.prompt.keys))
            self.pools[work.shard].ready(work.pages[:whole])
            if part.scored:
                here = slice(part.score_at, part.score_at + part.scored)
                work.logprobs += found.logprob[work.shard, here].tolist()
                work.best += found.best[work.shard, here].tolist()
            if part.end is not None and found.top is not None:
                logprobs, ids = found.top
                work.top = np.asarray(logprobs)[work.shard, part.end], ids[work.shard, part.end]
            elif part.end is not None:
                work.said.append(int(found.first[work.shard, part.end]))
                self.usage.new_tokens += 1
            if work.done == work.prompt.length:
                work.prompt.close()
                came.append(work)
        self.usage.prefill_seconds += time.perf_counter() - began - sum(compiling)
        return came, True

    def finish_prefill(self) -> float:
        """Waits for a chunk in which no prompt ended, which runs on by itself: its seconds are not
        decoding's. Returns when that was."""
        began = time.perf_counter()
        jax.block_until_ready(self.cache)
        now = time.perf_counter()
        self.usage.prefill_seconds += now - began
        return now

    def _decode(
        self,
        params: Any,
        slots: Sequence[Sequence[Work | None]],
        drawing: Drawing,
        steps: int,
        leave: int,
        sampled: bool,
    ) -> None:
        """Decodes all rows for a while; works grow by what is said."""
        flat = [work for row in slots for work in row]
        rows = self.rows_of(flat)
        began = self.finish_prefill()
        assert self.cache is not None
        with self.calling() as compiling:
            self.cache, out = programs.decode(
                self.graph,
                params,
                self.cache,
                rows,
                drawing,
                self.everywhere(np.int32(steps)),
                self.everywhere(np.int32(leave)),
                words=self.words,
                sampled=sampled,
            )
        for work, tokens in zip(flat, hosts.fetch(out).tolist(), strict=True):
            if work is not None:
                new = [t for t in tokens if t != NOTHING]
                work.said += new
                self.usage.new_tokens += len(new)
        self.usage.decode_seconds += time.perf_counter() - began - sum(compiling)

    def rows_of(self, works: Sequence[Work | None]) -> Rows:
        """Rows as compiled functions take them. Of what a work says the last token is not in the
        cache yet."""
        count = len(works)
        table = np.zeros((count, self.table_size), np.int32)
        rows = Rows(*(np.zeros(count, np.int32) for _ in range(4)), table)
        for i, work in enumerate(works):
            if work is None:
                continue
            rows.token[i] = work.said[-1]
            rows.lengths[i] = work.prompt.length + len(work.said) - 1
            rows.left[i] = work.prompt.max_new - len(work.said)
            rows.number[i] = work.prompt.number
            rows.table[i, : len(work.pages)] = work.pages
        return self.row_arrays(rows)


def _works(slots: Sequence[Sequence[Work | None]]) -> list[Work]:
    """What is in the rows."""
    return [work for row in slots for work in row if work is not None]
