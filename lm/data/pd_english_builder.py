"""``pd_english`` as a TFDS data set: ``{text, source, name}`` in array_record files."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from lm.data import pd_english


class PdEnglish(tfds.core.GeneratorBasedBuilder):
    """Builds from the archives in the folder ``archives``, fetching what is missing there."""

    VERSION = tfds.core.Version(pd_english.VERSION)

    def __init__(self, *, archives: Path, **kwargs):
        self._archives = archives
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("text", "source", "name")}
        return self.dataset_info_from_configs(
            description=pd_english.__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # pip is the one that downloads
        pd_english.fetch(self._archives)
        return {"train": self._generate_examples(self._archives)}

    def _generate_examples(self, archives: Path) -> Iterator[tuple[str, dict]]:
        for source, name, text in pd_english.documents(archives):
            yield f"{source}/{name}", {"text": text, "source": source, "name": name}


def data_source(data_dir: Path) -> Sequence[dict]:
    """All examples, their values in bytes, as a random-access sequence; built where missing."""
    tfds.disable_progress_bar()
    builder = PdEnglish(archives=data_dir / "archives", data_dir=data_dir / "tfds")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports its own folders at length
        builder.download_and_prepare()
    return builder.as_data_source(split="train")
