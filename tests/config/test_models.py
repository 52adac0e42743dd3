"""References to models: string and mapping forms, adapters, relative paths."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.config.models import FolderRef, ModelRef

PLAIN = st.tuples(st.sampled_from("aX0."), st.text("bY1./-_", max_size=5)).map("".join)
FOLDERS = st.builds(FolderRef, path=PLAIN, revision=st.none() | PLAIN)
MODELS = st.builds(ModelRef, path=PLAIN, revision=st.none() | PLAIN, adapter=st.none() | FOLDERS)


@given(MODELS)
def test_the_string_form_says_everything(reference):
    assert ModelRef.model_validate(str(reference)) == reference
    assert ModelRef.model_validate(reference.model_dump(mode="json")) == reference
    assert pickle.loads(pickle.dumps(reference)) == reference


FULL = ModelRef(path="org/a", revision="v1", adapter=FolderRef(path="org/b", revision="main"))


@pytest.mark.parametrize(
    "written",
    [
        "org/a@v1+org/b@main",
        {"path": "org/a", "revision": "v1", "adapter": "org/b@main"},
        {"path": "org/a", "revision": "v1", "lora": {"path": "org/b", "revision": "main"}},
        {"model": "org/a@v1", "lora": "org/b@main"},
        {
            "model": {"path": "org/a", "revision": "v1"},
            "lora": {"path": "org/b", "revision": "main"},
        },
    ],
)
def test_all_forms_of_mergekit_and_ours_are_read(written):
    assert ModelRef.model_validate(written) == FULL
    assert FULL.without_adapter == ModelRef(path="org/a", revision="v1")


@pytest.mark.parametrize("written", ["a+b+c", "+b", "a+"])
def test_several_adapters_and_half_references_are_refused(written):
    with pytest.raises(ValidationError, match="a model, or a model and one adapter"):
        ModelRef.model_validate(written)


@pytest.mark.parametrize(
    "written",
    [
        {"model": {"path": "a", "revision": "x"}, "revision": "y"},
        {"model": "a", "path": "b"},
        {"path": "a", "lora": "b", "adapter": "c"},
        {"path": "a", "adapter": "b+c", "override_architecture": "Llama"},
    ],
)
def test_what_is_said_twice_or_not_known_is_refused(written):
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModelRef.model_validate(written)


def test_paths_of_model_and_adapter_are_read_from_the_config(tmp_path):
    (tmp_path / "near").mkdir()
    placed = ModelRef.model_validate("./m+near@x").relative_to(tmp_path)
    assert str(placed) == f"{tmp_path}/m+{tmp_path}/near@x"
    hub = ModelRef.model_validate("org/a@v1+org/b@main")
    assert hub.relative_to(tmp_path) == hub


@pytest.mark.parametrize("name", ["a+b", "a@b", "a+b@c"])
def test_a_folder_whose_name_holds_a_separator_is_that_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    placed = ModelRef.model_validate(f"./{name}").relative_to(tmp_path)
    assert (placed.path, placed.revision, placed.adapter) == (str(tmp_path / name), None, None)
    assert ModelRef.model_validate(str(placed)) == placed
