"""One root seed, many independent named streams."""

import hashlib


def stream_seed(root: int, *names: str) -> int:
    """Derive the seed of a named stream from the root seed of a run.

    The same root and names give the same seed in every process and on every machine; different
    names give independent streams (SHA-256 of the names under the root).

    Args:
        root: The run's own seed, any integer.
        names: What the stream is for, from general to special, e.g. `"items", "gsm8k"`.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join((str(root), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
