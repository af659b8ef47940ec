"""Other people's weights in, ours out: Hugging Face's folders of safetensors, and GGUF files.

A model of a known family is the one decoder under some settings (``families``), and its tensors are
the decoder's under other names (``tensors``).
"""

from lm.interop.families import from_transformers, to_transformers
from lm.interop.folder import Folder, write_folder
from lm.interop.gguf_file import GgufFile
from lm.interop.tensors import load, pieces

__all__ = [
    "Folder",
    "GgufFile",
    "from_transformers",
    "load",
    "pieces",
    "to_transformers",
    "write_folder",
]
