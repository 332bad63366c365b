"""Runs as jobs of a Slurm cluster, by way of submitit: one job a run, which executes the run's command.

A job outlives the process that submitted it. Ctrl-C cancels what is under way; where the experiment itself was killed,
a job that it left behind is cancelled when its run is asked for again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.launchers import End, Launched, Launcher
from s3prl_metaperser.experiments.runs import LOG, Run

if TYPE_CHECKING:
    from submitit import Job, SlurmJob

FOLDER = "slurm"
"""Within a run's folder: submission files, and the jobs' own logs and exit codes."""
ASK_SECONDS = 30.0
"""How often Slurm is asked for the state of jobs that have left no exit code."""
LAG_SECONDS = 15.0
"""How much later than the end of a job its exit code may appear on a shared disk."""
CANCEL_SECONDS = 60.0
"""How long a cancelled job may take to be gone."""


@dataclass(frozen=True)
class SlurmSettings:
    """What each job asks the cluster for.

    Attributes:
        partition: None for the cluster's default.
        gpus: a job.
        minutes: time limit of a job.
        cpus: a job.
        account: to be charged; None for the user's default.
    """

    partition: str | None
    gpus: int
    minutes: int
    cpus: int
    account: str | None

    def parameters(self) -> dict[str, object]:
        """Give them by submitit's names."""
        given = {
            "partition": self.partition,
            "gpus_per_node": self.gpus or None,
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "account": self.account,
        }
        return {name: value for name, value in given.items() if value is not None}


class SlurmLauncher(Launcher):
    """Submits each run as a job.

    Args:
        settings: of every job.

    Raises:
        MetaPerSERError: where submitit or Slurm is missing.
    """

    poll_seconds = 0.5
    is_elsewhere = True

    def __init__(self, settings: SlurmSettings) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise MetaPerSERError("--slurm needs submitit: pip install submitit") from None
        for program in ("sbatch", "srun", "sacct", "scancel"):
            if shutil.which(program) is None:
                raise MetaPerSERError(f"--slurm: there is no {program!r} here; give the command on a login node")
        self._settings = settings
        self._asked = time.monotonic()

    def clear(self, run: Run) -> None:
        """Cancel jobs of the run that are still queued or running."""
        from submitit import SlurmJob

        for path in (run.folder / FOLDER).glob("*_submission.sh"):
            job: SlurmJob[int] = SlurmJob(path.parent, path.name.removesuffix("_submission.sh"))
            if not job.done(force_check=True):
                job.cancel(check=False)
                _wait(job)
            # Of a training that goes on, the folder stays; Slurm forgets old jobs, and would not say that they ended.
            path.unlink(missing_ok=True)

    def start(self, run: Run) -> Launched:
        """See :class:`Launcher`."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = SlurmExecutor(run.folder / FOLDER)
        executor.update_parameters(
            job_name=run.name.replace("/", "-"), stderr_to_stdout=True, **self._settings.parameters()
        )
        try:
            job = executor.submit(execute, run.started_command(), run.folder / LOG, run.thread_limits())
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
            raise MetaPerSERError(f"sbatch refused the job: {error}") from None
        return _Queued(job, self)

    def asks(self) -> bool:
        """Tell whether it is time to ask Slurm; one answer is about all jobs."""
        due = time.monotonic() - self._asked > ASK_SECONDS
        if due:
            self._asked = time.monotonic()
        return due


def execute(command: Sequence[str], log: Path, limits: Mapping[str, str]) -> int:
    """Run a command and give its exit code; this is what a job does.

    Args:
        command: of the run.
        log: the file for both its outputs, which are added to it.
        limits: environment variables to be set.
    """
    with log.open("ab") as file:
        environment = os.environ | limits
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return done.returncode


class _Queued(Launched):
    def __init__(self, job: Job[int], launcher: SlurmLauncher) -> None:
        self._job = job
        self._launcher = launcher
        self._gone: float | None = None

    def poll(self) -> End | None:
        if self._job.paths.result_pickle.exists():
            return self._end()
        if self._gone is not None:
            if time.monotonic() - self._gone < LAG_SECONDS:
                return None
            return End(f"Slurm job {self._job.job_id} ended as {self._job.state}")
        if self._job.done(force_check=self._launcher.asks()):
            self._gone = time.monotonic()
        return None

    def stop(self) -> None:
        self._job.cancel(check=False)

    def join(self) -> None:
        _wait(self._job)

    def _end(self) -> End:
        failure = self._job.exception()
        if failure is not None:
            said = [line for line in str(failure).splitlines() if "Error" in line or "because" in line]
            return End(f"Slurm job {self._job.job_id} failed: {' '.join(said[-1:])}")
        code = self._job.result()
        if code == -signal.SIGUSR2:
            # Sent by Slurm some time before the limit, as submitit asks it to.
            return End(f"Slurm job {self._job.job_id} was stopped at its time limit (--slurm-time)")
        return End.with_code(code)


def _wait(job: Job[int]) -> None:
    """Wait until a cancelled job writes no more."""
    begin = time.monotonic()
    while time.monotonic() - begin < CANCEL_SECONDS and not job.done(force_check=True):
        time.sleep(1.0)
