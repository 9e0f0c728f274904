"""A judge that is a language model behind an OpenAI-compatible chat endpoint: it compares two texts.

Requests, their retries and the waiting between them are those of the `openai` package. The API key is read from an
environment variable when the first request is made, and is neither stored nor shown.
"""

import importlib.util
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from threading import Event
from typing import Any

from cache.errors import AlignError, MachineError, UsageError
from stages.judge.contract import Answer, Keep, Question
from stages.judge.template import JudgeTemplate
from stages.settings.judge import JudgeSettings

# Waiting between replies that are no chat completion, as the package waits after 5xx.
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 8.0
SHOWN_REPLY = 200
NO_KEY = "none"  # the package wants one


@dataclass(frozen=True)
class EndpointJudge:
    """Compares two texts by the reply of a language model; `url` ends with /v1."""

    url: str
    settings: JudgeSettings
    template: JudgeTemplate
    compares: bool = True

    @classmethod
    def of(cls, settings: JudgeSettings) -> "EndpointJudge":
        """The judge of the settings; raises `AlignError` where the package, the address or the key is missing."""
        if importlib.util.find_spec("openai") is None:
            raise MachineError(
                "judge.endpoint needs openai, which is not installed. Install it with: pip install -e '.[judge]'"
            )
        url = settings.endpoint or ""
        if not url.startswith(("http://", "https://")):
            raise UsageError(
                f"judge.endpoint is {url}; expected an address such as http://localhost:8000/v1."
            )
        return cls(url.rstrip("/"), settings, JudgeTemplate.of(settings.template))

    @cached_property
    def model(self) -> str:
        """The model's name there; raises `UsageError` if it is not set and there are several."""
        if self.settings.endpoint_model:
            return self.settings.endpoint_model
        try:
            names = [model.id for model in self._client.models.list()]
        except Exception as error:
            raise self._failed(error) from error
        if len(names) != 1:
            raise UsageError(
                f"{self.url} has {len(names)} models ({', '.join(names[:5])}). Name one with --set judge.endpoint_model=NAME."
            )
        return names[0]

    @property
    def name(self) -> str:
        """The last part of the model's name."""
        return self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint, the model's name there, the question and how the reply is sampled."""
        return {
            "kind": "endpoint",
            "endpoint": self.url,
            "model": self.model,
            "template": self.template.identity,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask several questions at a time.

        Replies to requests that are under way when one fails for good, or at an interruption, are waited for and kept: they
        are paid for.
        """
        _ = self._client  # without a key no request is made

        ended = Event()

        def work(place: int, question: Question) -> None:
            if ended.is_set():
                return
            try:
                keep([(place, self._ask(question))])
            except BaseException:
                ended.set()  # here, for this thread asks its next question before the main thread hears of it
                raise

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            running = [pool.submit(work, place, question) for place, question in enumerate(questions)]
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                ended.set()
                raise

    def _ask(self, question: Question) -> Answer:
        from openai import BadRequestError, UnprocessableEntityError

        try:
            response = self._response(question)
        except (BadRequestError, UnprocessableEntityError) as error:
            # Such as a pair that is too long for the model: the others go on.
            return Answer(None, f"the endpoint refused the question: {self._said(error)}", final=False)
        except AlignError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return self._read(response)

    def _response(self, question: Question) -> Any:
        """The chat completion; what is none is asked for again, as after 5xx."""
        sampling = {} if self.settings.temperature is None else {"temperature": self.settings.temperature}
        problem, wait = "", FIRST_WAIT_SECONDS
        for attempt in range(self.settings.max_retries + 1):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            try:
                response = self._client.chat.completions.create(
                    model=self.model,
                    messages=self.template.messages(question),
                    max_completion_tokens=self.settings.max_tokens,
                    **sampling,
                )
            except ValueError as error:  # no JSON
                problem = _one_line(error)
                continue
            if getattr(response, "choices", None):
                return response
            problem = _one_line(response)
        raise MachineError(
            f"{self.url} replied with what is no chat completion, {self.settings.max_retries + 1} times: {problem}. {KEPT}"
        )

    def _read(self, response: Any) -> Answer:
        choice, usage = response.choices[0], response.usage
        reply = choice.message.content or ""
        value = self.template.verdict(reply)
        problem = None
        if value is None:
            cut = (
                f", cut off at judge.max_tokens={self.settings.max_tokens}"
                if choice.finish_reason == "length"
                else ""
            )
            problem = f"no verdict, or more than one, in the reply{cut}: {_one_line(reply) or 'it is empty'}"
        return Answer(
            value,
            problem,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            reply,
        )

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI

        variable = self.settings.api_key_variable
        if variable is not None and not os.environ.get(variable):
            raise UsageError(
                f"The environment variable {variable}, which judge.api_key_variable names, is not set."
            )
        return OpenAI(
            base_url=self.url,
            api_key=os.environ[variable] if variable else NO_KEY,
            max_retries=self.settings.max_retries,
            timeout=self.settings.timeout_seconds,
        )

    def _said(self, error: Exception) -> str:
        """What an error says, without the key that some servers repeat."""
        return _one_line(str(error).replace(self._client.api_key, "***"))

    def _failed(self, error: Exception) -> AlignError:
        """The error for a request that is not tried again."""
        status = getattr(error, "status_code", None)
        said = f"{self.url}: {self._said(error)}"
        if status in (401, 403):
            variable = self.settings.api_key_variable
            where = f"Is the key in {variable} valid?" if variable else "Does it need judge.api_key_variable?"
            return UsageError(f"The endpoint refuses access. {said}. {where}")
        if status == 404:
            return UsageError(
                f"The endpoint has no such address or model. {said}. Check judge.endpoint (with /v1) and judge.endpoint_model."
            )
        tried = (
            f"after {self.settings.max_retries} retries" if self.settings.max_retries else "without a retry"
        )
        return MachineError(f"The endpoint gives no answer, {tried}. {said}. {KEPT}")


KEPT = "What was answered before is kept: type the same command again."


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_REPLY else text[: SHOWN_REPLY - 3] + "..."
