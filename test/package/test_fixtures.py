"""The fixtures that every other test leans on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

HOLD = """
import time
from pathlib import Path
from librobot_vlm_ros.client.ros_domain import claimed_domain
with claimed_domain(Path({locks!r}), [5, 6]) as domain:
    print(domain, flush=True)
    time.sleep(60)
"""


def test_two_runs_get_different_domains_and_a_dead_one_gives_its_own_back(tmp_path: Path) -> None:
    script = HOLD.format(locks=str(tmp_path))
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        domains = [int(run.stdout.readline()) for run in runs if run.stdout]
        assert sorted(domains) == [5, 6]
        third = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "all 2 ROS domains are held" in third.stderr
        runs[0].kill()
        runs[0].wait()
        again = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        runs.append(again)
        assert again.stdout is not None
        assert int(again.stdout.readline()) == domains[0]
    finally:
        for run in runs:
            run.kill()
            run.wait()
            if run.stdout:
                run.stdout.close()


def test_child_processes_see_the_domain_and_stay_on_this_machine(
    ros_env: dict[str, str], ros_domain: int
) -> None:
    assert ros_env["ROS_DOMAIN_ID"] == str(ros_domain) == os.environ["ROS_DOMAIN_ID"]
    assert ros_env["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    assert 1 <= ros_domain <= 101


def test_a_process_is_ended_together_with_what_it_started(
    start_process: Callable[..., object], wait_until: Callable[..., object]
) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True); time.sleep(60)\n"
    )
    process = start_process(["python", "-c", script])
    output = process.wait_for_output("\n")  # type: ignore[attr-defined]
    child = int(output.split()[1])
    process.kill_group()  # type: ignore[attr-defined]

    def gone() -> bool:
        state = Path(f"/proc/{child}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    wait_until(gone, 5, "the grandchild to end")


def test_a_process_that_dies_early_fails_the_test_with_its_output(
    start_process: Callable[..., object],
) -> None:
    process = start_process(["python", "-c", "print('no camera'); raise SystemExit(2)"])
    with pytest.raises(pytest.fail.Exception, match=r"(?s)ended with 2.*no camera"):
        process.wait_for_output("ready", 20)  # type: ignore[attr-defined]


def test_waiting_in_vain_says_for_what(wait_until: Callable[..., object]) -> None:
    begun = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"waited 0\.1 s in vain for a result"):
        wait_until(lambda: False, 0.1, "a result")
    assert time.monotonic() - begun < 5


def test_ctrl_c_reaches_children_even_of_a_run_in_the_background(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # what a shell does to `command &`
        f"sys.path.insert(0, {str(CONFTEST.parent)!r})\n"
        "import os\n"
        "from pathlib import Path\n"
        "from conftest import RunningProcess\n"
        "code = 'import time; print(1, flush=True); time.sleep(60)'\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        "child = RunningProcess([sys.executable, '-c', code], log, dict(os.environ), None)\n"
        "child.wait_for_output('1')\n"
        "child.send(signal.SIGINT)\n"
        "print(child.wait(20))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "-2", done.stderr
