"""Target: the service under load, asked for its model, for second computations and to clean up."""

from __future__ import annotations

from typing import Any

from carry_client import Carry, ModelDescription, Problem, Retry, model_path, read_description

TIMEOUT_S = 120.0
RETRY_S = 30.0
STAGES = ("queue", "load", "infer", "commit")


def read_server_timing_ms(header: str | None) -> dict[str, float]:
    """The service's stages in a Server-Timing header, in milliseconds; empty unless it has all."""
    entries = (entry.strip().partition(";dur=") for entry in (header or "").split(","))
    stages = {name: float(ms) for name, _, ms in entries if name in STAGES and ms}
    return stages if len(stages) == len(STAGES) else {}


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


class Target:
    """A running service at one address; every failure is a LoadError."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._carry = Carry(self.url, timeout_s=TIMEOUT_S, encoding="json")
        except Problem as problem:
            raise LoadError(f"--url: {problem.detail}") from problem

    def describe(self, model: str | None) -> ModelDescription:
        """The model of that name; without one, the only one that is served."""
        try:
            served = [each["name"] for each in self.request("GET", "/v1/models")["models"]]
            if model not in served and (model or len(served) != 1):
                wanted = f"--model {model}: served are" if model else "--model: choose one of"
                raise LoadError(f"{wanted} {', '.join(served) or 'none'}")
            return read_description(self.request("GET", model_path(model or served[0])))
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"{self.url} does not describe its models: {error}") from error

    def request(self, method: str, path: str, body: Any = None, **params: str | int) -> Any:
        """The reply, where the service is there; it is asked again while it is busy."""

        def attempt() -> Any:
            try:
                return self._carry.request(method, path, body, params=params)
            except Problem as problem:
                problem.is_retryable &= problem.status > 0
                raise

        try:
            return Retry(RETRY_S).run(attempt)
        except Problem as problem:
            if problem.status == 0:
                raise LoadError(
                    f"nothing answers at {self.url} ({problem.detail}); start the service with "
                    "`make run`, or name another address with --url"
                ) from problem
            raise LoadError(f"{method} {path}: status {problem.status}: {problem}") from problem

    def post(self, path: str, body: Any) -> Any:
        """The reply to a POST."""
        return self.request("POST", path, body)
