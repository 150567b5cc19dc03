"""The steps of a run, and what happens between them: evaluations, checkpoints, records, and going back after a loss spike."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from train.checkpoints.checkpoint import Checkpoints
from train.checkpoints.identity import check_same_run, identity_of
from train.checkpoints.selection import Selection, is_selective
from train.config import RunConfig
from train.data.loader import prefetch_to_device
from train.data.prepared.store import Prepared
from train.loss import Batch
from train.optimizer import make_schedule
from train.parallel.processes import any_process, is_first
from train.parallel.runtime import GracefulStop, Watchdog
from train.program.program import flops_per_prediction
from train.program.state import TrainState
from train.report.attention_backends import choices, in_a_line
from train.report.display import Display
from train.report.meter import Meter, Reading
from train.report.metrics import SAMPLES, SKIPPED, STARTS, MetricLog
from train.report.sample import make_sampler
from train.run.begin import batches_of, program_of
from train.run.evaluate import Evaluation, Evaluator
from train.run.head_log import HeadLog
from train.run.init_from import fresh_state
from train.run.messages import all_skipped, course_of, headline, interrupted_at, padding_of, start_of
from train.run.order import Order
from train.run.reference import referred, with_stored
from train.run.run_files import write_finished
from train.run.session import Finished, Session, Spike
from train.run.skipped import record_of, why_skipped
from train.run.trace import Trace
from train.translation import TextTranslator
from transformer.errors import UserError


class Run:
    """A run between two steps: what stays constant, and what its evaluations and skipped updates have led to."""

    def __init__(self, config: RunConfig, prepared: Prepared, mesh: jax.sharding.Mesh) -> None:
        self.config, self.prepared, self.mesh = config, prepared, mesh
        self.program = program_of(config, prepared, mesh)
        self.schedule: optax.Schedule = make_schedule(config.optimizer, config.steps)
        self.translator = self.sampler = None
        # Samples need one process, which may not hold all of the parameters.
        if jax.process_count() == 1:
            if config.objective.translates and prepared.validation:
                self.translator = TextTranslator(config, prepared.tokenizer, prepared.target_tokenizer)
            self.sampler = make_sampler(config, prepared, self.translator)
        self.identity = identity_of(config, prepared)
        self.flops_per_prediction = flops_per_prediction(config, prepared, self.program)
        self._take(prepared)
        self.selection = Selection(config.checkpoint.best)
        self.order = Order()

    def _take(self, prepared: Prepared) -> None:
        """Read batches from this data."""
        self.prepared = prepared
        self.held_out = Evaluator(self.config, prepared, self.program, self.translator) if prepared.validation else None
        self.heads = HeadLog(self.config, prepared, self.program) if self.config.log.attention else None
        self.batches = batches_of(self.config, prepared)

    def start(
        self, checkpoints: Checkpoints, allow_changed: Sequence[str] = (), on_batch: Callable[[], None] = lambda: None
    ) -> TrainState:  # fmt: skip
        """A fresh state, with another run's weights if the config names one; or the state of the newest checkpoint.

        Args:
            on_batch: called before each batch to which the reference model is applied, if the objective has one.

        Raises:
            UserError: the checkpoint is that of another run, or of this one with changes that are not allowed.
        """
        if (step := checkpoints.latest) is not None:
            meta = checkpoints.meta(step)
            owner = f"{self.config.directory}: the checkpoint of step {step}"
            for line in check_same_run(meta, self.config, self.prepared, allow_changed, owner):
                print(f"{self.config.name}: changed since step {step}: {line}")
            self.order = Order.from_data(meta["passed"])
            if self.config.objective.needs_reference:
                self._take(with_stored(self.config.directory, self.config, self.prepared))
            return self._restore(checkpoints, step, meta)
        state = fresh_state(self.program, self.config, self.prepared)
        if self.config.objective.needs_reference:
            self._take(referred(self.program, self.config, self.prepared, state.params, on_batch))
        return state

    def _restore(self, checkpoints: Checkpoints, step: int, meta: Mapping[str, Any]) -> TrainState:
        self.selection = Selection.from_data(self.config.checkpoint.best, meta["selection"])
        # A checkpoint is written before its step is evaluated.
        scores, name = checkpoints.scores(step) or {}, self.selection.name
        if name in scores and self.selection.counted < step:
            self.selection = self.selection.after(step, scores[name])
        return checkpoints.restore(step, self.program.abstract)

    def loop(
        self,
        state: TrainState,
        checkpoints: Checkpoints,
        stop: GracefulStop,
        watch: Watchdog,
        profile: tuple[int, int] | None,
        run_id: str,
    ) -> Finished:
        """Step until the end, a signal, or too many skipped updates; then make the results that are not there yet."""
        config, start = self.config, int(state.step)
        # A run that was stopped after its last step has no more to take.
        last = start if self._is_over else config.steps
        meter = Meter(self.schedule, self.flops_per_prediction, list(self.mesh.devices.flat), config.model.dtype)
        self._saved_at = time.monotonic()
        with (
            MetricLog(config, config.directory, start, run_id) as log,
            Display(config.steps, start, unit=config.objective.unit) as display,
            Trace(profile, config.directory, start, display.say) as trace,
        ):
            session = Session(checkpoints, display, log, meter, stop, watch)
            display.say(headline(config, self.mesh, self.program.trained.counted(state.params), start, start == last))
            display.say(course_of(config, self.batches))
            log.record(STARTS, start, start_of(self.mesh, log.until))
            if padding := padding_of(self.batches):
                display.say(padding)
            if self._lacks_evaluation(start, last, checkpoints):
                cut_off = self._evaluate(state, start, session) is None
                if cut_off or self._is_over:
                    last = start
            step = start
            while True:
                state, step, spike = self._steps(state, step, last, session, trace)
                if spike is None:
                    break
                del state  # the device may not have room for another one
                state, step = self._roll_back(spike, session), spike.back_to
            trace.end()
            found = None
            interrupted = step < config.steps and not self._is_over
            if step == config.steps:
                self._look(state, step, session)
            # What was skipped is skipped again when the run resumes; at its end the parameters are those before it.
            if checkpoints.latest != step and not (interrupted and meter.skipped_in_row):
                self._save(state, step, session, last=True)
            if self.held_out is not None and not interrupted:
                found = self._evaluate(state, step, session, all_of_it=True)
                interrupted = found is None
            watch.alive()
            checkpoints.wait()
            if int(state.skipped) == step:
                raise UserError(f"step {step}: {all_skipped(step, checkpoints.latest, config.directory)}")
            self._farewell(state, step, found, interrupted, session)
        return Finished(config.directory, step, None if found is None else found.scores, interrupted, stop.number)

    def _steps(
        self, state: TrainState, start: int, last: int, session: Session, trace: Trace
    ) -> tuple[TrainState, int, Spike | None]:
        """The steps from the one after `start`, with what is due between them; their last, and a spike to roll back from."""
        config, step, meter = self.config, start, session.meter
        on_devices = prefetch_to_device(self.batches.iterate(self.order.batch(start + 1)), self._to_device)
        with contextlib.closing(on_devices), choices() as found:
            for step in range(start + 1, last + 1):
                with meter.waiting():
                    examples, batch = next(on_devices)
                trace.step(step)
                session.watch.alive()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.program.train_step(state, batch)
                # The first call traces the program, and that of another shape does again. A CPU has one backend.
                if found and step == start + 1 and jax.default_backend() != "cpu":
                    session.display.say(in_a_line(found))
                # The host reads a step's metrics while the devices compute the next one.
                meter.push(step, metrics, examples)
                if (spike := self._read(session, keep=1)) is not None:
                    return state, step, spike
                if step == config.steps:
                    break
                evaluates = self.held_out is not None and _due(step, config.evaluation.every)
                samples = _due(step, config.sample.every)
                saves = self._saves(step)
                looks = _due(step, self.config.log.attention or 0)
                if evaluates or samples or saves or looks:
                    # A step is built upon only after its update is known to be good.
                    if (spike := self._read(session, keep=0)) is not None:
                        return state, step, spike
                    meter.pause()
                # Whatever happens in an evaluation, the steps before it are kept.
                if saves and not meter.skipped_in_row:
                    self._save(state, step, session)
                if evaluates:
                    self._evaluate(state, step, session)
                    # The best of all evaluations is wanted, not only of those that follow a checkpoint.
                    best = is_selective(config) and self.selection.step == step
                    if best and not saves and not meter.skipped_in_row:
                        self._save(state, step, session)
                self._look(state, step, session)
                if samples:
                    session.watch.alive()
                    self.sample(state, step, session)
                if self._is_over or any_process(session.stop.requested, step):
                    break
            spike = self._read(session, keep=0)
        return state, step, spike

    @property
    def _is_over(self) -> bool:
        """Whether evaluations have stopped getting better."""
        return self.selection.is_over(self.config.evaluation.patience)

    def _lacks_evaluation(self, start: int, last: int, checkpoints: Checkpoints) -> bool:
        """Whether the run was stopped between the checkpoint that it resumes from and an evaluation that follows it."""
        due = start > 0 and _due(start, self.config.evaluation.every)
        return due and start < last and self.held_out is not None and checkpoints.scores(start) is None

    def _save(self, state: TrainState, step: int, session: Session, *, last: bool = False) -> None:
        """Write a checkpoint. A disk that refuses ends the run only at its end, or among several processes.

        An error may be that of the checkpoint before, which was written in the background, so that a second try may be good.
        """
        session.watch.alive()
        began, said = time.monotonic(), ""
        meta = {
            "step": step, **self.identity, "selection": dataclasses.asdict(self.selection), "passed": self.order.passed,
        }  # fmt: skip
        for tries_left in (1, 0):
            try:
                session.checkpoints.save(state, step, meta)
                break
            except UserError as error:
                if jax.process_count() > 1 or (last and not tries_left):
                    raise
                session.checkpoints.after_failure()
                if str(error) != said:
                    said = str(error)
                    session.display.say(f"step {step}: {said}; training continues")
        self._saved_at = time.monotonic()
        session.log.write(step, checkpoint={"stall_seconds": self._saved_at - began})

    def _saves(self, step: int) -> bool:
        """Whether a checkpoint is due, by steps or by time."""
        config = self.config.checkpoint
        minutes = config.every_minutes
        late = minutes is not None and any_process(time.monotonic() - self._saved_at >= 60 * minutes, step)
        return _due(step, config.every) or late

    def sample(self, state: TrainState, step: int, session: Session) -> None:
        """Show the current model's continuation of the config's prompt, or its translations of held-out sentences."""
        if self.sampler is not None:
            text = self.sampler(self.program.plain(state.used))
            session.display.say(f"── sample ──\n{text}\n────────────")
            session.log.record(SAMPLES, step, {"text": text})

    def _look(self, state: TrainState, step: int, session: Session) -> None:
        """Record what the heads look at, if it is due."""
        if self.heads is not None and _due(step, self.config.log.attention or 0):
            session.watch.alive()
            session.log.write(step, attention=self.heads(state.used))

    def _to_device(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, Batch]:
        """A batch's example ids, which stay on the host, and its arrays on the devices."""
        return batch["example"], self.program.to_devices(batch)

    def _evaluate(
        self, state: TrainState, step: int, session: Session, *, all_of_it: bool = False
    ) -> Evaluation | None:
        """Scores on a part of the held-out text, or on all of it; None if a signal interrupted it."""
        assert self.held_out is not None
        # Several processes would stop at different batches, and wait for each other.
        alone, display = jax.process_count() == 1, session.display
        batches = None if all_of_it else self.config.evaluation_batches

        def stopped() -> bool:
            session.watch.alive()
            return alone and session.stop.requested

        began = time.monotonic()
        found = self.held_out.evaluate(state.used, batches, stopped)
        if isinstance(found, tuple):
            display.say(f"step {step}: the evaluation was interrupted after {found[0]} of {found[1]} batches")
            return None
        name = "final_evaluation_seconds" if all_of_it else "evaluation_seconds"
        taken = {name: time.monotonic() - began}
        own = {f"selection_{name}": found.selection[name] for name in dict.fromkeys(("loss", self.selection.name))}
        session.log.write(step, eval=found.scores.values() | own, run=taken)
        display.say(f"step {step}  {self.held_out.say(found.scores)}")
        try:
            session.checkpoints.record(step, found.selection)
        except UserError as error:
            # They are written with the next ones.
            display.say(f"step {step}: {error}")
        # The evaluation at the last step is counted too, even if it was not due.
        if self.selection.counted < step:
            self.selection = self.selection.after(step, found.selection[self.selection.name])
        return found

    def _read(self, session: Session, *, keep: int) -> Spike | None:
        """Read and record the metrics of all but the last `keep` steps; a spike to roll back from."""
        for done in session.meter.ready(keep):
            back_to = self._rolls_back_to(done, session)
            self._record(done, back_to, session)
            if back_to is not None:
                return Spike(done.step, back_to)
        return None

    def _rolls_back_to(self, done: Reading, session: Session) -> int | None:
        """The step of the checkpoint to go back to, if this step is a spike that asks for it."""
        # At the very last step no other is left to take instead.
        if not done.is_spike or self.config.stability.on_spike != "rollback" or done.step == self.config.steps:
            return None
        session.watch.alive()
        try:
            step = session.checkpoints.to_roll_back_to()
        except UserError as error:
            # The one that was being written could not be.
            if jax.process_count() > 1:
                raise
            session.display.say(f"step {done.step}: {error}")
            session.checkpoints.after_failure()
            step = session.checkpoints.to_roll_back_to()
        if step is None:
            session.display.say(f"step {done.step}: there is no checkpoint yet to roll back to")
        return step

    def _record(self, done: Reading, back_to: int | None, session: Session) -> None:
        record = done.step % self.config.log.every == 0 or done.step == self.config.steps
        session.display.step(done.step, done.values, record=record)
        session.log.write_examples(done.step, done.examples)
        if record:
            session.log.write(done.step, train=done.values, run=self._progress_of(done, session.meter))
        if done.skipped_in_row:
            in_row = f" ({done.skipped_in_row} in a row)" if done.skipped_in_row > 1 else ""
            session.display.say(f"step {done.step}: {why_skipped(done)}; update skipped{in_row}")
            batch = self.batches.batch(self.order.batch(done.step))
            session.log.record(SKIPPED, done.step, record_of(done, batch, self.prepared, back_to, self.order))
        if done.skipped_in_row >= self.config.stability.max_skipped:
            said = all_skipped(done.skipped_in_row, session.checkpoints.latest, self.config.directory, done.examples)
            raise UserError(f"step {done.step}: {said}")

    def _progress_of(self, done: Reading, meter: Meter) -> dict[str, float | None]:
        """How far the run is after a step, and what a step takes."""
        return {
            "unix_seconds": time.time(),
            "epoch": done.step * self.config.batch_size / self.batches.examples_per_epoch,
            "tokens_seen": done.step * self.config.tokens_per_step * self.batches.efficiency,
            **meter.resources(done.values["tokens"] or 0.0),
        }

    def _roll_back(self, spike: Spike, session: Session) -> TrainState:
        """The state of the checkpoint to go back to; the batches since then, up to that of the spike, are passed over.

        Raises:
            UserError: `stability.max_rollbacks` to this checkpoint were not enough.
        """
        checkpoints, step, most = session.checkpoints, spike.back_to, self.config.stability.max_rollbacks
        if sum(after == step for after, _ in self.order.passed) >= most:
            raise UserError(
                f"step {spike.step}: the loss spikes again after {most} rollbacks to the checkpoint of step {step} in "
                f"{self.config.directory}. Resume with a lower optimizer.learning_rate and --allow-changed optimizer"
            )
        session.watch.alive()
        state = self._restore(checkpoints, step, checkpoints.meta(step))
        self.order = self.order.rolled_back(step, spike.step)
        checkpoints.drop_after(step)
        session.meter.forget()
        session.log.rewind(step)
        session.display.say(
            f"rolled back to the checkpoint of step {step}; batches of {spike.step - step} steps are passed over"
        )
        return state

    def _farewell(
        self, state: TrainState, step: int, found: Evaluation | None, interrupted: bool, session: Session
    ) -> None:
        config, directory, display = self.config, self.config.directory, session.display
        session.watch.alive()
        if interrupted:
            display.say(interrupted_at(step, session.checkpoints.latest, directory, over=step == config.steps))
            return
        if step < config.steps:
            display.say(f"stopped early: {self.selection}")
        self.sample(state, step, session)
        for line in () if found is None else config.objective.report(self.prepared, found.scores.bits_per_byte):
            display.say(line)
        if found is not None and self.held_out is not None:
            if quality := found.quality or self.held_out.quality(state.used):
                session.log.write(step, eval=dataclasses.asdict(quality))
                display.say(f"{quality.pairs} held-out translations: BLEU {quality.bleu:.2f}, chrF {quality.chrf:.2f}")
            if self.held_out.task is not None and is_first():
                for line in self.held_out.task.finish(found.predictions, directory):
                    display.say(line)
        if is_first():
            write_finished(directory, step)
        display.say(f"finished; {config.objective.next_step(directory)}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
