"""Records of finished buckets, with the checksums of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from service.backfill.plan import Job


class BucketRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a finished bucket.

    Attributes:
        bucket: its number.
        streams, events: computed.
        out_of_order: events that are earlier than one before them, since the last reset.
        duplicates: number of them, whether they were left out or not.
        halted_streams: that end before a rejected event.
        moved_streams: with events of several partitions of a topic.
        outputs_bytes, states_bytes: sizes of its files.
        outputs_blake2b, states_blake2b: BLAKE2b of these, 32 bytes in hexadecimal.
        seconds: that it took.
    """

    bucket: int
    streams: int
    events: int
    out_of_order: int
    duplicates: int
    halted_streams: int
    moved_streams: int
    outputs_bytes: int
    states_bytes: int
    outputs_blake2b: str
    states_blake2b: str
    seconds: float


def read_record(job: Job, bucket: int) -> BucketRecord | None:
    """The record of a bucket; None if it has none, or files of other sizes than it says."""
    try:
        record = msgspec.json.decode(job.record(bucket).read_bytes(), type=BucketRecord)
        sizes = job.outputs(bucket).stat().st_size, job.states(bucket).stat().st_size
    except (OSError, msgspec.MsgspecError):
        return None
    return record if sizes == (record.outputs_bytes, record.states_bytes) else None


def file_checksum(path: Path) -> str:
    """BLAKE2b of a file, 32 bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def is_as_computed(out: Path, states: Path) -> bool:
    """Whether a file of states in an output folder is the one that its bucket's record is of."""
    try:
        content = (out / "done" / f"{states.stem}.json").read_bytes()
        record = msgspec.json.decode(content, type=BucketRecord)
    except (OSError, msgspec.MsgspecError):
        return False
    return file_checksum(states) == record.states_blake2b
