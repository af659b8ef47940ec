"""The steps that are traced."""

import pytest

from lm.command import BadInput
from lm.train.profile import Profile, profile_range


def test_a_range_is_two_steps():
    assert profile_range("10:20") == (10, 20)
    for text in ("", "10", "20:10", "10:10", "-1:5", "a:b", "1:2:3"):
        with pytest.raises(BadInput, match=f"--profile={text}: must be FIRST:LAST, two steps"):
            profile_range(text)


@pytest.mark.parametrize("step, n_steps", [(0, 19), (11, 100)])
def test_steps_that_are_not_to_be_done_are_refused(tmp_path, step, n_steps):
    profile = Profile(tmp_path, (10, 20))
    profile.check(10, 20)
    with pytest.raises(BadInput, match=f"--profile=10:20: must lie within .* {step}:{n_steps}"):
        profile.check(step, n_steps)
    Profile(tmp_path, None).check(step, n_steps)
