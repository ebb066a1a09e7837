#!/usr/bin/env bash
# All tests: the pure ones on every core, then those that run devices, nodes and graphs in real time,
# one at a time. Whatever else the machine does can break those, so what failed of them is tried once
# more in a new process. A test that hangs or crashes costs its worker, which is replaced.
#
#   scripts/test.sh            scripts/test.sh -k netft
set -uo pipefail

failed=1 none=5 # pytest's exit codes for a failed test and for none selected

OMP_NUM_THREADS=1 python -m pytest -m "not live" --numprocesses logical --dist loadfile "$@"
pure=$?
python -m pytest -m live --numprocesses 1 "$@"
live=$?
if [ "$live" = "$failed" ]; then
    echo "test: once more what failed of the live tests"
    python -m pytest -m live --numprocesses 1 --last-failed "$@"
    live=$?
fi
[ "$pure" = "$none" ] && exit "$live"
[ "$live" = "$none" ] && exit "$pure"
exit "$((pure ? pure : live))"
