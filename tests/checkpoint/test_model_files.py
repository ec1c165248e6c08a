"""What `model` may name: a directory, or a model of HuggingFace's hub. Nothing here reaches the network."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxserve import EngineConfig
from jaxserve.checkpoint.huggingface import read_config
from jaxserve.checkpoint.model_files import find_model
from jaxserve.checkpoint.safetensors_files import SafetensorsDirectory
from jaxserve.errors import InputError

HUB_ID = "owner/model-1.5"


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        find_model(*arguments, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that gives what it is told to, and keeps what it was asked."""

    class Hub:
        asked: Any = None
        error: Exception | None = None

        def __call__(self, hub_id: str, **options: Any) -> str:
            self.asked = hub_id, options
            if self.error:
                raise self.error
            return str(tmp_path)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_hub_id_is_downloaded_at_its_revision(hub: Any, tmp_path: Path) -> None:
    files = find_model(HUB_ID, revision="0a1b2c")
    assert (files.name, files.weights, files.config) == (HUB_ID, tmp_path, tmp_path)
    assert hub.asked[0] == HUB_ID
    assert hub.asked[1]["revision"] == "0a1b2c"


def test_weights_are_downloaded_only_where_they_are_wanted(hub: Any) -> None:
    for with_weights in (True, False):
        find_model(HUB_ID, with_weights=with_weights)
        assert ("*.safetensors" in hub.asked[1]["allow_patterns"]) == with_weights
        assert "*.json" in hub.asked[1]["allow_patterns"]


@pytest.mark.usefixtures("hub")
def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / HUB_ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model(HUB_ID).weights == Path(HUB_ID)
    assert "revision='main'" in refusal(HUB_ID, revision="main")


def test_what_is_neither_directory_nor_hub_id_is_refused(tmp_path: Path) -> None:
    assert "no model directory /no/such/place" in refusal("/no/such/place")
    assert "no model directory a/b/c" in refusal("a/b/c")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(str(tmp_path / "file"))


def test_without_a_network_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("jaxserve-tests/not-there", revision="v1")
    assert "cannot be reached" in message
    assert "'v1'" in message


class _Response:
    status_code, headers, request = 404, {}, None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError("no", response=_Response()), "accept"),
        (errors.RepositoryNotFoundError("no", response=_Response()), "neither a directory"),
        (errors.RevisionNotFoundError("no", response=_Response()), "no revision"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(hub: Any, error: Exception, said: str) -> None:
    hub.error = error
    assert said in refusal(HUB_ID)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"save_pretrained") as refused:
        SafetensorsDirectory(tmp_path)
    assert name in str(refused.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="auto_map"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="never run"):
        EngineConfig.from_settings({"trust_remote_code": True})
