"""The service under load: its model's description, second computations, and the clean-up."""

from __future__ import annotations

from typing import Any

from service.client import Carry, ModelDescription, Problem, Retry, model_path, read_description

TIMEOUT_S = 120.0
RETRY_S = 30.0


class LoadError(Exception):
    """The load cannot be run; the message is one sentence for the person who started it."""


class Target:
    """A running service at one address; every failure is a LoadError."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._carry = Carry(self.url, timeout_s=TIMEOUT_S)
        except Problem as problem:
            raise LoadError(f"--url: {problem.detail}") from problem

    def close(self) -> None:
        """Close the connections."""
        self._carry.close()

    def describe(self, model: str | None) -> ModelDescription:
        """The model of that name; without one, the only one that is served."""
        try:
            served = [each["name"] for each in self._request("GET", "/v1/models")["models"]]
        except (KeyError, TypeError) as error:
            raise LoadError(f"what answers at {self.url} does not list its models") from error
        if model is None and len(served) != 1:
            raise LoadError(f"--model: choose one of {', '.join(served) or 'none that is served'}")
        if model is not None and model not in served:
            raise LoadError(f"--model {model}: served are {', '.join(served) or 'none'}")
        try:
            return read_description(self._request("GET", model_path(model or served[0])))
        except ValueError as error:
            raise LoadError(str(error)) from error

    def post(self, path: str, body: Any) -> Any:
        """The reply to a POST, which is repeated while the service is busy."""
        return self._request("POST", path, body)

    def delete_streams(self, model: str, prefix: str) -> None:
        """Delete every stream whose name begins with `prefix`."""
        self._request("DELETE", f"{model_path(model)}/streams", prefix=prefix)

    def _request(self, method: str, path: str, body: Any = None, **params: str | int) -> Any:
        def attempt() -> Any:
            try:
                return self._carry.request(method, path, body, params=params)
            except Problem as problem:
                # a service that is not there is not waited for
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
