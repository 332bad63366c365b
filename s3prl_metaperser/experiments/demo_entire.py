"""The paper's method through the speech model itself: ``python -m s3prl_metaperser.experiments.demo_entire``.

On the synthetic corpus, by s3prl's own commands, which are shown as a user gives them: an upstream is fine-tuned on
aggregated labels (SSL-E), meta-trained from there (Meta-PerSER), and adapted to listeners that no training has seen,
all in scope ``entire``. The meta-training is given twice; the second is killed half way, goes on from its own
checkpoint, and must end in the weights of the first. Where no upstream is named, it is a small WavLM that has learned
nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3prl_metaperser.argument_types import given_path
from s3prl_metaperser.errors import MetaPerSERError, run_as_command
from s3prl_metaperser.experiments.demo import make_corpus, say

if TYPE_CHECKING:
    from torch import Tensor

    from s3prl_metaperser.experiments.plan import Setup
    from s3prl_metaperser.experiments.runs import Run

STOCK, LAUNCHER = "s3prl.run_downstream", "s3prl_metaperser.run_downstream"
"""One program with the same flags; with newer torch only the launcher's ``-e`` can read s3prl's checkpoints, and with
newer torchaudio or huggingface_hub only the launcher starts."""
SSL_E, META_PERSER = "ssl_e_entire", "meta_perser_entire"
META_STEPS, HALF_WAY = 4, 2
SHORT: dict[str, dict[str, Any]] = {
    SSL_E: {
        "runner.total_steps": 8,
        "runner.eval_step": 4,
        "runner.gradient_accumulate_steps": 2,
        "downstream_expert.adaptation.lr": [0.001, 0.01],
        "downstream_expert.adaptation.steps": [2, 5],
    },
    META_PERSER: {
        "runner.total_steps": META_STEPS,
        "runner.eval_step": META_STEPS,
        "runner.save_step": HALF_WAY,
        "runner.gradient_accumulate_steps": 3,
        "downstream_expert.meta.inner_steps": 3,
        "downstream_expert.adaptation.steps": [2, 5],
    },
}
"""Settings by which the installed configs end within minutes."""
LOOK_SECONDS = 0.02
RANDOM_WEIGHTS = (
    "The upstream has random weights: it has learned nothing about speech. The figures mean nothing about WavLM, nor "
    "about the systems; they show that everything runs."
)


class CommandError(Exception):
    """A command of s3prl's did not end well; the message is one line."""


def run_demo(out: Path, upstream: str | None, ckpt: Path | None, device: str, seed: int) -> int:
    """Run the demo.

    Args:
        out: folder for corpus, upstream, runs and table.
        upstream: s3prl's name of one; None: a small WavLM with random weights is made.
        ckpt: its file, where it needs one.
        device: where torch computes.
        seed: of the corpus, the random weights and all draws.

    Returns:
        The exit code: 1 where a command failed, or the resumed training ended in other weights.

    Raises:
        MetaPerSERError: when something that was given is wrong.
    """
    from s3prl_metaperser.experiments.experiment import claim_folder
    from s3prl_metaperser.experiments.launchers import check

    if ckpt is not None and upstream is None:
        raise MetaPerSERError(f"--upstream-ckpt {ckpt}: of which upstream? add --upstream wavlm_local")
    begin = time.monotonic()
    corpus = make_corpus(out, seed)
    notes: list[str] = []
    if upstream is None:
        upstream, ckpt = "wavlm_local", _random_upstream(out, seed)
        notes.append(RANDOM_WEIGHTS)
    setup = _setup(corpus, out, upstream, ckpt, device, seed)
    setup.check(check)
    claim_folder(setup)
    try:
        whole, resumed = _train(setup)
        _evaluate(setup, whole)
        print(_table(setup, notes))
        is_same, line = _compared(*(_last_state(run) for run in (whole, resumed)))
    except CommandError as error:
        print(f"metaperser: error: {error}", file=sys.stderr)
        return 1
    print(f"resumed: killed after step {HALF_WAY} of {META_STEPS} and gone on with by -e, meta-training {line}")
    say(f"done in {time.monotonic() - begin:.0f} s; everything is in {out}")
    # A GPU need not compute the same bits twice.
    return 0 if is_same or not device.startswith("cpu") else 1


def _random_upstream(out: Path, seed: int) -> Path:
    from s3prl_metaperser.experiments.random_wavlm import write_random_wavlm

    path = out / f"random-wavlm-seed{seed}.pt"
    parameters = write_random_wavlm(path, seed)
    say(f"a small WavLM with random weights, {parameters / 1e6:.2f} million parameters: -u wavlm_local -k {path}")
    return path


def _setup(corpus: Path, out: Path, upstream: str, ckpt: Path | None, device: str, seed: int) -> Setup:
    from s3prl_metaperser.experiments.plan import Override, Setup
    from s3prl_metaperser.experiments.runs import Upstream

    return Setup(
        corpus=corpus,
        out=out,
        upstream=Upstream(upstream, None if ckpt is None else os.path.abspath(ckpt), device),
        scenarios=("seen",),
        folds=1,
        scope="entire",
        shots=8,
        queries=32,
        episodes=2,
        seed=seed,
        threads=1,
        overrides=tuple(Override(name, key, value) for name, own in SHORT.items() for key, value in own.items()),
    )


def _train(setup: Setup) -> tuple[Run, Run]:
    """Train SSL-E and, from it, Meta-PerSER twice; give these two runs, the second of which was killed and resumed."""
    from s3prl_metaperser.experiments.runs import BEST

    program = _program()
    ssl_e = setup.run("ssl_e", "train", setup.config(SSL_E, "seen", 1))
    say("SSL-E: the upstream, the weighted sum and two linear layers learn aggregated labels")
    ssl_e.prepare()
    _call(setup, program, ssl_e.arguments(), ssl_e.folder)
    config = setup.config(META_PERSER, "seen", 1, {"init_from": str(ssl_e.folder / BEST)})
    whole, resumed = (setup.run(name, "train", config) for name in ("meta_perser", "meta_perser-resumed"))
    say("Meta-PerSER: all of it is meta-trained from SSL-E")
    whole.prepare()
    _call(setup, program, whole.arguments(), whole.folder)
    say(f"the same again, killed after step {HALF_WAY} of {META_STEPS}, and gone on with from its last checkpoint")
    resumed.prepare()
    _call(setup, program, resumed.arguments(), resumed.folder, kill_at=resumed.folder / f"states-{HALF_WAY}.ckpt")
    going_on = ["-m", "train", "-e", str(resumed.folder), "--device", setup.upstream.device]
    _call(setup, LAUNCHER, going_on, resumed.folder)
    return whole, resumed


def _program() -> str:
    """Choose s3prl's own command, or the launcher where s3prl does not import by itself."""
    # In another process: this one may have put in what s3prl misses.
    imports = subprocess.run([sys.executable, "-c", f"import {STOCK}"], capture_output=True).returncode == 0
    return STOCK if imports else LAUNCHER


def _evaluate(setup: Setup, meta_perser: Run) -> None:
    from s3prl_metaperser.experiments.runs import BEST

    say("the systems on the same episodes of a listener that no training has seen")
    ssl_e = setup.folder("ssl_e")
    for system, trained in (("entire_zero", ssl_e), ("entire_few", ssl_e), ("meta_perser", meta_perser.folder)):
        folder = setup.folder(_evaluation(system))
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        change = f"args.expdir='{folder}',,config.downstream_expert.system='{system}'"
        device = ["--device", setup.upstream.device]
        _call(setup, LAUNCHER, ["-m", "evaluate", "-e", str(trained / BEST), *device, "-o", change], folder)


def _evaluation(system: str) -> str:
    return f"{system}-test"


def _call(setup: Setup, module: str, arguments: Sequence[str], folder: Path, kill_at: Path | None = None) -> None:
    """Show a command and run it to its end.

    Args:
        setup: gives the threads.
        module: that is run.
        arguments: its command line.
        folder: of the run, where its log is continued.
        kill_at: the checkpoint after which the process is killed; None: it is left alone.

    Raises:
        CommandError: with its last words.
    """
    from s3prl_metaperser.experiments.runs import LOG, last_words, thread_limits

    shown = " ".join(map(_quoted, ["python", "-m", module, *arguments])).replace(f"{Path.cwd()}/", "")
    print(f"    {shown}", file=sys.stderr, flush=True)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | thread_limits(setup.threads),
        )
    try:
        while kill_at is not None and process.poll() is None:
            # An archive of torch's ends with its directory; before that it is no archive.
            if kill_at.exists() and zipfile.is_zipfile(kill_at):
                process.kill()
                process.wait()
                return
            time.sleep(LOOK_SECONDS)
        code = process.wait()
    finally:
        process.kill()
    if code or kill_at is not None:
        ended = f"ended with code {code}" if code else "ended before it could be killed"
        raise CommandError(f"{shown.split(' -m ')[1]} {ended}: {last_words(folder / LOG)} (all of it: {folder / LOG})")


def _quoted(argument: str) -> str:
    """Quote for a shell, and for its reader where single quotes are within."""
    return f'"{argument}"' if "'" in argument and not set(argument) & set('"$`\\!') else shlex.quote(argument)


def _last_state(run: Run) -> dict[str, Tensor]:
    """Give all tensors that training has ended in."""
    from torch import Tensor

    from s3prl_metaperser.checkpoints import DOWNSTREAM, FEATURIZER, UPSTREAM, read_checkpoint

    checkpoint = read_checkpoint(run.folder / f"states-{META_STEPS}.ckpt")
    entries = {
        (entry, name): value
        for entry in (UPSTREAM, FEATURIZER, DOWNSTREAM)
        for name, value in checkpoint[entry].items()
    }
    return {f"{entry}.{name}": value for (entry, name), value in entries.items() if isinstance(value, Tensor)}


def _compared(whole: dict[str, Tensor], resumed: dict[str, Tensor]) -> tuple[bool, str]:
    """Tell whether two trainings ended in the same weights, and say so."""
    if whole.keys() != resumed.keys():
        return False, "ended in other tensors than the uninterrupted one"
    differing = [name for name, tensor in whole.items() if not tensor.equal(resumed[name])]
    if not differing:
        return True, f"ended in the same weights as uninterrupted, bit for bit ({len(whole)} tensors)"
    most = max(float((whole[name].double() - resumed[name].double()).abs().max()) for name in differing)
    return False, f"ended in other weights: {len(differing)} of {len(whole)} tensors differ, by {most:.1e} at the most"


def _table(setup: Setup, notes: Sequence[str]) -> str:
    """Write ``results.csv`` and the table, and give its text."""
    import pandas as pd

    from s3prl_metaperser.experiments.experiment import write_results
    from s3prl_metaperser.experiments.runs import FAILURES, RESULTS
    from s3prl_metaperser.experiments.tables import write_tables
    from s3prl_metaperser.results_file import read_episodes

    folders = [setup.folder(_evaluation(system)) for system in ("entire_zero", "entire_few", "meta_perser")]
    results = pd.concat([read_episodes(folder / RESULTS, folder / FAILURES) for folder in folders], ignore_index=True)
    write_results(results, setup.out, "table1")
    write_tables(results, setup.out, "table1", notes=notes)
    return (setup.out / "table1.md").read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="run_downstream.sh demo-entire",
        description="Train SSL-E and Meta-PerSER with the upstream (-f, scope entire) on a synthetic corpus by s3prl's "
        "own commands, adapt both to a listener that no training has seen, and show that a killed training goes on "
        "to the same weights.",
    )
    add = parser.add_argument
    add("--out", type=given_path, default=Path("result/demo-entire"), help="folder for everything (result/demo-entire)")
    add("-u", "--upstream", metavar="NAME", help="s3prl upstream; without it, a small WavLM with random weights")
    add("-k", "--upstream-ckpt", type=given_path, metavar="FILE", help="checkpoint of a *_local upstream")
    add("--device", default="cpu", help="where torch computes: cpu, cuda, cuda:1 (cpu)")
    add("--seed", type=int, default=0, help="of the corpus, the random weights and all draws (0)")
    args = parser.parse_args(arguments)
    sys.exit(run_as_command(lambda: run_demo(args.out, args.upstream, args.upstream_ckpt, args.device, args.seed)))


if __name__ == "__main__":
    main()
