"""No network is used unless weights are asked for that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import socket, sys

def refuse(*args, **options):
    print("the network was asked for", args, file=sys.stderr)
    sys.exit(9)

def audit(event, args):  # also what goes round Python's own socket class
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        refuse(event, args)

sys.addaudithook(audit)
from librobot_vlm_ros.models import create_vlm

vlm = create_vlm(sys.argv[1], **({} if sys.argv[1] == "fake" else {"device": "cpu"}))
vlm.warm_up()
print("made", vlm.name)
"""
BLOCKED = "import socket; socket.create_connection(('127.0.0.1', 9))"


@pytest.mark.parametrize("name", ["fake", "florence-2-tabletop"])
def test_a_model_that_ships_is_made_without_a_network(name: str) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"made {name}"


def test_the_guard_of_this_test_sees_the_network() -> None:
    script = SCRIPT.split("from librobot")[0] + BLOCKED
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
