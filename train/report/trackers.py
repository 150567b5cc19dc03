"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow and Trackio behind one interface.

Each needs the extra of its own name, except TensorBoard, whose files are written without one. Where a service keeps its
records, and whether offline, is set in its own way: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR or TRACKIO_SPACE_ID.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig, to_data
from transformer.errors import UserError, first_line

RUN_TAG = "manyheads.run"
"""MLflow's tag by which a run is found again."""
_LONGEST = 500
"""Characters of a setting that MLflow is given."""
_PER_BATCH = 100
"""Settings that MLflow takes at once."""


class Tracker(abc.ABC):
    """Something that records scalars."""

    @abc.abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""

    def rewind(self, step: int) -> None:  # noqa: B027
        """Expect the steps after `step` once more: training has gone back to it. Services keep both values of a step."""

    @abc.abstractmethod
    def close(self, *, failed: bool = False) -> None:
        """Write what is buffered, and end; `failed`: the run ended by an error."""


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What a tracker needs to know of a run."""

    config: RunConfig
    directory: Path
    """The run's folder."""
    run_id: str
    """By which a service recognises the run when it resumes, and no other run of the same name."""
    start_step: int
    """The step after which the run begins or resumes."""

    @property
    def project(self) -> str:
        """The group of runs to which it belongs."""
        return self.config.log.project or self.config.name


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    def __init__(self, run: Tracked) -> None:
        self._directory = run.directory / "tensorboard"
        self._writer = self._opened(run.start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._opened(step)

    def _opened(self, step: int) -> Any:
        from tensorboardX import SummaryWriter

        # Its own names are the same for all files that begin within a second.
        return SummaryWriter(str(self._directory), purge_step=step + 1, filename_suffix=f".{time.time_ns()}")

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases that continues under the same id on a resume. Its x axis is `step`, which may go back."""

    def __init__(self, run: Tracked) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=run.project, name=run.config.name, id=f"{run.config.name}-{run.run_id}", resume="allow",
            config=to_data(run.config), dir=str(run.directory),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """A run of an MLflow experiment, found again by its tag."""

    def __init__(self, run: Tracked) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._client = mlflow.MlflowClient()
        self._metric: Callable[..., Any] = mlflow.entities.Metric
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([number], f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=run.config.name, tags={RUN_TAG: run.run_id}).info.run_id
        settings = [mlflow.entities.Param(name, value[:_LONGEST]) for name, value in flat(to_data(run.config)).items()]
        for start in range(0, len(settings), _PER_BATCH):
            self._client.log_batch(self._id, params=settings[start : start + _PER_BATCH])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def close(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """A run of a Trackio project."""

    def __init__(self, run: Tracked) -> None:
        trackio: Any = importlib.import_module("trackio")
        self._run = trackio.init(
            project=run.project, name=f"{run.config.name}-{run.run_id}", resume="allow", config=to_data(run.config), embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        # It knows no other end.
        self._run.finish()


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""The names of `log.trackers`."""


def start_all(run: Tracked) -> list[Tracker]:
    """Those of `log.trackers`, each as by `start`; if one refuses the run, those before it are closed as failed."""
    started: list[Tracker] = []
    try:
        for name in run.config.log.trackers:
            started.append(start(name, run))  # noqa: PERF401
    except Exception:
        for tracker in started:
            with contextlib.suppress(Exception):
                tracker.close(failed=True)
        raise
    return started


def start(name: str, run: Tracked) -> Tracker:
    """Begin to record a run, or continue.

    Raises:
        UserError: the tracker is not installed, or refuses the run.
        OSError: the run's folder cannot be written.
    """
    try:
        return TRACKERS[name](run)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise UserError(
            f"log.trackers: {name} needs {missing}, which is not installed; pip install 'manyheads[{name}]'"
        ) from None
    except Exception as error:
        if name == "tensorboard":
            raise
        raise UserError(f"log.trackers: {name} cannot record the run: {first_line(error)}") from None


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as names with dots → values as text; of lists the whole."""
    found: dict[str, str] = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return found
