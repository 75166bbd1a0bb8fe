"""Access control of one process: from an Authorization header to the pipeline in its key's scope.

A key is verified once for each header; then the header finds its pipeline in `cached`, from which
one is dropped as soon as its key is revoked, changed or expired, or the keys are too old.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from service.access.key_cache import AccessKeys
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.pipeline.pipeline import Pipeline
from service.pipeline.scoped_pipeline import PipelineInterface, ScopedPipeline

MAX_CACHED: Final = 4096
"""Most cached headers; when there are more, all are verified again."""

OnEnd = Callable[[CarryError], None]
"""Called with the reason when a pipeline may no longer be used."""


class AccessControl:
    """Gives each request the pipeline in the scope of its access key.

    Args:
        keys: the access keys; None for a service that is always open.

    Attributes:
        open_pipeline: the pipeline without checks; None if requests need a key.
        cached: verified headers and their pipelines, only while requests need a key.
    """

    def __init__(self, pipeline: Pipeline, keys: AccessKeys | None = None):
        self._pipeline = pipeline
        self._keys = keys
        self._models = pipeline.models
        self._on_end: dict[PipelineInterface, set[OnEnd]] = {}
        self.open_pipeline: PipelineInterface | None = pipeline
        self.cached: dict[bytes | None, ScopedPipeline] = {}
        if keys is not None:
            keys.on_refresh = self._refresh
            self._refresh()

    def pipeline(self, authorization: bytes | None) -> PipelineInterface:
        """The pipeline in the scope of this header; call it before more of a request is read.

        Raises:
            Unauthenticated: there is no key that is accepted.
            StoreUnavailable: the keys could not be read for too long.
        """
        if self.open_pipeline is not None or self._keys is None:
            return self._pipeline
        principal = self._keys.authenticate(authorization)
        if authorization is None:
            raise RuntimeError("a request without a key was authenticated")
        pipeline = self.cached.get(authorization)
        if pipeline is None or pipeline.principal != principal:
            if len(self.cached) >= MAX_CACHED:
                self.cached.clear()
            limiter = self._pipeline.limiters.limiter(principal.key_id, principal.limits)
            quota = self._pipeline.quotas.quota(principal.key_id, principal.limits)
            pipeline = ScopedPipeline(self._pipeline, principal, limiter, quota)
            self.cached[authorization] = pipeline
        return pipeline

    def notify_end(self, pipeline: PipelineInterface, on_end: OnEnd) -> Callable[[], None]:
        """Call `on_end` once the pipeline may no longer be used, within a second of that; for what
        outlives its request. Returns the function that ends this."""
        listeners = self._on_end.setdefault(pipeline, set())
        listeners.add(on_end)

        def remove() -> None:
            listeners.discard(on_end)
            if not listeners:
                self._on_end.pop(pipeline, None)

        return remove

    def _refresh(self) -> None:
        """Drop the pipelines that may no longer be used."""
        keys = self._keys
        if keys is None:
            return
        self.open_pipeline = self._pipeline if keys.is_open else None
        stale: CarryError | None = None
        try:
            if not keys.is_open:
                keys.check_fresh()
        except StoreUnavailable as error:
            stale = error
        if stale is not None or self._models is not self._pipeline.models:
            self._models = self._pipeline.models
            self.cached.clear()
        for authorization, cached in list(self.cached.items()):
            if not keys.is_current(cached.principal):
                del self.cached[authorization]
        for pipeline, listeners in list(self._on_end.items()):
            reason = stale or self._end(keys, pipeline)
            if reason is not None:
                del self._on_end[pipeline]
                for on_end in list(listeners):
                    on_end(reason)

    def _end(self, keys: AccessKeys, pipeline: PipelineInterface) -> CarryError | None:
        """Why a pipeline may no longer be used; None if it may."""
        if isinstance(pipeline, ScopedPipeline):
            if keys.is_current(pipeline.principal):
                return None
            return Unauthenticated(f"the key {pipeline.principal.key_id} is no longer accepted")
        if keys.is_open:
            return None
        return Unauthenticated("the service now requires an access key")
