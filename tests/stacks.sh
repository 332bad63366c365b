#!/usr/bin/env bash
# The runner tests, and those of the pages, on the ends of what setup.py allows, each in a new environment that is removed afterwards.
#
#   tests/stacks.sh [newest|oldest] [REQUIREMENT ...]
#
#   newest  METAPERSER_STACK=newest: the newest torch, torchaudio, huggingface_hub and transformers that setup.py allows,
#           where s3prl itself does not import and every test goes through the launcher
#   oldest  every requirement of setup.py at its lower bound, and the stock command
#
# Without an argument, one after the other. A REQUIREMENT narrows the stack: tests/stacks.sh newest 'torch==2.9.*'.
# PYTHON names the interpreter (python3), TMPDIR where the environments are made: 8 GB each. 10 minutes on 2 cores.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
TESTS=(
    test_launcher.py test_runner.py test_personalize.py test_upstream_matrix.py test_ddp.py
    test_calibration.py test_portrait.py
)

# The lower bounds of a wheel's requirements, extras left out, as constraints for pip.
lower_bounds() {
    unzip -p "$1" '*.dist-info/METADATA' |
        sed -nE '/;/d; s/^Requires-Dist: ([A-Za-z0-9_.-]+).*>=([0-9.]+).*$/\1==\2/p'
}

# run STACK [REQUIREMENT ...], in a shell of its own: which ends with the tests' exit code, and leaves nothing behind.
run() (
    stack="$1"
    shift
    place="$(mktemp -d)"
    trap 'rm -rf "$place"' EXIT
    printf '==> %s %s\n' "$stack" "$*"
    "${PYTHON:-python3}" -m venv "$place/env"
    python="$place/env/bin/python"
    pip=("$python" -m pip --quiet --disable-pip-version-check)
    # Built from what git has, since building leaves folders behind and reads those of an earlier build.
    mkdir "$place/source"
    git -C "$ROOT" archive HEAD | tar -x -C "$place/source"
    touch "$place/bounds"
    if [[ "$stack" = newest ]]; then
        export METAPERSER_STACK=newest METAPERSER_TEST_LAUNCHER=s3prl_metaperser.run_downstream
    fi
    "${pip[@]}" wheel --no-deps --wheel-dir "$place" "$place/source"
    if [[ "$stack" = oldest ]]; then
        lower_bounds "$place"/*.whl >"$place/bounds"
    fi
    "${pip[@]}" install --constraint "$place/bounds" "$place"/*.whl pytest tensorboard httpx httpx2 "$@"
    "$python" -m pip check
    "$python" -m pip freeze --exclude-editable | grep -Ei '^(s3prl|torch|torchaudio|huggingface.hub|transformers|numpy|pandas|scikit-learn|scipy|pydantic)(==| @)'
    if "$python" -c 'import s3prl.hub' 2>"$place/said"; then
        echo "s3prl imports by itself"
    else
        echo "s3prl does not import by itself: $(tail -n 1 "$place/said")"
    fi
    "$place/source/tests/robustness/runner_tests.sh" "$python" "${TESTS[@]}"
)

case "${1:-}" in
    newest | oldest) run "$@" ;;
    "") # each in a process of its own: in one that is asked whether it failed, bash goes on after an error
        failed=0
        for stack in oldest newest; do "${BASH_SOURCE[0]}" "$stack" || failed=1; done
        exit "$failed" ;;
    *) echo "usage: $0 [newest|oldest] [REQUIREMENT ...]" >&2; exit 2 ;;
esac
