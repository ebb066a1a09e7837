#!/bin/bash
# Everything in the image runs with ROS and the workspace sourced.
set -e
[ -f /opt/ros/jazzy/setup.bash ] && source /opt/ros/jazzy/setup.bash
source /genforce/setup.bash
exec "$@"
