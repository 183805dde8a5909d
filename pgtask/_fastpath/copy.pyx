"""Rows of a bulk enqueue in COPY's binary format."""

import struct

cdef object _int32 = struct.Struct("!i").pack
cdef object _priority = struct.Struct("!ih").pack


@cython.final
cdef class CopyRows:
    """A builder of COPY's binary format for the columns id, step, queue, priority and, if it has them, key and trace.

    Ids count up from `first` (an int of 128 bits), so that ten million of them are a range and not a list. All
    rows have the same trace.
    """

    cdef readonly Py_ssize_t count
    cdef readonly bint has_keys
    cdef bytearray buffer
    cdef object first
    cdef bytes head  # of each row
    cdef bytes trace  # the field, empty without one

    HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    TRAILER = b"\xff\xff"

    def __init__(self, first, bint has_keys=False, trace=None):
        cdef bytes text = b"" if trace is None else (<str>trace).encode()
        self.first = first
        self.has_keys = has_keys
        self.trace = b"" if trace is None else _int32(len(text)) + text
        self.head = bytes([0, 4 + has_keys + (trace is not None), 0, 0, 0, 16])
        self.buffer = bytearray(self.HEADER)

    @property
    def has_trace(self):
        return bool(self.trace)

    def add(self, Codec codec, bytes payload, bytes queue, int priority, bytes key=b""):
        """Add a row, and return the bytes built since the last `take`."""
        cdef bytes prefix = codec.prefix
        cdef bytearray buffer = self.buffer
        buffer += self.head
        buffer += (self.first + self.count).to_bytes(16, "big")
        buffer += _int32(len(prefix) + len(payload) + 2)
        buffer += prefix
        buffer += payload
        buffer += b"}}"
        buffer += _int32(len(queue))
        buffer += queue
        buffer += _priority(2, priority)
        if self.has_keys:
            buffer += _int32(len(key))
            buffer += key
        buffer += self.trace
        self.count += 1
        return len(buffer)

    def take(self):
        """Return the bytes built since the last call."""
        buffer, self.buffer = self.buffer, bytearray()
        return bytes(buffer)
