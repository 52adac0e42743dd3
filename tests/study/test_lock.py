"""One driver per study; the lock goes with its holder, however it dies."""

import os
import signal
import subprocess
import sys

import pytest

from evomerge.errors import StudyError
from evomerge.study.lock import study_lock

HOLD = """
import sys
from pathlib import Path
from evomerge.study.lock import study_lock
with study_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    refusal = rf"in use by another search \(process {holder.pid} on"
    with pytest.raises(StudyError, match=refusal), study_lock(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with study_lock(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    refusal = r"study\.folder: .* cannot be written"
    with pytest.raises(StudyError, match=refusal), study_lock(tmp_path / "file" / "study"):
        pass
