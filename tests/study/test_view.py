"""What a reader sees of a study before its first trial, and after its first baseline."""

import pytest

from evomerge.errors import StudyError
from evomerge.space.decode import decode
from evomerge.space.genome import Genome
from evomerge.study.storage import open_storage
from evomerge.study.view import StudyView
from tests.study.fakes import make_setup

FIXED = {"state", "baseline", "objective", "stderr", "recipe_hash"}


@pytest.fixture
def study(tmp_path):
    """A study that has begun and holds no trial: its setup and its storage."""
    setup = make_setup(tmp_path)
    storage = open_storage(setup.config.study, create=True)
    storage.set_attribute("spec", {})
    return setup, storage


def test_a_study_without_trials_gives_empty_frames(study):
    view = StudyView(study[0].config)
    trials, baselines = view.trials, view.baselines
    assert (len(trials), trials.index.name, set(trials.columns)) == (0, "trial", FIXED)
    assert (len(baselines), baselines.index.name) == (0, "baseline")
    assert set(baselines.columns) == FIXED - {"baseline"}
    assert view.items().empty


def test_a_study_without_trials_has_no_trial_to_give(study):
    view = StudyView(study[0].config)
    with pytest.raises(StudyError, match=r"^study 's': there is no trial yet\."):
        view.trial(0)
    with pytest.raises(StudyError, match="no candidate has been scored yet"):
        _ = view.best


def test_an_open_baseline_has_exactly_the_fixed_columns(study):
    setup, storage = study
    recipe = decode(setup.space, Genome((0.5, 0.5)), setup.template)
    storage.add_baseline("uniform", recipe)
    view = StudyView(setup.config)
    assert set(view.trials.columns) == FIXED
    assert view.baselines.loc["uniform", "recipe_hash"] == recipe.hash
    assert view.trial(0).baseline == "uniform"
    with pytest.raises(StudyError, match="there is no trial 1; it has 0 to 0"):
        view.trial(1)
