#!/usr/bin/env bash
# Tests that go through s3prl's runner, against the installed package alone: from a copy of the tests in a folder of
# its own, with nothing of the source tree on the path.
#
#   tests/robustness/runner_tests.sh PYTHON TEST_FILE[::TEST] ... [PYTEST_OPTION ...]
#
# PYTHON is an environment's, with this package, pytest and tensorboard in it. Where s3prl does not import without the
# launcher's stand-ins, METAPERSER_TEST_LAUNCHER=s3prl_metaperser.run_downstream has the launcher stand in for the stock
# command. Exit code: pytest's.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"

python="${1:?usage: $0 PYTHON TEST_FILE[::TEST] ... [PYTEST_OPTION ...]}"
shift
[[ "$python" = /* ]] || python="$PWD/$python"
apart="$(mktemp -d)"
trap 'rm -rf "$apart"' EXIT
mkdir "$apart/tests" "$apart/docs"
cp "$ROOT"/tests/*.py "$apart/tests"
cp "$ROOT/docs/upstreams.md" "$apart/docs" # which names the upstreams that one of the tests runs

cd "$apart/tests"
unset PYTHONPATH
export PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
"$python" - "$ROOT" <<'PYTHON'
import importlib.util
import sys

for name in ("s3prl_metaperser", "metaperser", "s3prl.downstream.metaperser.expert"):
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin.startswith(f"{sys.prefix}/"):
        sys.exit(f"{name} is not installed in {sys.prefix}: {spec and spec.origin}")
if sys.argv[1] in sys.path:
    sys.exit(f"the source tree {sys.argv[1]} is on the path")
PYTHON
"$python" -m pytest -q -p no:cacheprovider -W ignore::UserWarning "$@"
