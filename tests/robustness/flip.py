"""Change one byte of each kind of file that is kept, and see that it is named and made again or refused, never used.

    python tests/robustness/flip.py --inputs 2000 --seed 0

For each input one file is chosen, one byte of it changed to another at random, and the file read as the program reads
it. What is read must be what was written (where the byte says nothing, as a zip archive's padding, or where the clips
were extracted again, or the run was made again), or the file must be refused in our own words. ``named`` counts the
latter and what was made again, ``harmless`` the rest.

Kinds: ``shard`` (feature cache), ``hashes`` (of recordings), ``checkpoint``, ``manifest`` (``annotations.csv`` and
``corpus.json``), ``results`` (``results.csv`` and ``predictions.csv``), ``done.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import write_small_corpus
from workshop import LAUNCHER, Workshop

from s3prl_metaperser import configs
from s3prl_metaperser.checkpoints import read_checkpoint
from s3prl_metaperser.checksums import CheckedFolder
from s3prl_metaperser.corpus.manifest import load_corpus, write_corpus
from s3prl_metaperser.errors import MetaPerSERError
from s3prl_metaperser.experiments.runs import Run, Upstream


@dataclass
class Kind:
    """Files of one kind.

    Attributes:
        files: of which bytes are changed.
        read: reads them as the program does; tells whether what it read is what was written. Refuses by
            ``MetaPerSERError``.
        mends: whether it makes again what it finds damaged, so that this is as it was afterwards.
    """

    files: list[Path]
    read: Callable[[], bool]
    mends: bool = False


def kinds(root: Path) -> dict[str, Kind]:
    """Make files of every kind in a folder."""
    corpus = write_small_corpus(root / "corpus")
    shop = Workshop(root, corpus, ["-u", "fbank_no_cmvn"])
    shop.train(
        "run", shop.config("meta_perser_paper", {"total_steps": 2, "eval_step": 2}, init_from=None), program=LAUNCHER
    )
    best, results = root / "run/dev-best.ckpt", CheckedFolder(root / "run")
    given = tensors(read_checkpoint(best))
    prepared = load_corpus(corpus)
    write_corpus(prepared, root / "prepared")
    return {
        "shard": _shard(root, corpus),
        "checkpoint": Kind([best], lambda: same(tensors(read_checkpoint(best)), given)),
        "manifest": Kind(
            [root / "prepared/annotations.csv", root / "prepared/corpus.json"],
            lambda: (
                load_corpus(root / "prepared").annotations.equals(prepared.annotations)
                and load_corpus(root / "prepared").emotions == prepared.emotions
                and load_corpus(root / "prepared").root == prepared.root
                and load_corpus(root / "prepared").name == prepared.name
            ),
        ),
        "results": Kind([root / "run/results.csv", root / "run/predictions.csv"], lambda: checked(results)),
        "done.json": _run(root, corpus),
    }


def _shard(root: Path, corpus: Path) -> Kind:
    from s3prl.upstream.baseline.hubconf import fbank_no_cmvn
    from s3prl.upstream.interfaces import Featurizer

    from s3prl_metaperser.upstream.cache import FeatureCache, FileHashes, UpstreamIdentity
    from s3prl_metaperser.upstream.features import cached_features
    from s3prl_metaperser.upstream.pooling import PooledUpstream

    upstream, cpu = fbank_no_cmvn(), torch.device("cpu")
    pooled = PooledUpstream(upstream, Featurizer(upstream, upstream_device="cpu"), "mean", cpu)
    identity = UpstreamIdentity("fbank_no_cmvn", "", "", "", "", "hidden_states", None, False, "mean")
    audio = {path.stem: path for path in sorted((corpus / "audio").glob("*.wav"))[:12]}
    place = root / "features"

    def read() -> torch.Tensor:
        cache, hashes = FeatureCache(place, identity), FileHashes(place, corpus / "audio")
        rows, deviations = cached_features(cache, hashes, pooled, audio, cpu, progress=False).raw(sorted(audio))
        return torch.cat([torch.stack(list(rows), 1).flatten(1), deviations[:, None]], 1)

    given = read()
    files = [*place.rglob("shard-*.safetensors"), *place.rglob("file-hashes/*.txt")]
    return Kind(files, lambda: torch.equal(read(), given), mends=True)


def _run(root: Path, corpus: Path) -> Kind:
    config = yaml.safe_load(configs.find("ssl_e").read_text())
    config["downstream_expert"]["corpus"] = str(corpus)
    run = Run("fold1/ssl_e", root / "done", "train", config, Upstream("fbank_no_cmvn", None, "cpu"), 1, 1)
    run.begin()
    for name in ("dev-best.ckpt", "results-dev.csv"):
        (run.folder / name).write_text(name)
    now = datetime.now(timezone.utc)
    run.finish(now, now)
    given = run.record()

    def read() -> bool:
        if not run.is_done():
            raise MetaPerSERError("the run is made again")
        return run.record() == given

    return Kind([run.folder / "done.json"], read)


def checked(results: CheckedFolder) -> bool:
    """Compare results as a run does that adds to them."""
    for name in ("results.csv", "predictions.csv"):
        results.check(name)
    return False


def tensors(checkpoint: dict) -> dict:
    """Give a checkpoint's tensors by name."""
    parts = ("Downstream", "Featurizer")
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items() if name[0] != "_"}


def same(first: dict, second: dict) -> bool:
    """Tell whether tensors are the same, name by name."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main() -> int:
    """Change as many bytes as asked for; give 1 where a change was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, found, used = random.Random(args.seed), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as folder:
        known = kinds(Path(folder).resolve())
        for number in range(args.inputs):
            name, kind = list(known.items())[number % len(known)]
            path = rng.choice(kind.files)
            whole = path.read_bytes()
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :])
            os.utime(path, ns=(number, number))
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    verdict = "harmless" if kind.read() else "USED"
                    if kind.mends and path.read_bytes() == whole:
                        verdict = "named"
            except MetaPerSERError:
                verdict = "named"
            path.write_bytes(whole)
            found[name, verdict] += 1
            if verdict == "USED":
                used += 1
                print(f"{name}: byte {place} of {path.name} was changed and not noticed")
    for (name, verdict), count in sorted(found.items()):
        print(f"{name}: {count} {verdict}")
    print(f"{args.inputs} bytes changed, {used} used")
    return 1 if used else 0


if __name__ == "__main__":
    sys.exit(main())
