#!/usr/bin/env bash
# What is handed out, installed as a stranger would: the wheel and the sdist of the last commit, each in a clean
# environment, with pip check and the tests that go through s3prl's runner, and nothing of the source tree on the path.
#
#   tests/robustness/supply.sh [ENVIRONMENT]
#
# The wheel brings its dependencies along; the sdist's own build is then put in its place. ENVIRONMENT is one that may
# be changed, to install less: this package is replaced in it. Without it one is made in TMPDIR and removed: 8 GB, by
# the interpreter that PYTHON names (python3). 15 minutes on 2 cores.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
TESTS=(
    test_launcher.py test_runner.py test_personalize.py::test_the_stock_runner_predict_and_python_hear_the_same
)

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
mkdir "$place/source"
git -C "$ROOT" archive HEAD | tar -x -C "$place/source"
if (($#)); then
    environment="$(cd "$1" && pwd)"
else
    environment="$place/env"
    "${PYTHON:-python3}" -m venv "$environment"
fi
python="$environment/bin/python"
pip=("$python" -m pip --quiet --disable-pip-version-check)

echo "==> building the sdist, and the wheel from it"
"${pip[@]}" install build
"$python" -m build --outdir "$place/dist" "$place/source" >"$place/said" 2>&1 || { cat "$place/said" >&2; exit 1; }
"${pip[@]}" uninstall --yes build pyproject_hooks

echo "==> what is in them"
"$python" -I - "$place/source" "$place"/dist/*.whl "$place"/dist/*.tar.gz <<'PYTHON'
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

source, wheel, sdist = (Path(path) for path in sys.argv[1:])
RECORDINGS = {".wav", ".flac", ".mp3", ".ogg", ".ckpt", ".pt", ".csv", ".npz", ".npy", ".safetensors"}
PLACES = {  # where a folder of the source is in the wheel; the first two are there twice
    "s3prl_metaperser/s3prl_downstream/": "s3prl/downstream/metaperser/",
    "s3prl_metaperser/metaperser_api/": "metaperser/",
    "downstream_configs/": "s3prl_metaperser/downstream_configs/",
}


def compare(name: str, there: set[str], wanted: set[str]) -> None:
    wrong = [f"lacks {file}" for file in wanted - there] + [f"holds {file}" for file in there - wanted]
    wrong += [f"holds {file}" for file in there if PurePosixPath(file).suffix in RECORDINGS]
    if wrong:
        sys.exit("\n".join(f"the {name} {line}" for line in sorted(wrong)))
    print(f"the {name} holds what it should: {len(there)} files")


files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
files = {name for name in files if not name.startswith(".") and ".egg-info/" not in name}
with tarfile.open(sdist) as archive:
    there = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
compare("sdist", {name for name in there if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name}, files)

wanted = {name for name in files if name.startswith("s3prl_metaperser/")}
for folder, place in PLACES.items():
    wanted |= {place + name.removeprefix(folder) for name in files if name.startswith(folder)}
there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
compare("wheel", there, wanted)
PYTHON

passes() {
    echo "==> from the $1"
    cd "$place" # where python -m finds nothing but what is installed
    "$python" -m pip check
    "$environment/bin/metaperser" --help >"$place/help"
    "$python" -m s3prl.run_downstream --help >"$place/help" 2>&1
    "$place/source/tests/robustness/runner_tests.sh" "$python" "${TESTS[@]}"
}

echo "==> installing"
"${pip[@]}" uninstall --yes s3prl-metaperser
"${pip[@]}" install "$place"/dist/*.whl
"${pip[@]}" install pytest tensorboard
passes wheel
"${pip[@]}" install --force-reinstall --no-deps "$place"/dist/*.tar.gz
passes sdist
