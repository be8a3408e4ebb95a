"""Everything between a fresh checkout and a first run: `make setup`, and part of every target.

    1 virtual environment    .venv
    2 requirements           the pins of requirements.txt and constraints.txt
    3 repairs                of CMake files in the ROS wheels
    4 build                  messages and package, with colcon

Each step is announced, timed, and skipped when nothing that it depends on has changed. A set-up
that was cut off goes on where it stopped. Needs only the standard library.

This file is read by whatever `python3` is, so its syntax stays old; the parts that it imports
after the check need Python 3.10.
"""

import os
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 10), (3, 13)


def use_supported_python():
    """Go on in this interpreter, or in another of the machine that the ROS wheels exist for."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which("python3.%d" % minor)
        # A launcher that stands for no interpreter (pyenv's shims) ends with an error here.
        if other and os.system("'%s' -c '' >/dev/null 2>&1" % other) == 0:
            os.execv(other, [other] + sys.argv)
    sys.exit(
        "set-up: Python 3.10 to 3.13 is needed, this is %d.%d.\n"
        "  Debian 12, Ubuntu 24.04:  sudo apt-get install python3 python3-venv\n"
        "  another interpreter:      make PYTHON=/path/to/python3.12 ..." % sys.version_info[:2]
    )


def main(arguments):
    """Run the steps that are due. `--extra NAME` adds requirements-NAME.txt."""
    import argparse

    sys.path.insert(0, os.path.join(ROOT, "tools"))
    from prerequisites import missing_prerequisites
    from set_up_steps import SetUp, SetUpError

    parser = argparse.ArgumentParser(prog="set_up.py", description=__doc__.split("\n")[0])
    parser.add_argument("--extra", action="append", default=[], help="also requirements-EXTRA.txt")
    options = parser.parse_args(arguments)

    try:
        with SetUp(ROOT, extras=options.extra) as set_up:
            due = set_up.due()
            if not due:
                return 0
            problems = missing_prerequisites(
                ROOT, installing="requirements" in due, extras=options.extra
            )
            if problems:
                print("set-up: this machine lacks something:", file=sys.stderr)
                for problem in problems:
                    print("\n" + problem, file=sys.stderr)
                return 1
            set_up.run()
    except SetUpError as error:
        print("\nset-up stopped: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted: the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    use_supported_python()
    sys.exit(main(sys.argv[1:]))
