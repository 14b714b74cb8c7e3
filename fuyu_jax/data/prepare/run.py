"""Preparing a whole set: shards by many processes (or a pipeline), then what is told of them all.

A shard is written under another name and renamed; `.prepare.json` keeps the plan until `info.json`
stands, so the same command goes on where an earlier one was stopped, and ends with the same bytes.
"""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from fuyu_jax.data import shards
from fuyu_jax.data.prepare.folder import Folder, LocalFolder, open_folder, write
from fuyu_jax.data.prepare.job import Done, Job, Settings, finished, make_job, write_shard
from fuyu_jax.errors import UserError

PLAN_FILE = ".prepare.json"
BAD_FILE = "bad_examples.jsonl"
LENGTHS_FILE = "lengths.csv"
MIN_BAD = 10  # so many may always be bad
_OURS = (PLAN_FILE, shards.INFO_FILE)

Runner = Callable[[Job, list[int]], Generator[Done, None, None]]


def prepare(
    settings: Settings,
    out: str,
    *,
    workers: int = 0,
    max_bad_share: float = 0.01,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Prepares a source into a folder, or goes on with it; returns figures.

    Args:
      settings: what is to be written.
      out: the folder; `SCHEME://` ones need a pipeline.
      workers: processes; 0: one a core. No matter for what is written.
      max_bad_share: of the examples; if more cannot be read (and more than `MIN_BAD`), it stops.
      runner: runs the job's shards in place of this machine's processes.

    Raises:
      UserError: a bad source, another set in the folder, or too many bad examples.
    """
    began = time.perf_counter()
    folder = open_folder(out)
    kept = _kept_plan(folder, out)
    job = make_job(settings, out, kept["shards"] if kept else 0)
    if kept:
        _check_same(kept["settings"], job.told, out)
    with folder.begin():
        found = [finished(job, k) for k in range(job.shards)] if kept else [None] * job.shards
        done = [one for one in found if one is not None]
        todo = [k for k, one in enumerate(found) if one is None]
        if todo or not kept:
            plan = {"settings": json.loads(json.dumps(job.told)), "shards": job.shards}
            write(folder, PLAN_FILE, (json.dumps(plan) + "\n").encode())
            folder.remove(shards.INFO_FILE)
        limit = max(MIN_BAD, int(max_bad_share * job.examples))
        run = runner or (lambda job, todo: _on_this_machine(job, todo, workers))
        made = 0
        try:
            with tqdm(total=job.examples, unit="example", disable=None) as bar:
                bar.update(sum(len(job.indices(one.shard)) for one in done))
                _check_bad(done, limit, job, folder)
                with contextlib.closing(run(job, todo)) as results:
                    for one in results:
                        done.append(one)
                        made += one.records
                        bar.update(len(job.indices(one.shard)))
                        _check_bad(done, limit, job, folder)
        except KeyboardInterrupt:
            print(
                f"{len(done)} of {job.shards} shards are done; the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
            raise
        except OSError as error:
            where = error.filename or out
            raise UserError(
                f"{where}: {error.strerror or error}; the same command goes on"
            ) from None
        told = _finish(job, folder, done)
    seconds = time.perf_counter() - began
    return {
        **told,
        "written": made,
        "seconds": round(seconds, 3),
        "examples_per_second": round(made / seconds, 1),
        "out": out,
    }


def _kept_plan(folder: Folder, out: str) -> dict[str, Any] | None:
    """What an earlier run wrote of its plan.

    Raises:
      UserError: the folder holds something else.
    """
    if isinstance(folder, LocalFolder) and folder.path.is_file():
        raise UserError(f"{out}: a file; give a folder")
    for name in _OURS:
        if (data := folder.read(name)) is not None:
            try:
                found = json.loads(data)
                return {"settings": dict(found["settings"]), "shards": len(_shards(found))}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{out}/{name}: not ours, or broken; give another folder") from None
    if names := folder.names():
        raise UserError(f"{out}: holds {names[0]!r} and no prepared set; give an empty folder")
    return None


def _shards(found: dict[str, Any]) -> Any:
    """Of the plan (a number), or of `info.json` (a list)."""
    return range(found["shards"]) if isinstance(found["shards"], int) else found["shards"]


def _check_same(old: dict[str, Any], now: dict[str, Any], out: str) -> None:
    now = json.loads(json.dumps(now))
    advice = "give the same, or another folder"
    for name in now:
        if name == "files":
            before, after = ({f[0]: f[1:] for f in x.get(name, [])} for x in (old, now))
            changed = [f for f in {**before, **after} if before.get(f) != after.get(f)]
            if changed:
                raise UserError(
                    f"{out}: {changed[0]} has changed since this set was begun; give another folder"
                )
        elif old.get(name) != now[name]:
            raise UserError(
                f"{out}: was begun with {name}={old.get(name)!r}, now {now[name]!r}; {advice}"
            )


def _check_bad(done: list[Done], limit: int, job: Job, folder: Folder) -> None:
    bad = sum(len(one.bad) for one in done)
    if bad <= limit:
        return
    _write_bad(folder, done)
    id, reason = next(b for one in done for b in one.bad)
    raise UserError(
        f"{bad} examples cannot be read, above the limit of {limit} of {job.examples} "
        f"(--max_bad_share); one is {id}: {reason}; all are in {job.out}/{BAD_FILE}"
    )


# --- Processes of this machine ---


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_this_machine(job: Job, todo: list[int], workers: int) -> Generator[Done, None, None]:
    workers = min(workers or cores(), len(todo))
    if workers <= 1:
        yield from (write_shard(job, shard) for shard in todo)
        return
    others = set(multiprocessing.active_children())
    # Not by fork: array_record's threads do not outlive one.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_die_with_parent)
    try:
        with _interrupts_ignored():  # by those that are started here; the parent ends them
            futures = [pool.submit(write_shard, job, shard) for shard in todo]
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); the same command goes on, with fewer "
            "--workers if need be"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- What is told of all shards ---


def _finish(job: Job, folder: Folder, done: list[Done]) -> dict[str, Any]:
    """Writes what belongs to the whole set, `info.json` last."""
    done = sorted(done, key=lambda one: one.shard)
    names = job.names
    records = sum(one.records for one in done)
    if not records:
        _write_bad(folder, done)
        raise UserError(f"{job.settings.source}: not one example of {job.examples} can be used")
    if job.tokenizer:
        with folder.writing(LENGTHS_FILE) as path, path.open("w", encoding="utf-8") as file:
            file.write("height,width,text_tokens\n")
            for name in names:
                beside = shards.sidecar_name(name)
                data = folder.read(beside)
                file.write(_csv_lines(shards.Sidecar.loads(data or b"", beside)))
    _write_bad(folder, done)
    told = {
        "kind": job.settings.part.kind,
        "source": job.settings.source,
        "examples": records,
        "images": sum(one.images for one in done),
        "bytes": sum(one.bytes for one in done),
        "bad": sum(len(one.bad) for one in done),
        "empty": sum(one.empty for one in done),
        **job.counts,
    }
    files = [
        {"file": name, "records": one.records, "bytes": one.bytes}
        for name, one in zip(names, done, strict=True)
    ]
    info = {"version": shards.VERSION, **told, "settings": job.told, "shards": files}
    write(folder, shards.INFO_FILE, (json.dumps(info, indent=1) + "\n").encode())
    folder.remove(PLAN_FILE)
    return {**told, "shards": job.shards}


def _write_bad(folder: Folder, done: list[Done]) -> None:
    ordered = sorted(done, key=lambda one: one.shard)
    lines = [{"id": id, "reason": reason} for one in ordered for id, reason in one.bad]
    if lines:
        write(folder, BAD_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    else:
        folder.remove(BAD_FILE)


def _csv_lines(sidecar: shards.Sidecar) -> str:
    """Lines of the planner, which adds `<s>` and the end to each: they are not counted here."""
    assert sidecar.text_tokens is not None
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    for at, tokens in enumerate(sidecar.text_tokens.tolist()):
        sizes = sidecar.sizes[sidecar.starts[at] : sidecar.starts[at + 1]].tolist()
        heights, widths = zip(*sizes, strict=True) if sizes else ((0,), (0,))
        joined = (";".join(map(str, side)) for side in (heights, widths))
        lines.writerow([*joined, max(tokens - 2, 0)])
    return file.getvalue()
