"""The node reads weights only from where its operator allows, whatever a client asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.core import ErrorCode, VlmError
from librobot_vlm_ros.models.checkpoints.hub import shipped_folder
from librobot_vlm_ros.models.checkpoints.path_policy import open_to_clients
from librobot_vlm_ros.ros.parameters.settings import Settings


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with `mine` in it, and `secret` beside it."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return tmp_path / "models"


def test_with_a_list_only_the_list_counts(models: Path) -> None:
    assert open_to_clients([str(models)], "/usr/share") == (models.resolve(),)
    settings = Settings(weights_folders=(str(models),), weights=str(models / "mine"))
    assert settings.weights == str(models / "mine")
    for weights in (str(models.parent / "secret"), str(shipped_folder() / "florence_2_tabletop")):
        with pytest.raises(VlmError) as caught:
            Settings(weights_folders=(str(models),), weights=weights)
        assert caught.value.code == ErrorCode.PATH_NOT_ALLOWED
    assert Settings(weights=str(models.parent / "secret")).weights  # the operator's own choice


def test_digests_are_checked_as_parameters() -> None:
    digest = "AB" * 32
    assert Settings(weights_sha256=(digest,)).weights_sha256 == (digest.lower(),)
    with pytest.raises(VlmError) as caught:
        Settings(weights_sha256=("abc",))
    assert caught.value.code == ErrorCode.BAD_PARAMETER


@pytest.mark.ros
def test_a_client_cannot_lead_the_node_out_of_the_folders(start_vlm: Any, models: Path) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    (models / "out").symlink_to(models.parent / "secret")
    vlm = start_vlm(model="fake", weights_folders=[str(models)], weights=str(models / "mine"))
    secret = str(models.parent / "secret")
    (reason,) = vlm.set_parameters(weights=secret)
    assert "PATH_NOT_ALLOWED" in reason
    (reason,) = vlm.set_parameters(weights_folders=["/"])
    assert "read-only" in reason
    for key in ("adapter", "mask_decoder"):
        (reason,) = vlm.set_parameters(model_config=json.dumps({key: secret}))
        assert f"PATH_NOT_ALLOWED(605): a path in model_config '{secret}'" in reason
        allowed = json.dumps({key: str(models / "mine")})
        assert vlm.set_parameters(model_config=allowed) == []
    assert vlm.set_parameters(model_config="") == []
    assert vlm.set_parameters(weights_folders=[str(models)]) == []  # as `ros2 param load` does
    assert vlm.set_parameters(weights="owner/name") == []
    assert vlm.change_state("configure")
    for weights in (secret, str(models / "out"), "/etc", str(models / "nowhere" / ".." / "..")):
        response = vlm.call(SwitchModel, "switch_model", model="fake", weights=weights)
        assert (response.success, response.error_code) == (False, 605), response.error_msg
    response = vlm.call(SwitchModel, "switch_model", model="fake", weights=str(models / "mine"))
    assert response.success, response.error_msg


@pytest.mark.ros
def test_weights_of_another_digest_are_not_loaded_and_not_switched_to(start_vlm: Any) -> None:
    from librobot_vlm_ros.srv import SwitchModel

    from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256

    vlm = start_vlm(model="florence-2-tabletop", device="cpu", weights_sha256=["0" * 64])
    assert not vlm.change_state("configure", 60.0)
    assert "CHECKSUM_MISMATCH(315)" in vlm.log()
    assert vlm.set_parameters(model="fake") == []
    assert vlm.change_state("configure")
    switch = {"model": "florence-2-tabletop"}
    response = vlm.call(SwitchModel, "switch_model", 60.0, **switch)
    assert (response.error_code, response.active) == (315, "fake")
    assert vlm.change_state("cleanup")
    digest = weights_sha256(shipped_folder() / "florence_2_tabletop")
    assert vlm.set_parameters(weights_sha256=[digest]) == []
    assert vlm.change_state("configure")
    response = vlm.call(SwitchModel, "switch_model", 60.0, **switch)
    assert response.success, response.error_msg
