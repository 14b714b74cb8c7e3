"""A run from its configuration to its summary: train, validate, checkpoint, resume, evaluate."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fuyu_jax import config as config_lib
from fuyu_jax.batch import PackedBatch
from fuyu_jax.checkpoint import Checkpoints
from fuyu_jax.config import TrainConfig
from fuyu_jax.data.packed import Batch, Position
from fuyu_jax.errors import TrainingStoppedError, UserError
from fuyu_jax.evals import runner
from fuyu_jax.evals.judge import summarise
from fuyu_jax.generate.engine import Engine
from fuyu_jax.model.checking import checked_backend
from fuyu_jax.parallel import hosts
from fuyu_jax.parallel.mesh import batch_sharding, host_rows, make_mesh
from fuyu_jax.parallel.shapes import check_model, check_rows
from fuyu_jax.train.measure import Meter, Profiler
from fuyu_jax.train.metrics import Recorder, SilentRecorder, Window
from fuyu_jax.train.opening import open_run
from fuyu_jax.train.optimizer import count_frozen, make_optimizer, schedule
from fuyu_jax.train.patch_init import whitening
from fuyu_jax.train.signals import StopSignal
from fuyu_jax.train.step import StepMetrics, TrainState, make_train_step
from fuyu_jax.train.summary import write_summary

WHITENING_SAMPLE = 20_000  # patches


@dataclasses.dataclass
class Progress:
    """What a checkpoint keeps beside the arrays: where the data goes on, and running totals."""

    epoch: int = 0
    row: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    places: float = 0.0

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.places if self.places else 0.0


class _Pending(NamedTuple):
    """A step whose numbers are not read yet."""

    step: int
    group: list[Batch]
    metrics: StepMetrics
    given: Any  # to `HostSums`
    before: Progress


class Trainer:
    """Everything of a run, opened; `run` trains it to the end.

    Args:
      config: the run; its `workdir` is made this run's.

    Raises:
      UserError: bad input; nothing is written then.
      TrainingStoppedError: too many images are missing or broken.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.workdir = Path(config.workdir).expanduser()
        self.mesh = make_mesh(config.mesh)
        check_model(self.mesh.shape, config.model)
        check_rows(self.mesh.shape, config.rows_per_batch)
        self.share, self.shares = host_rows(self.mesh)
        self.backend = checked_backend(config.model)
        self.profiler = Profiler(self.workdir, config.profile_steps)
        opened = open_run(config, self.workdir, self.mesh)
        self.sources, self.data, self.begun_from = opened.sources, opened.data, opened.begun_from
        self.tokenizer, self.policy = opened.tokenizer, opened.policy
        self.graph, self.state, shardings = opened.graph, opened.state, opened.shardings
        tx = make_optimizer(config.optim, self.state.params, config.num_steps)
        self.step_fn = make_train_step(
            self.graph,
            tx,
            shardings,
            self.mesh,
            image_id=self.tokenizer.image_id,
            patch_loss_weight=config.model.patch_loss_weight,
        )
        self.rate = schedule(config.optim, config.optim.peak_lr, config.num_steps)
        self.checkpoints = Checkpoints(self.workdir, config.keep_checkpoints)
        # A work folder without a checkpoint starts from the beginning, whoever made it.
        fresh = self.checkpoints.latest() is None and not opened.sees
        if config.model.patch_init == "whiten" and fresh:
            self._whiten_patches()
        self.progress = Progress()
        self.first_step_seconds = 0.0  # of this process, compilation included
        self.engine = Engine(
            self.graph,
            self.tokenizer,
            self.policy,
            batch_size=config.eval.batch_size,
            max_new_tokens=config.eval.max_new_tokens,
            mesh=self.mesh,
        )
        self.validation = []
        if config.eval.every and "validation" in self.sources.splits:
            source = self.sources.open("validation")
            self.validation, unread = runner.take(source, config.eval.examples)
            if unread:
                hosts.say(
                    f"validation: {len(unread)} examples cannot be read and are left out, the "
                    f"first: {unread[0]}"
                )
        self.meter = Meter(
            config,
            self.tokenizer.vocab_size,
            self.tokenizer.image_id,
            copies=jax.process_count() // self.shares,
        )
        self._sums = hosts.HostSums()
        self._stop = StopSignal()
        self._stopped_by = 0  # a signal that some host was sent

    def _whiten_patches(self) -> None:
        """Sets the patch projection from training patches; a checkpoint's is taken as it is."""
        model = self.config.model
        std = model.patch_init_std or model.init_std
        sample = self.data.sample_patches(WHITENING_SAMPLE)
        kernel, bias = whitening(sample, model.dim, std, seed=self.config.seed)
        projection = self.state.params["patch_projection"]
        for name, value in (("kernel", kernel), ("bias", bias)):
            old = projection[name][...]
            projection[name] = projection[name].replace(hosts.place(value, old.sharding))

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    def describe(self) -> str:
        """The run in a few lines."""
        device = jax.devices()[0]
        axes = ", ".join(f"{k}={v}" for k, v in self.mesh.shape.items())
        cleaning = self.sources.cleaning_line()
        frozen = count_frozen(self.config.optim, self.state.params)
        learning = f" ({frozen:,} frozen, {self.parameters - frozen:,} learn)" if frozen else ""
        several = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        last = "".join(f"\n{line}" for line in (cleaning, self.begun_from) if line)
        return (
            f"{self.config.name}: {self.parameters:,} parameters{learning}, vocabulary "
            f"{self.tokenizer.vocab_size}, attention {self.backend}, "
            f"compute {self.config.model.dtype}\n"
            f"devices: {jax.device_count()} {device.platform}{several} ({axes}); "
            f"work folder {self.workdir}\n"
            f"data: {self.data.report()}{last}"
        )

    def resume(self) -> int | None:
        """Takes up the latest checkpoint, if there is one; returns its step.

        Raises:
          UserError: it was made with other data, or is of another model.
        """
        latest = self.checkpoints.latest()
        if latest is None:
            return None
        found = self.checkpoints.restore(latest, self.state.params, self.state.opt_state)
        if found.data["hash"] != self.data.hash:
            before, now = found.data["settings"], self.data.settings
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            raise UserError(
                f"checkpoint {latest} in {self.workdir} was made with other data (plan "
                f"{found.data['hash']} there, {self.data.hash} here; changed: "
                f"{', '.join(changed)}); give another --workdir"
            )
        fields = {f.name: found.data[f.name] for f in dataclasses.fields(Progress)}
        self.progress = Progress(**fields)
        count = hosts.place(np.asarray(latest, np.int32), self.state.step.sharding)
        self.state = TrainState(count, found.params, found.opt_state, self.state.halted)
        return latest

    def run(self, stop_after: int | None = None) -> dict[str, Any] | None:
        """Trains to the end and evaluates.

        Args:
          stop_after: stop (with a checkpoint) when this many steps are done in all.

        Returns:
          The summary; None where it stopped before the end.

        Raises:
          TrainingStoppedError: a loss or gradient was not finite, or a signal asked to stop.
        """
        resumed = self.resume()
        hosts.say(self.describe())
        if resumed is not None:
            hosts.say(
                f"resumed from step {resumed} (epoch {self.progress.epoch}, "
                f"row {self.progress.row})"
            )
        done = resumed or 0
        target = min(self.config.num_steps, stop_after or self.config.num_steps)
        recorder = (Recorder if hosts.first() else SilentRecorder)(
            self.workdir,
            done,
            self.config.num_steps,
            self.config.progress,
            config_lib.flatten(self.config),
        )
        with self._stop:
            try:
                self._train(done, target, recorder)
            finally:
                self.profiler.close()
                recorder.close()
                self.checkpoints.wait()
        if target < self.config.num_steps:
            return None
        return write_summary(self)

    # --- the loop -------------------------------------------------------------------------------

    def _train(self, done: int, target: int, recorder: Recorder) -> None:
        config = self.config
        batches = self._accumulated(Position(self.progress.epoch, self.progress.row))
        window = Window()
        pending: _Pending | None = None
        before = self.progress
        clock = time.perf_counter()
        for step in range(done + 1, target + 1):
            waited = time.perf_counter()
            group, arrays = next(batches)
            window.wait += time.perf_counter() - waited
            stepped = time.perf_counter()
            self.profiler.before(step)
            self.state, metrics = self.step_fn(self.state, arrays)
            self.profiler.after(step, metrics)
            given = self._sums.give(self._stop.number, self.meter.count([b.rows for b in group]))
            if not self.first_step_seconds:
                jax.block_until_ready(metrics)
                self.first_step_seconds = time.perf_counter() - stepped
            # The step before this one is read only now, so that the device never waits for us.
            if pending is not None:
                self._read(pending, recorder, window)
            after = dataclasses.replace(before, epoch=group[-1].after[0], row=group[-1].after[1])
            pending = _Pending(step, group, metrics, given, before)
            before = after
            checkpoint = step % config.checkpoint_every == 0 or step == target
            validate = bool(self.validation) and (
                step % config.eval.every == 0 or step == config.num_steps
            )
            if checkpoint or validate or self._stopping():
                self._read(pending, recorder, window)
                pending = None
            now = time.perf_counter()
            self.progress = before = dataclasses.replace(
                before,
                seconds=before.seconds + now - clock,
                tokens=window.all_tokens + self.progress.tokens,
                places=window.all_places + self.progress.places,
            )
            window.all_tokens = window.all_places = 0.0
            clock = now
            stop = self._stopping() if pending is None else 0
            if checkpoint or stop:
                self._save(step, self.progress)
            if validate:
                self._validate(step, recorder)
            window.pause(time.perf_counter() - now)
            if stop:
                raise TrainingStoppedError(
                    f"stopped by signal {stop} at step {step}, checkpoint saved; the same command "
                    "goes on from here"
                )

    def _stopping(self) -> int:
        """The signal to stop by, if any; of several hosts one that all have heard of."""
        return self._stop.number if jax.process_count() == 1 else self._stopped_by

    def _accumulated(self, start: Position):
        """(its batches, arrays [A, B, ...] on the mesh) for every step."""
        a = self.config.grad_accum
        sharding = batch_sharding(self.mesh, leading=1)
        rows = self.config.rows_per_batch
        batches = self.data.batches(rows, start, host=self.share, hosts=self.shares)
        while True:
            group = [next(batches) for _ in range(a)]
            arrays = PackedBatch(
                *(
                    jax.make_array_from_process_local_data(
                        sharding, np.stack(parts), (a, rows, *parts[0].shape[1:])
                    )
                    for parts in zip(*(b.rows for b in group), strict=True)
                )
            )
            yield group, arrays

    def _read(self, pending: _Pending, recorder: Recorder, window: Window) -> None:
        step, group, metrics, given, before = pending
        self._stopped_by, counted = self._sums.read(given)
        values = StepMetrics(*(float(x) for x in jax.device_get(metrics)))
        if values.halted:
            self._halt(step, group, values, before)
        config = self.config
        rows = config.grad_accum * config.rows_per_batch
        window.add(
            values.tokens,
            float(rows * config.data.tokens_per_row),
            self.meter.step_flops(values.tokens, values.loss_tokens, counted),
        )
        recorder.advance(step)
        if step % config.log_every and step != config.num_steps:
            return
        speed = window.take()
        rates = self.meter.rates(speed.flops)
        shown = {"mfu": f"{rates['mfu']:.1%}"} if "mfu" in rates else {}
        recorder.show(
            loss=f"{values.loss:.3f}",
            tok_s=f"{speed.tokens:,.0f}",
            pad=f"{speed.padding:.2%}",
            **shown,
        )
        recorder.write(
            step,
            {
                "loss": values.loss,
                "token_accuracy": values.token_accuracy,
                **({"patch_loss": values.patch_loss} if config.model.patch_loss != "none" else {}),
                "grad_norm": values.grad_norm,
                "learning_rate": float(self.rate(step - 1)),
                "tokens_per_second": speed.tokens,
                "token_padding": speed.padding,
                "loader_wait": speed.wait,
                **rates,
                "epoch": group[-1].after.epoch,
            },
        )

    def _halt(self, step: int, group: list[Batch], values: StepMetrics, before: Progress) -> None:
        """A loss or gradient that is not finite: saves what was there before, and stops."""
        ids = [id for batch in group for row in batch.ids for id in row]
        # Hosts that share rows name the same examples.
        ids = list(dict.fromkeys(id for part in hosts.gather(ids) for id in part))
        record = {"step": step, "loss": str(values.loss), "grad_norm": str(values.grad_norm)}
        if hosts.first():
            told = json.dumps({**record, "examples": ids}, indent=1)
            runner.write_whole(self.workdir / "bad_batch.json", told)
        self._save(step - 1, before)
        self.checkpoints.wait()
        raise TrainingStoppedError(
            f"step {step}: loss {values.loss}, gradient norm {values.grad_norm}. The parameters "
            f"before it are saved as checkpoint {step - 1}. The batch's {len(ids)} examples: "
            f"{', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''} (all in "
            f"{self.workdir / 'bad_batch.json'})"
        )

    def _save(self, step: int, progress: Progress) -> None:
        data = {
            "hash": self.data.hash,
            "settings": self.data.settings,
            **dataclasses.asdict(progress),
        }
        self.checkpoints.save(step, self.state.params, self.state.opt_state, data, self.config)

    def _validate(self, step: int, recorder: Recorder) -> None:
        samples = runner.evaluate(self.engine, self.state.params, self.validation)
        scores = summarise(samples)
        values = {"validation/exact_match": scores["exact_match"]}
        values["validation/correct"] = scores["correct"]
        for family, s in scores["by_family"].items():
            values[f"validation/correct/{family}"] = s["correct"]
        recorder.write(step, values)
        told = ", ".join(f"{k} {s['correct']:.2f}" for k, s in scores["by_family"].items())
        recorder.say(f"step {step}: validation correct {scores['correct']:.3f} ({told})")
