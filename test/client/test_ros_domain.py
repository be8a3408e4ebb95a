"""Runs that isolate themselves get domains of their own and put the environment back."""

from __future__ import annotations

import os

import pytest

from librobot_vlm_ros.client.ros_domain import isolated_ros


def test_two_at_once_get_two_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "5")
    monkeypatch.setenv("ROS_STATIC_PEERS", "192.168.0.7")
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    with isolated_ros() as first:
        assert os.environ["ROS_DOMAIN_ID"] == str(first)
        assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
        assert "ROS_STATIC_PEERS" not in os.environ  # it would reach other machines
        with isolated_ros() as second:
            assert second != first
    assert os.environ["ROS_DOMAIN_ID"] == "5"
    assert os.environ["ROS_STATIC_PEERS"] == "192.168.0.7"
    assert "ROS_AUTOMATIC_DISCOVERY_RANGE" not in os.environ


def test_a_domain_is_free_again_afterwards() -> None:
    with isolated_ros() as first:
        pass
    with isolated_ros() as again:
        assert again == first
