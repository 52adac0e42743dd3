"""What holds for every test: no network, no tokenizer threads, a data cache of its own."""

import os
import tempfile

_DATA_CACHE = tempfile.TemporaryDirectory(prefix="evomerge-tests-")  # removed at exit

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _DATA_CACHE.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings  # noqa: E402

settings.register_profile("same-every-time", deadline=None, derandomize=True)
settings.load_profile("same-every-time")
