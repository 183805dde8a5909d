"""Rows of a bulk enqueue in COPY's binary format."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING
from libc.string cimport memcpy


cdef inline char* put_number(char* into, unsigned long long number, int size) noexcept nogil:
    """Write a number in so many bytes, the highest first. Return where to go on."""
    cdef int at
    for at in range(size):
        into[at] = <char>(number >> (8 * (size - 1 - at)) & 0xFF)
    return into + size


cdef inline char* put_bytes(char* into, const char* data, Py_ssize_t size) noexcept nogil:
    memcpy(into, data, size)
    return into + size


@cython.final
cdef class CopyRows:
    """A builder of COPY's binary format for the columns id, step, queue, priority and, if it has them, key, trace and
    group_id.

    Ids count up from `first` (an int of 128 bits), so that ten million of them are a range and not a list. All
    rows have the same trace and group.
    """

    cdef readonly Py_ssize_t count
    cdef readonly bint has_keys
    cdef bytearray buffer
    cdef unsigned long long high, low  # the halves of the next id
    cdef bytes trace  # the text of that column, None without one
    cdef bytes group  # the value of the last column, None without one
    cdef Py_ssize_t columns

    HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    TRAILER = b"\xff\xff"

    def __init__(self, first, bint has_keys=False, trace=None, group=None):
        self.high, self.low = first >> 64, first & 0xFFFFFFFFFFFFFFFF
        self.has_keys = has_keys
        self.trace = None if trace is None else trace.encode()
        self.group = None if group is None else group.to_bytes(8, "big", signed=True)
        self.columns = 4 + has_keys + (trace is not None) + (group is not None)
        self.buffer = bytearray(self.HEADER)

    @property
    def has_trace(self):
        return self.trace is not None

    @property
    def has_group(self):
        return self.group is not None

    def add(self, Codec codec, bytes payload, str queue, int priority, str key=None):
        """Add a row, and return the bytes built since the last `take`."""
        cdef bytes prefix = codec.prefix
        cdef Py_ssize_t queue_size, key_size = 0, before = len(self.buffer)
        cdef const char* queue_text = PyUnicode_AsUTF8AndSize(queue, &queue_size)
        cdef const char* key_text = NULL
        cdef Py_ssize_t step_size = len(prefix) + len(payload) + 2
        cdef Py_ssize_t size = 2 + (4 + 16) + (4 + step_size) + (4 + queue_size) + (4 + 2)
        cdef char* into
        if self.has_keys:
            key_text = PyUnicode_AsUTF8AndSize(key, &key_size)
            size += 4 + key_size
        if self.trace is not None:
            size += 4 + len(self.trace)
        if self.group is not None:
            size += 4 + 8
        PyByteArray_Resize(self.buffer, before + size)
        into = PyByteArray_AS_STRING(self.buffer) + before
        into = put_number(into, self.columns, 2)
        into = put_number(into, 16, 4)
        into = put_number(put_number(into, self.high, 8), self.low, 8)
        into = put_number(into, step_size, 4)
        into = put_bytes(into, PyBytes_AS_STRING(prefix), len(prefix))
        into = put_bytes(into, PyBytes_AS_STRING(payload), len(payload))
        into = put_bytes(into, b"}}", 2)
        into = put_number(into, queue_size, 4)
        into = put_bytes(into, queue_text, queue_size)
        into = put_number(into, 2, 4)
        into = put_number(into, <unsigned long long>priority, 2)
        if self.has_keys:
            into = put_number(into, key_size, 4)
            into = put_bytes(into, key_text, key_size)
        if self.trace is not None:
            into = put_number(into, len(self.trace), 4)
            into = put_bytes(into, PyBytes_AS_STRING(self.trace), len(self.trace))
        if self.group is not None:
            into = put_bytes(put_number(into, 8, 4), PyBytes_AS_STRING(self.group), 8)
        self.low += 1
        if self.low == 0:
            self.high += 1
        self.count += 1
        return before + size

    def take(self):
        """Return the bytes built since the last call."""
        buffer, self.buffer = self.buffer, bytearray()
        return bytes(buffer)
