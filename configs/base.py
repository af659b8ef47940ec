"""Every setting with its default. Other configs start from here and change what they need."""

from lm.config import Config, to_config_dict


def get_config():
    """The defaults of ``lm.config``, locked and overridable."""
    return to_config_dict(Config())
