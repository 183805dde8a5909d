"""Rows of a bulk enqueue in COPY's binary format."""

import struct

cdef object _int32 = struct.Struct("!i").pack
cdef object _priority = struct.Struct("!ih").pack


@cython.final
cdef class CopyRows:
    """A builder of COPY's binary format for the columns id, step, queue, priority and, if it has keys, key.

    Ids count up from `first` (an int of 128 bits), so that ten million of them are a range and not a list.
    """

    cdef readonly Py_ssize_t count
    cdef readonly bint has_keys
    cdef bytearray buffer
    cdef object first

    HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    TRAILER = b"\xff\xff"

    def __init__(self, first, bint has_keys=False):
        self.first = first
        self.has_keys = has_keys
        self.buffer = bytearray(self.HEADER)

    def add(self, Codec codec, bytes payload, bytes queue, int priority, bytes key=b""):
        """Add a row, and return the bytes built since the last `take`."""
        cdef bytes prefix = codec.prefix
        cdef bytearray buffer = self.buffer
        buffer += b"\0\x05\0\0\0\x10" if self.has_keys else b"\0\x04\0\0\0\x10"
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
        self.count += 1
        return len(buffer)

    def take(self):
        """Return the bytes built since the last call."""
        buffer, self.buffer = self.buffer, bytearray()
        return bytes(buffer)
