# Source this to use GenForce: `source setup.bash` gives genforce, rclpy and the messages.
# An apt ROS 2 that was sourced before stays underneath; without one, the one in .venv is used.
_genforce_root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ ! -e "$_genforce_root/ros2_ws/install/local_setup.bash" ]; then
    echo "genforce: not set up yet; run 'make setup' in $_genforce_root" >&2
    return 1 2>/dev/null || exit 1
fi
if [ -x "$_genforce_root/.venv/bin/python" ]; then
    export VIRTUAL_ENV="$_genforce_root/.venv"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
    if [ "${ROS_DISTRO:-wheels}" = wheels ]; then
        export ROS_DISTRO=wheels
        export AMENT_PREFIX_PATH="$VIRTUAL_ENV"
        # The wheels would re-execute python once to set this; saying it here saves that.
        export LD_LIBRARY_PATH="$VIRTUAL_ENV/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        for _genforce_libs in "$VIRTUAL_ENV"/lib/python3.*/site-packages/ros_*.libs; do
            [ -d "$_genforce_libs" ] && LD_LIBRARY_PATH="$_genforce_libs:$LD_LIBRARY_PATH"
        done
        export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1
    fi
fi
# Discovery stays on this machine unless the user has said otherwise.
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
# Processes find each other within half a second; Fast DDS 2 reads the first name, 3 the second.
_genforce_dds="$_genforce_root/launch/config/fastdds.xml"
export FASTRTPS_DEFAULT_PROFILES_FILE="${FASTRTPS_DEFAULT_PROFILES_FILE:-$_genforce_dds}"
export FASTDDS_DEFAULT_PROFILES_FILE="${FASTDDS_DEFAULT_PROFILES_FILE:-$_genforce_dds}"
source "$_genforce_root/ros2_ws/install/local_setup.bash"
# Tab completion, in a terminal that has it.
if [ -n "${PS1:-}" ] && command -v register-python-argcomplete >/dev/null; then
    eval "$(register-python-argcomplete genforce)"
fi
unset _genforce_root _genforce_libs _genforce_dds
