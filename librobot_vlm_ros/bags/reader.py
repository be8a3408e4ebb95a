"""Reading rosbag2 recordings, db3 and MCAP, with every fault of a file as a coded error.

Messages are handed out serialized, as they were recorded: most users pass them on. Only what is
asked for is deserialized, with the definitions that the bag itself carries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.rosbag2 import Reader
from rosbags.typesys import get_types_from_idl, get_types_from_msg
from rosbags.typesys.store import Typestore

from librobot_vlm_ros.bags.faults import check_kinds, check_path, explain
from librobot_vlm_ros.bags.qos import BagQos, from_recorded
from librobot_vlm_ros.bags.salvage import SalvageReader
from librobot_vlm_ros.bags.typestore import extended_typestore
from librobot_vlm_ros.core import BagError, ErrorCode, VlmError


@dataclass(frozen=True)
class BagTopic:
    """One topic of a bag."""

    name: str
    type: str
    """As ROS writes it: `sensor_msgs/msg/Image`."""
    count: int
    """Number of messages."""
    qos: BagQos
    """What its publishers offered when it was recorded."""
    type_hash: str = ""
    """`RIHS01_...` of the recorded definition; "" where the bag does not say."""


@dataclass(frozen=True)
class BagMessage:
    """One message as it lies in the bag."""

    topic: str
    type: str
    stamp_ns: int
    """When it was recorded; the stamp of its own header is inside `data`."""
    data: bytes
    """Serialized (CDR)."""


class BagReader:
    """A bag, opened for reading: a folder with `metadata.yaml`, or one .mcap or .db3 file.

    Used as a context manager. Raises `BagError` on opening: FILE_NOT_FOUND, PERMISSION_DENIED,
    BAG_UNREADABLE (no bag, or a damaged one), BAG_TRUNCATED (a recording that was cut off).
    With `salvage` a recording that was cut off or damaged is opened all the same: what is whole in
    it is read, and `lost` says what is not. To know, it is read through once; only one in which
    nothing is whole is refused.
    """

    def __init__(self, path: Path | str, *, salvage: bool = False) -> None:
        self.path = Path(path)
        self.topics: tuple[BagTopic, ...] = ()
        self.lost = ""
        self._salvage = salvage
        self._reader: Reader | SalvageReader | None = None
        self._types: Typestore | None = None

    def __enter__(self) -> BagReader:
        reader = self._reader = self._whole_or_salvaged()
        self.topics = tuple(_topics(reader.connections))
        if isinstance(reader, SalvageReader):
            self.lost = "; ".join(reader.lost)
        return self

    def _whole_or_salvaged(self) -> Reader | SalvageReader:
        """The bag, open; as it is unless it has a fault and shall be read all the same."""
        check_kinds(self.path)
        reader: Reader | None = None
        try:
            check_path(self.path)
            reader = Reader(self.path)
            reader.open()
            if self._salvage:
                _read_through(reader)
            return reader
        except Exception as error:
            if reader is not None:
                with contextlib.suppress(Exception):  # it may not have come to be open
                    reader.close()
            coded = explain(self.path, error)
            damaged = coded.code in (ErrorCode.BAG_TRUNCATED, ErrorCode.BAG_UNREADABLE)
            if not self._salvage or not damaged:
                raise coded from error
        salvaged = SalvageReader(self.path)
        try:
            salvaged.open()
        except Exception as error:  # nothing in it is whole: what it suffers from was said above
            raise coded from error
        return salvaged

    def __exit__(self, *error: object) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def _open(self) -> Reader | SalvageReader:
        if self._reader is None:
            raise VlmError(ErrorCode.INTERNAL, f"{self.path} is read outside `with BagReader(...)`")
        return self._reader

    @property
    def message_count(self) -> int:
        """Messages of all topics together."""
        return self._open.message_count

    @property
    def start_ns(self) -> int:
        """When the first message was recorded; 0 in an empty bag."""
        return self._open.start_time if self._open.message_count else 0

    @property
    def duration_s(self) -> float:
        """Seconds from the first message to the last."""
        return max(0, self._open.duration - 1) / 1e9 if self._open.message_count else 0.0

    def topic(self, name: str) -> BagTopic | None:
        """The topic called `name`, or None."""
        return next((topic for topic in self.topics if topic.name == name), None)

    def require_topic(self, name: str, type_name: str = "") -> BagTopic:
        """The topic called `name`, of type `type_name` if that is given.

        Raises `BagError`: TOPIC_NOT_IN_BAG naming the topics there are, or WRONG_TYPE.
        """
        topic = self.topic(name)
        if topic is None:
            known = ", ".join(sorted(item.name for item in self.topics)) or "none at all"
            raise BagError(
                ErrorCode.TOPIC_NOT_IN_BAG,
                f"{self.path} has no topic {name}",
                f"Its topics are: {known}.",
            )
        if type_name and topic.type != type_name:
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"topic {name} of {self.path} holds {topic.type}, expected {type_name}",
            )
        return topic

    @property
    def notes(self) -> dict[str, str]:
        """What its writer noted in metadata.yaml (rosbag2's custom data)."""
        storage = getattr(self._open, "storage", None)
        return dict(getattr(getattr(storage, "metadata", None), "custom", None) or {})

    def definition(self, name: str) -> tuple[str, str]:
        """(definition, `RIHS01_...`) of a topic as recorded; ("", "") where the bag has none."""
        connection = next(c for c in self._open.connections if c.topic == name)
        text = str(connection.msgdef.data)
        written_idl = text.startswith("=" * 80 + "\nIDL: ")
        if connection.msgdef.format == MessageDefinitionFormat.NONE or not text:
            return "", ""
        if connection.msgdef.format == MessageDefinitionFormat.IDL and not written_idl:
            return "", ""  # rosbags would take it for the other language
        return text, self.type_hash(name)

    def type_hash(self, name: str) -> str:
        """`RIHS01_...` of the definition a topic was recorded with; "" where the bag has none."""
        topic = self.require_topic(name)
        if topic.type_hash:
            return topic.type_hash
        connections = [c for c in self._open.connections if c.topic == name]
        if topic.type not in _recorded_types(connections):
            return ""
        try:
            return str(self.typestore.hash_rihs01(topic.type))
        except Exception:  # wide strings and the like have no hash in rosbags
            return ""

    def messages(
        self,
        topics: Iterable[str] = (),
        start_ns: int | None = None,
        stop_ns: int | None = None,
    ) -> Iterator[BagMessage]:
        """Messages in the order of recording; of all topics unless `topics` names some.

        Only those recorded from `start_ns` on and before `stop_ns`. Raises `BagError`
        TOPIC_NOT_IN_BAG, and BAG_TRUNCATED or BAG_UNREADABLE where the file is damaged: what came
        before the damage has been handed out then.
        """
        reader = self._open
        wanted = set(topics)
        for name in wanted:
            self.require_topic(name)
        connections = [c for c in reader.connections if not wanted or c.topic in wanted]
        if not connections:
            return
        count = 0
        try:
            rows = reader.messages(connections, start=start_ns, stop=stop_ns)
            for connection, stamp_ns, data in rows:
                count += 1
                yield BagMessage(connection.topic, connection.msgtype, stamp_ns, bytes(data))
        except Exception as error:
            raise explain(self.path, error, after=count) from error

    def deserialize(self, message: BagMessage) -> Any:
        """The message as an object with the fields of its definition (numpy arrays for sequences).

        Raises `BagError` (BAG_UNREADABLE) for an unknown type or damaged content.
        """
        try:
            return self.typestore.deserialize_cdr(message.data, message.type)
        except VlmError:
            raise
        except KeyError as error:
            raise BagError(
                ErrorCode.BAG_UNREADABLE,
                f"type {message.type} of topic {message.topic} is not known and "
                f"{self.path} does not carry its definition",
            ) from error
        except Exception as error:
            raise BagError(
                ErrorCode.BAG_UNREADABLE,
                f"a message on {message.topic} in {self.path} is no valid {message.type}: {error}",
                "The bag is damaged, or was recorded with another definition of that type.",
            ) from error

    @property
    def typestore(self) -> Typestore:
        """Definitions to read this bag with: its own, then those of Jazzy and of this package."""
        if self._types is None:
            self._types = extended_typestore(_recorded_types(self._open.connections))
        return self._types


def _read_through(reader: Reader) -> None:
    """Read every message; raise where one cannot be read or is missing."""
    found = sum(1 for _ in reader.messages(reader.connections))
    if found < reader.message_count:
        raise BagError(
            ErrorCode.BAG_UNREADABLE, f"{found} of {reader.message_count} messages can be found"
        )


def _topics(connections: list[Connection]) -> Iterator[BagTopic]:
    by_name: dict[str, list[Connection]] = {}
    for connection in connections:
        by_name.setdefault(connection.topic, []).append(connection)
    for name, group in sorted(by_name.items()):
        profiles = [qos for item in group for qos in getattr(item.ext, "offered_qos_profiles", [])]
        yield BagTopic(
            name=name,
            type=group[0].msgtype,
            count=sum(item.msgcount for item in group),
            qos=from_recorded(profiles),
            type_hash=group[0].digest,
        )


def _recorded_types(connections: list[Connection]) -> dict[str, Any]:
    """The definitions in the bag; one that cannot be parsed does not spoil the others."""
    types: dict[str, Any] = {}
    for connection in connections:
        definition = connection.msgdef
        try:
            if definition.format == MessageDefinitionFormat.MSG:
                types.update(get_types_from_msg(definition.data, connection.msgtype))
            elif definition.format == MessageDefinitionFormat.IDL:
                for part in definition.data.split("=" * 80 + "\n"):
                    header, _, rest = part.partition("\n")
                    text = rest if header.startswith("IDL: ") else part
                    if text.strip():
                        types.update(get_types_from_idl(text))
        except Exception:  # foreign text; using the type is what then fails, coded
            continue
    return types
