"""Folders and hub ids; the hub is a hand-made cache, or raises what its library raises."""

import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from evomerge.checkpoints.locate import locate, locate_adapter
from evomerge.config.models import ModelRef
from evomerge.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def message_of(path, revision=None):
    with pytest.raises(CheckpointError) as caught:
        locate(ModelRef(path=str(path), revision=revision))
    return str(caught.value)


def test_a_folder_is_returned_as_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "m", "./m", "~/m"):
        assert locate(ModelRef(path=str(path))).resolve() == tmp_path / "m"


def test_folders_that_are_not_models_are_named(tmp_path):
    assert message_of(tmp_path / "none").startswith(f"{tmp_path}/none: there is no such folder.")
    (tmp_path / "file").touch()
    assert "is a file. Give the folder that holds it." in message_of(tmp_path / "file")
    assert f"{tmp_path}: holds no config.json (it has file)." in message_of(tmp_path)
    assert "revision 'v1' is for hub ids only" in message_of(tmp_path, "v1")


def test_folders_do_not_need_the_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from evomerge.checkpoints.locate import locate; "
        "from evomerge.config.models import ModelRef; "
        f"print(locate(ModelRef(path={str(tmp_path)!r})), 'huggingface_hub' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(tmp_path), "False"]


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_without_the_model_says_so(offline_cache):
    message = message_of("org/a", "v1")
    assert message.startswith(
        f"org/a@v1: is not, or not completely, in the cache {offline_cache}, "
    )
    assert "and HF_HUB_OFFLINE is set. Download it where there is a network" in message


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_offline_with_the_model_in_the_cache_finds_it(offline_cache, weights):
    repo = offline_cache / "models--org--a"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    assert "org/a: holds no config.json (it has nothing)." in message_of("org/a")
    (snapshot / "config.json").write_text("{}")
    (snapshot / weights).touch()
    assert locate(ModelRef(path="org/a")) == snapshot
    assert locate(ModelRef(path="org/a", revision=COMMIT)) == snapshot


def test_a_name_that_is_no_hub_id_is_named(offline_cache):
    assert message_of("a/b/c").startswith(
        "a/b/c: is neither a folder here nor a hub id. Write owner/"
    )


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            errors.GatedRepoError,
            "is gated. Ask for access at https://huggingface.co/org/a, then run",
        ),
        (
            errors.RepositoryNotFoundError,
            "is neither a folder here nor a model you may see on the hub",
        ),
        (
            errors.RevisionNotFoundError,
            "the model has no revision 'v1'. Its revisions are listed at",
        ),
        (
            errors.LocalEntryNotFoundError,
            "and the hub cannot be reached. Download it where there is",
        ),
        (TimeoutError, "could not be downloaded into "),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, what):
    def refuse(*args, **kwargs):
        raise error.__new__(error, "first line\nsecond line")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = message_of("org/a", "v1")
    assert message.startswith("org/a@v1: ")
    assert what in message
    assert "\n" not in message


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_of_the_hub_is_found_with_its_own_revision(tmp_path, monkeypatch, file):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, file in allow_patterns))
        (tmp_path / "adapter_config.json").write_text("{}")
        if file in allow_patterns:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ref = ModelRef.model_validate("org/a@v1+org/lora@v2")
    assert locate_adapter(ref.adapter) == tmp_path
    assert asked[-1] == ("org/lora", "v2", True)
    with pytest.raises(CheckpointError, match=r"^org/a@v1: holds no config\.json .*an adapter"):
        locate(ref)


@pytest.mark.parametrize(("held", "calls"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_pickles_are_asked_for_only_without_safetensors(tmp_path, monkeypatch, held, calls):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / held).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate(ModelRef(path="org/a")) == tmp_path
    assert len(asked) == calls
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True][:calls]
    assert all({"*.json", "*.jinja", "*.model"} <= set(patterns) for patterns in asked)
