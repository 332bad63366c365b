"""s3prl's own ``run_downstream`` with what newer libraries need, and a command line that is checked first.

    python -m s3prl_metaperser.run_downstream -m train -d metaperser -u fbank_no_cmvn --device cpu -c ssl_e -n my-run

The flags and the ``main`` are s3prl's. Beyond the stock ``python -m s3prl.run_downstream``:

- ``-e`` (resume) and ``-i`` work with torch 2.6 and later. There ``torch.load`` takes tensors and plain values only,
  and s3prl's checkpoints hold their arguments as an ``argparse.Namespace``, which is declared safe here; the safe
  loader stays in force. The stock command cannot be mended by this package: it loads the checkpoint before it imports
  any downstream.
- s3prl 0.4 imports with torchaudio 2.9 and huggingface_hub 1, by stand-ins for the names these have dropped. They are
  installed only where a name is missing, and say so when something really needs them.
- Checkpoints are whole or not there, under the name they have: ``torch.save`` to a path, as s3prl's runner calls it,
  is replaced in this process by :func:`s3prl_metaperser.torch_files.save` (a temporary name, brought to the disk, then
  renamed). s3prl's own writes into the file itself, so that a kill leaves a part of it.
- ``-e FOLDER`` and ``-a`` pass over a newest ``states-STEP.ckpt`` that is cut off or does not match its checksums, say
  so, and take the one before; training renames it to ``damaged-states-STEP.ckpt``. The stock command takes the newest,
  and ends in torch's traceback if that is damaged: delete it then, and give the command again.
- Disk full, or a file or folder that may not be read or written: one line on stderr with exit code 2, and files as they
  were before.
- Bad input ends in one line on stderr with exit code 2, before anything is written: :mod:`s3prl_metaperser.preflight`.
- An upstream that cannot be downloaded: one line on stderr with exit code 2, that says from where and what to do.
- Launched with several processes by ``torchrun`` or ``torch.distributed.launch``, it knows its rank as these give it
  today; s3prl's parser knows the flag as torch gave it before version 2.
- ``-c`` also takes the name of an installed config (``metaperser config`` lists them).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

from s3prl_metaperser.errors import EXIT_CODE, INTERRUPTED, exit_with, refusal, told_in_a_line, write_any_text
from s3prl_metaperser.s3prl_errors import explained

PROGRAM = "run_downstream"


def main(sets_run_up_first: bool = True) -> None:
    """Check the process's command line and hand it to s3prl's ``main``.

    Args:
        sets_run_up_first: see :func:`s3prl_metaperser.preflight.check`.
    """
    write_any_text()
    try:
        _run(sets_run_up_first)
    except KeyboardInterrupt as interrupt:
        print("; ".join([f"\n{PROGRAM}: interrupted", *interrupt.args]), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _run(sets_run_up_first: bool) -> None:
    make_ready()
    from s3prl_metaperser.preflight_processes import said_once

    with told_in_a_line(PROGRAM), said_once():
        from s3prl_metaperser import preflight
        from s3prl_metaperser.distributed import with_local_rank

        given = with_local_rank(sys.argv[1:])
        sys.argv[1:] = preflight.check(given, sets_run_up_first)

    from s3prl.run_downstream import main as run_s3prl

    threading.excepthook = _end_with_thread
    try:
        with told_in_a_line(PROGRAM):
            try:
                run_s3prl()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(*preflight.ways_on(given)) from None
            except Exception as error:
                wrong_input = explained(error)
                if wrong_input is None:
                    raise
                raise wrong_input from None
    except SystemExit as ended:
        if ended.code == EXIT_CODE:
            _keep_to_the_line()
        raise


def make_ready() -> None:
    """Do what must be done before s3prl is imported."""
    quieten()
    install_stand_ins()
    trust_namespaces()
    save_whole_checkpoints()


def save_whole_checkpoints() -> None:
    """Make ``torch.save`` to a path write the file whole or not at all, in this process."""
    import torch

    from s3prl_metaperser import torch_files

    save = torch.save
    if getattr(save, "is_whole", False):
        return

    @functools.wraps(save)
    def save_whole(obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        if args or not isinstance(f, (str, os.PathLike)):
            save(obj, f, *args, **kwargs)
        else:
            torch_files.save(obj, Path(f), **kwargs)

    save_whole.is_whole = True  # type: ignore[attr-defined]
    torch.save = save_whole


def _end_with_thread(failed: threading.ExceptHookArgs) -> None:
    """End the process with one of its threads: TensorBoard's, when it cannot write, would be waited for without end."""
    if isinstance(failed.exc_value, OSError) and (refused := refusal(failed.exc_value)) is not None:
        exit_with(refused, PROGRAM)
        os._exit(EXIT_CODE)
    threading.__excepthook__(failed)


def _keep_to_the_line() -> None:
    """Silence what TensorBoard cannot write at exit either, once a line has said that nothing can be written."""

    def in_thread(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            threading.__excepthook__(failed)

    def at_exit(failed: sys.UnraisableHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            sys.__unraisablehook__(failed)

    threading.excepthook, sys.unraisablehook = in_thread, at_exit


def quieten() -> None:
    """Silence what s3prl's imports say on every run about things its user cannot change."""
    warnings.filterwarnings("ignore", message=r"torchaudio\._backend\.set_audio_backend has been deprecated")
    logging.getLogger("s3prl.upstream.espnet_hubert.expert").setLevel(logging.ERROR)


def trust_namespaces() -> None:
    """Let torch's safe loader read the arguments in s3prl's checkpoints."""
    import torch

    torch.serialization.add_safe_globals([argparse.Namespace])


def install_stand_ins() -> None:
    """Give torchaudio and huggingface_hub the names that s3prl 0.4 imports, where their newer versions lack them."""
    import huggingface_hub
    import torchaudio

    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = _no_backend_to_set
    if importlib.util.find_spec("torchaudio.sox_effects") is None:
        effects: Any = types.ModuleType("torchaudio.sox_effects")
        # By its spec the module is known to be there, when a process that has these stand-ins asks for them again.
        effects.__spec__ = importlib.util.spec_from_loader(effects.__name__, loader=None)
        effects.apply_effects_file = _gone("torchaudio.sox_effects.apply_effects_file", "torchaudio<2.9")
        effects.apply_effects_tensor = _gone("torchaudio.sox_effects.apply_effects_tensor", "torchaudio<2.9")
        sys.modules[effects.__name__] = effects
        torchaudio.sox_effects = effects
    for name in ("HfFolder", "Repository"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, _gone(f"huggingface_hub.{name}", "huggingface_hub<1"))


def _no_backend_to_set(backend: str | None) -> None:
    """Do nothing, as torchaudio's own function has since version 2.2."""


def _gone(name: str, requirement: str) -> type:
    """Make a class that stands for a function or class that is no more, and fails with the cure when it is used."""
    cure = f"{name} is missing in the installed version; install {requirement!r} to use it"

    class Missing(type):
        def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
            raise ImportError(cure)

        def __getattr__(cls, attribute: str) -> NoReturn:
            # What looks into classes without using them asks for such names, and takes no for an answer.
            raise AttributeError(attribute) if attribute.startswith("__") else ImportError(cure)

    class Gone(metaclass=Missing):
        pass

    Gone.__name__ = Gone.__qualname__ = name.rpartition(".")[2]
    return Gone


if __name__ == "__main__":
    main()
