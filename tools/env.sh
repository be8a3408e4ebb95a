# Source this in bash for a shell in which the set-up's ROS 2, this package and its messages work:
#     source tools/env.sh
# It is the environment of `make test` and `make demo`. On a robot with an ordinary ROS 2
# installation it is not needed: source /opt/ros/<distro>/setup.bash and the workspace instead.

_vlm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_vlm_venv="$_vlm_root/.venv"

# What another sourced ROS left would be mixed with the wheels: two rclpy, two sets of messages.
unset PYTHONPATH PYTHONHOME ROS_DISTRO ROS_VERSION ROS_PYTHON_VERSION RMW_IMPLEMENTATION
unset COLCON_PREFIX_PATH COLCON_CURRENT_PREFIX AMENT_CURRENT_PREFIX

case ":$PATH:" in
  *":$_vlm_venv/bin:"*) ;;
  *) export PATH="$_vlm_venv/bin:$PATH" ;;
esac
export VIRTUAL_ENV="$_vlm_venv"
export AMENT_PREFIX_PATH="$_vlm_venv"
export CMAKE_PREFIX_PATH="$_vlm_venv"
LD_LIBRARY_PATH="$_vlm_venv/lib"
for _vlm_libs in "$_vlm_venv"/lib/python3*/site-packages/ros_*.libs; do
  LD_LIBRARY_PATH="$LD_LIBRARY_PATH:$_vlm_libs"
done
export LD_LIBRARY_PATH
# Otherwise a .pth file of the wheels runs the interpreter a second time to set this up.
export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1
# Nothing here leaves the machine unless a caller asks for it.
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

# `. tools/env.sh wheels` leaves this package out: the environment to build it in.
if [ "${1:-}" != wheels ] && [ -f "$_vlm_root/install/setup.bash" ]; then
  . "$_vlm_root/install/setup.bash"  # librobot-vlm, too
fi
# The checkout first: edits count at once, and the messages are found beside it (see __init__.py).
export PYTHONPATH="$_vlm_root${PYTHONPATH:+:$PYTHONPATH}"

unset _vlm_root _vlm_venv _vlm_libs
