import pytest

from lm.checkpoint import check_shared, claim
from lm.command import BadInput
from lm.config import Config


def test_a_host_that_sees_another_folder_than_process_0_is_told_so(tmp_path):
    with pytest.raises(BadInput, match="need a folder that all hosts share"):
        check_shared(tmp_path)
    claim(tmp_path, Config())
    check_shared(tmp_path)
