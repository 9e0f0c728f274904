"""The interface of an engine: a model and requests of token ids in, the token ids of each completion out, as they finish."""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from cache.errors import MachineError
from stages.generation.requests import EngineOptions, Model, Request, Sampling

EngineName = Literal["vllm", "transformers"]


class EngineError(MachineError):
    """An engine that does not start, or stopped."""


class Engine(Protocol):
    """Something that completes token ids. It keeps a model loaded until the next one, or until it is closed."""

    name: EngineName

    def complete(
        self, model: Model, requests: Sequence[Request], sampling: Sampling, options: EngineOptions
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the place of a request and its token ids with the stop token, in the order in which they finish.

        The temperature is that of each request. Raises `EngineError`.
        """
        ...
