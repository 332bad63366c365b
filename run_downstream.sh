#!/usr/bin/env bash
# Everything this project does from one command, with its own set-up. Run it without arguments for the list.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"

usage() {
    cat <<'TEXT'
usage: ./run_downstream.sh SUBCOMMAND

  demo    make a synthetic corpus, train SSL-E and Meta-PerSER on it with s3prl's runner, compare the systems on a
          listener none of them knew; results go to result/demo/ (under 5 minutes on 2 cores, after installation)
  demo-entire [OPTION ...]
          the speech model itself trained, meta-trained and adapted (-f, scope entire) by s3prl's own commands, and a
          training that is killed and resumed; results go to result/demo-entire/ (under 3 minutes on 2 cores, with a
          small WavLM of random weights; another: --upstream wavlm_local --upstream-ckpt FILE --device cuda)
  reproduce IEMOCAP_ROOT [OPTION ...]
          the paper's experiments: prepare IEMOCAP, all systems, Table 1, Table 2, Figure 2 and a report; for
          example --upstream wavlm_base --device cuda --out result/wavlm_base; the upstream stays frozen without
          --scope entire (reproduce --help lists all options)
  test    lint, format, types and tests
  setup   install only

Each installs what it needs first: into the active virtual or conda environment, or else into .venv, which is made
with python3 (another one: PYTHON=python3.12 ./run_downstream.sh ...). Installing takes some minutes and 7 GB, once.

Training on your own corpus:
  metaperser --help                                       corpora, configs, experiments
  python -m s3prl_metaperser.run_downstream --help        s3prl's own flags
TEXT
}

say() { printf '==> %s\n' "$*" >&2; }

check_python() {
    if ! command -v "$1" >/dev/null; then
        say "error: there is no '$1'; install Python 3.10 to 3.13, or name one: PYTHON=/path/to/python3 $0 ..."
        exit 2
    fi
    if ! "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
        say "error: $("$1" --version) at $(command -v "$1"), but Python 3.10 to 3.13 is needed; name one: PYTHON=/path/to/python3 $0 ..."
        exit 2
    fi
}

# Sets PYTHON to the python of the active environment, or of .venv, made if need be.
choose_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -n "$active" ]]; then
        # An environment may have been activated by a relative path, from the folder this was called in.
        [[ "$active" = /* ]] || active="$CALLED_FROM/$active"
        if [[ ! -x "$active/bin/python" ]]; then
            say "error: the active environment $active has no bin/python; run 'deactivate', or make it anew"
            exit 2
        fi
        PYTHON="$active/bin/python"
        check_python "$PYTHON"
        return
    fi
    local base="${PYTHON:-python3}"
    # Made whole or not at all: an interrupted 'python -m venv' leaves a folder without pip.
    if ! "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        check_python "$base"
        say "making a virtual environment in $ROOT/.venv"
        "$base" -m venv --clear "$ROOT/.venv"
    fi
    PYTHON="$ROOT/.venv/bin/python"
    check_python "$PYTHON"
}

# Where the environment imports the project from, when it is not standing in it: nothing, a clone or site-packages.
installed_from() {
    cd / && "$PYTHON" -c 'import s3prl_metaperser; print(s3prl_metaperser.__path__[0])' 2>/dev/null || true
}

# install EXTRAS: installs the project unless this environment has it, from this very folder and in this very state.
install() {
    local extras="$1" prefix state stamp
    prefix="$("$PYTHON" -c 'import sys; print(sys.prefix)')"
    stamp="$prefix/.s3prl-metaperser$extras"
    state="$ROOT ${METAPERSER_STACK:-stock} $(cat setup.py pyproject.toml | "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$state" && "$(installed_from)" == "$ROOT/s3prl_metaperser" ]]; then
        return
    fi
    say "installing into $prefix (the first time takes some minutes)"
    "$PYTHON" -m pip install --disable-pip-version-check -e ".$extras"
    printf '%s\n' "$state" >"$stamp"
}

demo() {
    install ""
    "$PYTHON" -u -m s3prl_metaperser.experiments.demo --out result/demo
}

# demo-entire [OPTION ...]: as for reproduce, paths that are given are relative to the folder that this was called in.
demo_entire() {
    install ""
    cd "$CALLED_FROM"
    "$PYTHON" -u -m s3prl_metaperser.experiments.demo_entire --out "$ROOT/result/demo-entire" "$@"
}

# reproduce IEMOCAP_ROOT [OPTION ...]: paths are relative to the folder that this was called in.
reproduce() {
    install ""
    cd "$CALLED_FROM"
    "$PYTHON" -u -m s3prl_metaperser.experiments.reproduce "$@"
}

# show_help MODULE: help needs no installation, since only the standard library is imported for it.
show_help() {
    local python="${PYTHON:-python3}"
    check_python "$python"
    PYTHONPATH="$ROOT" "$python" -m "s3prl_metaperser.experiments.$1" --help
}

# asks_for_help ARGUMENT ...: whether -h or --help is among the arguments.
asks_for_help() {
    local argument
    for argument in "$@"; do
        [[ "$argument" = -h || "$argument" = --help ]] && return
    done
    return 1
}

# Fails on what is no copy of IEMOCAP, nor a folder that holds one, before minutes go into an installation.
check_recordings() {
    if [[ -z "${1:-}" || "$1" = -* ]]; then
        say "error: reproduce needs the folder of IEMOCAP first: $0 reproduce IEMOCAP_ROOT --upstream wavlm_base ..."
        exit 2
    fi
    local folder
    for folder in "$1"/Session*/dialog/EmoEvaluation "$1"/*/Session*/dialog/EmoEvaluation; do
        [[ -d "$folder" ]] && return
    done
    say "error: $1 holds no Session1/dialog/EmoEvaluation; expected the folder IEMOCAP_full_release, or the one that holds it"
    exit 2
}

# Runs every check, whatever the others say, and fails if any did. pytest is last: its closing line closes the output.
run_tests() {
    install "[test]"
    local failed=()
    say "lint";   "$PYTHON" -m ruff check . || failed+=(lint)
    say "format"; "$PYTHON" -m ruff format --check . || failed+=(format)
    say "types";  "$PYTHON" -m mypy || failed+=(types)
    if ((${#failed[@]})); then
        say "failed so far: ${failed[*]} (see above)"
    fi
    # A thread each: two processes with a thread for every core take up to four times as long.
    say "tests";  OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder || failed+=(tests)
    ((${#failed[@]} == 0))
}

CALLED_FROM="$PWD"
case "${1:-}" in
    demo | test | setup)
        if (($# > 1)); then
            say "error: '$1' takes no arguments, but got: ${*:2}"
            exit 2
        fi ;;
    demo-entire)
        if asks_for_help "${@:2}"; then show_help demo_entire; exit 0; fi ;;
    reproduce)
        if asks_for_help "${@:2}"; then show_help reproduce; exit 0; fi
        check_recordings "${2:-}" ;;
    "" | -h | --help | help) usage; exit 0 ;;
    *) say "error: no subcommand '$1'"; usage >&2; exit 2 ;;
esac
choose_environment
cd "$ROOT"
case "$1" in
    demo) demo ;;
    demo-entire) demo_entire "${@:2}" ;;
    reproduce) reproduce "${@:2}" ;;
    test) run_tests ;;
    setup) install ""; say "installed; next: source $(dirname "$PYTHON")/activate && metaperser --help" ;;
esac
