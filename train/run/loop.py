"""The training loop, which holds all side effects of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from train.config import RunConfig, to_data
from train.config.changes import check_allowed
from train.data.loader import Batches, prefetch_to_device, train_batches
from train.data.prepared.prepare import prepare
from train.data.prepared.store import Prepared
from train.loss import Batch
from train.optimizer import make_schedule
from train.parallel.mesh import check_batch, make_mesh, shard_batch, use_mesh
from train.parallel.processes import any_process, is_first, one_log, process_zero_first, report_lost_peers
from train.parallel.runtime import GracefulStop
from train.report.display import Display
from train.report.meter import Meter, Reading
from train.report.metrics import MetricLog
from train.report.sample import make_sampler
from train.run.begin import agree_on, alone_in, check_data
from train.run.checkpoint import Checkpoints
from train.run.evaluate import Evaluation, Evaluator, Scores
from train.run.identity import check_same_run, describe_data, tokenizer_files
from train.run.init_from import begin_from, check_begin
from train.run.messages import headline, not_finite, padding_of, stopped
from train.run.program import Program, flops_per_prediction
from train.run.run_files import finished_step, forget_finished, write_finished, write_run_files
from train.run.selection import Selection, is_selective
from train.run.state import TrainState
from train.translation import TextTranslator
from train.versions import versions
from transformer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended."""

    directory: Path
    step: int
    scores: Scores | None
    """Scores on all held-out text; None without such text, and for a run that was interrupted or already finished."""
    interrupted: bool
    signal: int | None = None
    """The one that interrupted this process, if one did."""


def train(config: RunConfig, *, profile: tuple[int, int] | None = None, allow_changed: Sequence[str] = ()) -> Finished:
    """Train from a config, or resume from the newest checkpoint in the run's folder.

    Args:
        profile: first and last step to trace for TensorBoard or Perfetto.
        allow_changed: fields and sections of the config that may differ from the checkpoint's though what follows is computed
            in another way, such as `optimizer.learning_rate`; `data` permits other data too.

    Raises:
        UserError: anything that the user can fix; raised before the first step where possible.
        SystemExit: other processes of the run are lost; a line reports it.
    """
    check_allowed(config, allow_changed)
    with one_log(), report_lost_peers(config.directory):
        agree_on(config)
        with alone_in(config.directory):
            return _train(config, profile, allow_changed)


def _train(config: RunConfig, profile: tuple[int, int] | None, allow_changed: Sequence[str]) -> Finished:
    if profile is not None and profile[0] > config.steps:
        raise UserError(f"profile: step {profile[0]} is after the last one, {config.steps}")
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.mesh.rules, config.batch_size, config.microbatches)
    check_batch(mesh, config.mesh.rules, config.evaluation_batch_size, 1, "evaluation.batch_size")
    check_begin(config)
    with process_zero_first("prepare"):
        prepared = prepare(config.data)
    check_data(config, prepared)
    with use_mesh(mesh, config.mesh.rules), GracefulStop() as stop:
        run = Run(config, prepared, mesh)
        with Checkpoints(config.directory, config.checkpoint) as checkpoints:
            if (done := checkpoints.latest) is not None and done > config.steps:
                raise UserError(
                    f"{config.directory}: this run is already at step {done}, and steps is {config.steps}; "
                    f"set steps to {done} or more, or start another run with --run-dir"
                )
            state = run.start(checkpoints, allow_changed)
            over = done == config.steps or (done is not None and run.selection.is_over(config.evaluation.patience))
            if done is not None and over and finished_step(config.directory) == done:
                more = "steps" if done == config.steps else "evaluation.patience"
                print(f"{config.directory}: already finished at step {done}; raise {more} to continue")
                return Finished(config.directory, done, None, False)
            run_id = ""
            if is_first():
                run_id = write_run_files(config, prepared)
                forget_finished(config.directory)
            return run.loop(state, checkpoints, stop, profile, run_id)


class Run:
    """What stays constant over the steps."""

    def __init__(self, config: RunConfig, prepared: Prepared, mesh: jax.sharding.Mesh) -> None:
        self.config, self.prepared, self.mesh = config, prepared, mesh
        self.program = Program(dataclasses.replace(config, objective=config.objective.with_data(prepared)), mesh)
        self.schedule: optax.Schedule = make_schedule(config.optimizer, config.steps)
        self.translator = self.sampler = None
        # Samples need one process, which may not hold all of the parameters.
        if jax.process_count() == 1:
            if config.objective.translates and prepared.validation:
                self.translator = TextTranslator(config, prepared.tokenizer, prepared.target_tokenizer)
            self.sampler = make_sampler(config, prepared, self.translator)
        self.identity = {
            "config": to_data(config),
            "tokenizer": tokenizer_files(prepared),
            "labels": list(prepared.meta.labels),
            "data": describe_data(prepared),
            "versions": versions(),
        }
        self.held_out = Evaluator(config, prepared, self.program, self.translator) if prepared.validation else None
        self.selection = Selection(config.checkpoint.best)
        self.flops_per_prediction = flops_per_prediction(config, prepared, self.program)

    def start(self, checkpoints: Checkpoints, allow_changed: Sequence[str] = ()) -> TrainState:
        """A fresh state, with another run's weights if the config names one; or the state of the newest checkpoint.

        Raises:
            UserError: the checkpoint is that of another run, or of this one with changes that are not allowed.
        """
        if (step := checkpoints.latest) is not None:
            meta = checkpoints.meta(step)
            owner = f"{self.config.directory}: the checkpoint of step {step}"
            for line in check_same_run(meta, self.config, self.prepared, allow_changed, owner):
                print(f"{self.config.name}: changed since step {step}: {line}")
            self.selection = Selection.from_data(self.config.checkpoint.best, meta["selection"])
            # A checkpoint is written before its step is evaluated.
            scores, name = checkpoints.scores(step) or {}, self.selection.name
            if name in scores and self.selection.counted < step:
                self.selection = self.selection.after(step, scores[name])
            return checkpoints.restore(step, self.program.abstract)
        if self.config.init_from is None:
            return self.program.init()
        params, said = begin_from(self.program.init_params(), self.config, self.prepared)
        print(f"{self.config.name}: {said}")
        return self.program.init(params, donate=True)

    def loop(
        self,
        state: TrainState,
        checkpoints: Checkpoints,
        stop: GracefulStop,
        profile: tuple[int, int] | None,
        run_id: str,
    ) -> Finished:
        """Step until the end, a signal, or too many skipped updates; then make the results that are not there yet."""
        config, start = self.config, int(state.step)
        # A run that was stopped after its last step has no more to take.
        last = start if self.selection.is_over(config.evaluation.patience) else config.steps
        host = self._host_batches()
        batches = prefetch_to_device(host.iterate(start), self._to_device)
        meter = Meter(self.schedule, self.flops_per_prediction, list(self.mesh.devices.flat), config.model.dtype)
        step, self._saved_at = start, time.monotonic()
        with (
            MetricLog(config, config.directory, start, run_id) as log,
            contextlib.closing(batches),
            Display(config.steps, start, unit=config.objective.unit) as display,
        ):
            display.say(headline(config, self.mesh, self.program.trained.counted(state.params), start, start == last))
            if padding := padding_of(host):
                display.say(padding)
            if self._lacks_evaluation(start, last, checkpoints):
                cut_off = self._evaluate(state, start, display, log, checkpoints, stop) is None
                if cut_off or self.selection.is_over(config.evaluation.patience):
                    last = start
            for step in range(start + 1, last + 1):
                examples, batch = next(batches)
                if profile is not None and start < profile[0]:
                    _trace(profile, step, config.directory, display)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.program.train_step(state, batch)
                # The host reads a step's metrics while the devices compute the next one.
                meter.push(step, metrics, examples)
                for done in meter.ready(keep=1):
                    self._record(done, display, log, checkpoints)
                if step == config.steps:
                    break
                evaluates = self.held_out is not None and _due(step, config.evaluation.every)
                samples = _due(step, config.sample.every)
                saves = self._saves(step)
                if evaluates or samples or saves:
                    # A step is built upon only after its update is known to be finite.
                    self._drain(meter, display, log, checkpoints)
                    meter.pause()
                # Whatever happens in an evaluation, the steps before it are kept.
                if saves and not meter.skipped_in_row:
                    self._save(checkpoints, state, step, display, log)
                if evaluates:
                    self._evaluate(state, step, display, log, checkpoints, stop)
                    # The best of all evaluations is wanted, not only of those that follow a checkpoint.
                    best = is_selective(config) and self.selection.step == step
                    if best and not saves and not meter.skipped_in_row:
                        self._save(checkpoints, state, step, display, log)
                if samples:
                    self.sample(state, display)
                if self.selection.is_over(config.evaluation.patience):
                    break
                if any_process(stop.requested, step):
                    break
            self._drain(meter, display, log, checkpoints)
            if profile is not None and start < profile[0] <= step <= profile[1]:
                jax.profiler.stop_trace()
                display.say(f"profile from step {profile[0]}: {config.directory / 'profile'}")
            found = None
            interrupted = step < config.steps and not self.selection.is_over(config.evaluation.patience)
            # What was skipped is skipped again when the run resumes; at its end the parameters are those before it.
            if checkpoints.latest != step and not (interrupted and meter.skipped_in_row):
                self._save(checkpoints, state, step, display, log, last=True)
            if self.held_out is not None and not interrupted:
                found = self._evaluate(state, step, display, log, checkpoints, stop, all_of_it=True)
                interrupted = found is None
            checkpoints.wait()
            if int(state.skipped) == step:
                raise UserError(f"step {step}: {not_finite(step, checkpoints.latest, config.directory)}")
            self._farewell(state, step, found, interrupted, display, log, checkpoints)
        return Finished(config.directory, step, None if found is None else found.scores, interrupted, stop.number)

    def _lacks_evaluation(self, start: int, last: int, checkpoints: Checkpoints) -> bool:
        """Whether the run was stopped between the checkpoint that it resumes from and an evaluation that follows it."""
        due = start > 0 and _due(start, self.config.evaluation.every)
        return due and start < last and self.held_out is not None and checkpoints.scores(start) is None

    def _save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        step: int,
        display: Display,
        log: MetricLog,
        *,
        last: bool = False,
    ) -> None:
        """Write a checkpoint. A disk that refuses ends the run only at its end, or among several processes.

        An error may be that of the checkpoint before, which was written in the background, so that a second try may be good.
        """
        began, meta = time.monotonic(), {"step": step, **self.identity, "selection": dataclasses.asdict(self.selection)}
        said = ""
        for tries_left in (1, 0):
            try:
                checkpoints.save(state, step, meta)
                break
            except UserError as error:
                if jax.process_count() > 1 or (last and not tries_left):
                    raise
                checkpoints.after_failure()
                if str(error) != said:
                    said = str(error)
                    display.say(f"step {step}: {said}; the run goes on")
        self._saved_at = time.monotonic()
        log.write(step, "checkpoint", {"stall_seconds": self._saved_at - began})

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is due, by steps or by time."""
        config = self.config.checkpoint
        minutes = config.every_minutes
        late = minutes is not None and any_process(time.monotonic() - self._saved_at >= 60 * minutes, step)
        return _due(step, config.every) or late

    def sample(self, state: TrainState, display: Display) -> None:
        """Show the current model's continuation of the config's prompt, or its translations of held-out sentences."""
        if self.sampler is not None:
            text = self.sampler(self.program.plain(_used(state)))
            display.say(f"── sample ──\n{text}\n────────────")

    def _to_device(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, Batch]:
        """A batch's example ids, which stay on the host, and its arrays on the devices."""
        arrays = {name: rows for name, rows in batch.items() if name != "example"}
        return batch["example"], shard_batch(arrays, self.program.batch_sharding)

    def _host_batches(self) -> Batches:
        config = self.config
        return train_batches(
            self.prepared,
            config.data,
            batch_size=config.batch_size,
            length=config.sequence_length,
            seed=config.seed,
            objective=config.objective,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _evaluate(
        self,
        state: TrainState,
        step: int,
        display: Display,
        log: MetricLog,
        checkpoints: Checkpoints,
        stop: GracefulStop,
        *,
        all_of_it: bool = False,
    ) -> Evaluation | None:
        """Scores on a part of the held-out text, or on all of it; None if a signal interrupted it."""
        assert self.held_out is not None
        # Several processes would stop at different batches, and wait for each other.
        alone = jax.process_count() == 1
        batches = None if all_of_it else self.config.evaluation_batches
        found = self.held_out.evaluate(_used(state), batches, lambda: alone and stop.requested)
        if isinstance(found, tuple):
            display.say(f"step {step}: the evaluation was interrupted after {found[0]} of {found[1]} batches")
            return None
        own = {f"selection_{name}": found.selection[name] for name in dict.fromkeys(("loss", self.selection.name))}
        log.write(step, "eval", found.scores.values() | own)
        display.say(f"step {step}  {self.held_out.say(found.scores)}")
        try:
            checkpoints.record(step, found.selection)
        except UserError as error:
            # They are written with the next ones.
            display.say(f"step {step}: {error}")
        # The evaluation at the last step is counted too, even if it was not due.
        if self.selection.counted < step:
            self.selection = self.selection.after(step, found.selection[self.selection.name])
        return found

    def _drain(self, meter: Meter, display: Display, log: MetricLog, checkpoints: Checkpoints) -> None:
        for done in meter.ready(keep=0):
            self._record(done, display, log, checkpoints)

    def _record(self, done: Reading, display: Display, log: MetricLog, checkpoints: Checkpoints) -> None:
        log.write_examples(done.step, done.examples)
        record = done.step % self.config.log.every == 0 or done.step == self.config.steps
        display.step(done.step, done.values, record=record)
        if record:
            log.write(done.step, "train", done.values)
        if done.skipped_in_row:
            display.say(
                f"step {done.step}: loss {done.values['loss']} or gradient norm {done.values['grad_norm']} is not finite; "
                f"update skipped ({done.skipped_in_row} in a row)"
            )
        if done.skipped_in_row >= self.config.max_skipped:
            said = not_finite(done.skipped_in_row, checkpoints.latest, self.config.directory, done.examples)
            raise UserError(f"step {done.step}: {said}")

    def _farewell(
        self,
        state: TrainState,
        step: int,
        found: Evaluation | None,
        interrupted: bool,
        display: Display,
        log: MetricLog,
        checkpoints: Checkpoints,
    ) -> None:
        config, directory = self.config, self.config.directory
        if interrupted:
            display.say(stopped(step, checkpoints.latest, directory, over=step == config.steps))
            return
        if step < config.steps:
            display.say(f"stopped early: {self.selection}")
        self.sample(state, display)
        for line in () if found is None else config.objective.report(self.prepared, found.scores.bits_per_byte):
            display.say(line)
        if found is not None and self.held_out is not None:
            if quality := found.quality or self.held_out.quality(_used(state)):
                log.write(step, "eval", dataclasses.asdict(quality))
                display.say(f"{quality.pairs} held-out translations: BLEU {quality.bleu:.2f}, chrF {quality.chrf:.2f}")
            if self.held_out.task is not None and is_first():
                for line in self.held_out.task.finish(found.predictions, directory):
                    display.say(line)
        if is_first():
            write_finished(directory, step)
        display.say(f"finished; {config.objective.next_step(directory)}")


def _used(state: TrainState) -> nnx.State:
    """The parameters to use: their moving average, where the run keeps one."""
    return state.params if state.ema is None else state.ema


def _trace(profile: tuple[int, int], step: int, directory: Path, display: Display) -> None:
    if step == profile[0]:
        jax.profiler.start_trace(str(directory / "profile"), create_perfetto_trace=True)
    elif step == profile[1] + 1:
        jax.profiler.stop_trace()
        display.say(f"profile of steps {profile[0]} to {profile[1]}: {directory / 'profile'}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
