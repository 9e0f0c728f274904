"""`--shard i/N`: what is one, and what it does not go together with."""

import pytest

from cache.errors import UsageError
from stages.runtime.shares import Worker, choose_worker


def test_a_shard_is_named_from_1_to_n(monkeypatch):
    assert choose_worker("2/8") == Worker(1, 8)
    for wrong in ("0/8", "9/8", "8", "a/b", "-1/3", ""):
        with pytest.raises(UsageError, match=r"expected i/N"):
            choose_worker(wrong)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert choose_worker(None) == Worker(1, 2)
    with pytest.raises(UsageError, match="under torchrun"):
        choose_worker("1/2")
