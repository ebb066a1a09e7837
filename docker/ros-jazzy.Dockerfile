# GenForce on an apt ROS 2 Jazzy. From the repository root:
#   docker build -f docker/ros-jazzy.Dockerfile -t genforce:ros-jazzy .
FROM ros:jazzy-ros-base

# The base image says which release these come from.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /genforce
COPY . .

# setup.sh sees the sourced ROS and builds on it instead of on wheels.
SHELL ["/bin/bash", "-c"]
RUN source /opt/ros/jazzy/setup.bash && make setup

COPY docker/entrypoint.sh /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["genforce", "doctor"]
