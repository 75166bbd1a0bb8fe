"""The HTTP status of every error: the one table."""

from __future__ import annotations

from collections.abc import Mapping

from service.core import errors
from service.core.errors import CarryError

STATUS: Mapping[type[CarryError], int] = {
    errors.MalformedRequest: 400,
    errors.DuplicateField: 400,
    errors.HeadTooLarge: 431,
    errors.ExpectationFailed: 417,
    errors.RequestTimeout: 408,
    errors.MalformedBody: 400,
    errors.InvalidInput: 422,
    errors.ChunkTooLong: 413,
    errors.BodyTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.NotAcceptable: 406,
    errors.UpgradeRequired: 426,
    errors.OriginNotAllowed: 403,
    errors.InvalidName: 400,
    errors.InvalidPrecondition: 400,
    errors.ChunksUnsupported: 422,
    errors.FinalUnsupported: 422,
    errors.ForecastUnsupported: 422,
    errors.ResetsUnsupported: 422,
    errors.ModelNotFound: 404,
    errors.StreamNotFound: 404,
    errors.RouteNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.EpochMismatch: 409,
    errors.PositionAhead: 409,
    errors.PositionBehind: 409,
    errors.AlreadyApplied: 409,
    errors.InputKindMismatch: 409,
    errors.StreamFinal: 409,
    errors.StateChanged: 412,
    errors.StreamExists: 409,
    errors.StateIncompatible: 409,
    errors.PreviousFailed: 424,
    errors.Conflict: 409,
    errors.StateDamaged: 500,
    errors.NotFinite: 500,
    errors.StoreUnavailable: 503,
    errors.StoreRefused: 503,
    errors.OutcomeUnknown: 503,
    errors.NotDurable: 503,
    errors.DeadlineExceeded: 504,
    errors.Overloaded: 429,
    errors.StreamOverloaded: 429,
    errors.TooManyConnections: 503,
    errors.ShuttingDown: 503,
    errors.InternalError: 500,
}
