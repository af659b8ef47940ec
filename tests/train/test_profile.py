"""The steps that are traced."""

import pytest

from lm.command import BadInput
from lm.train.profile import Profile, profile_range


def test_a_range_is_two_steps():
    assert profile_range("10:20") == (10, 20)
    for text in ("", "10", "20:10", "10:10", "-1:5", "a:b", "1:2:3"):
        with pytest.raises(BadInput, match=f"--profile={text}: must be FIRST:LAST, two steps"):
            profile_range(text)


def test_steps_that_a_run_does_not_have_are_refused(tmp_path):
    profile = Profile(tmp_path, (10, 20))
    profile.check(20)
    with pytest.raises(BadInput, match="--profile=10:20: must lie within the run's steps, 0:19"):
        profile.check(19)
    Profile(tmp_path, None).check(1)


def test_a_run_that_goes_on_beyond_them_has_no_trace_and_says_so(tmp_path, capsys):
    profile = Profile(tmp_path, (10, 20))
    profile.go_on(10)
    assert profile.steps == (10, 20) and not capsys.readouterr().err
    profile.go_on(11)
    assert profile.steps == ()
    assert "no trace: the run goes on from step 11" in capsys.readouterr().err
