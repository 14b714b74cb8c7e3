"""The same work as an Apache Beam pipeline, for corpora beyond one machine (extra `beam`)."""

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from fuyu_jax.data.prepare.job import Done, Job, finished, write_shard
from fuyu_jax.errors import UserError

try:
    import apache_beam as beam
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    raise UserError(
        "--runner and SCHEME:// folders need apache-beam: pip install 'fuyu-jax[beam]' in an "
        "environment of its own"
    ) from None


def pipeline_options(runner: str, flags: list[str]) -> PipelineOptions:
    """Beam's options.

    Raises:
      UserError: a flag that Beam does not know.
    """
    options = PipelineOptions([f"--runner={runner}", *flags])
    known = PipelineOptions.from_dictionary({}).get_all_options().keys()
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if name not in known and name.removeprefix("no_") not in known:
            raise UserError(f'unknown flag "--{name}", neither ours nor Beam\'s')
    return options


def run(job: Job, todo: list[int], options: PipelineOptions) -> Generator[Done, None, None]:
    """Runs the shards as a pipeline; every one is looked at afterwards."""
    if todo:
        try:
            with beam.Pipeline(options=options) as pipeline:
                _ = (
                    pipeline
                    | "shards" >> beam.Create(todo)
                    | "spread" >> beam.Reshuffle()
                    | "write" >> beam.Map(_write, job)
                )
        except RuntimeError as error:  # what a worker on another machine met, with its traceback
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = [line for line in lines if UserError.__name__ in line] or lines or ["no reason"]
            raise UserError(f"the pipeline failed: {told[-1]}") from error
    for shard in todo:
        if (done := finished(job, shard)) is None:
            raise UserError(f"{job.out}/{job.names[shard]}: not written by the pipeline")
        yield done


def _write(shard: int, job: Job) -> int:
    return write_shard(job, shard).records


class RemoteFolder:
    """A folder on a file system that Beam knows; files are written here and then copied there."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fuyu_jax_prepare") as folder:
            local = Path(folder) / name
            yield local
            partial = self._at(f".{name}.partial")
            with local.open("rb") as source, FileSystems.create(partial) as target:
                shutil.copyfileobj(source, target, 1 << 22)
            self.remove(name)
            FileSystems.rename([partial], [self._at(name)])

    def read(self, name: str) -> bytes | None:
        if not FileSystems.exists(self._at(name)):
            return None
        with FileSystems.open(self._at(name)) as file:
            return file.read()

    def holds(self, name: str, size: int, records: int) -> bool:
        (found,) = FileSystems.match([self._at(name)])
        return [one.size_in_bytes for one in found.metadata_list] == [size]

    def remove(self, name: str) -> None:
        if FileSystems.exists(self._at(name)):
            FileSystems.delete([self._at(name)])

    def names(self) -> list[str]:
        (found,) = FileSystems.match([self._at("*")])
        return sorted(one.path.rsplit("/", 1)[-1] for one in found.metadata_list)

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        with contextlib.suppress(OSError):  # it is there, or the file system has no folders
            FileSystems.mkdirs(self.path)
        yield
