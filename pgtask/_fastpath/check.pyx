"""Reading what waits, as a worker would, out of a binary COPY of the table: for `pgtask check`."""

from cpython.unicode cimport PyUnicode_DecodeUTF8

cdef bytes COPY_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
cdef enum:
    COPY_HEADER = 19  # bytes: the signature, the flags, and the length of an extension
    MAX_COPY_FIELDS = 4


cdef inline int read_int(const unsigned char* at) noexcept nogil:
    return (<int>at[0] << 24) | (<int>at[1] << 16) | (<int>at[2] << 8) | <int>at[3]


cdef class CopyReader:
    """A reader of rows in the binary format of COPY. `rows` counts them."""

    cdef bytes rest  # of a row that is not complete
    cdef bint has_begun
    cdef int fields  # of a row
    cdef readonly Py_ssize_t rows

    def __cinit__(self):
        self.rest = b""

    cdef int parse(self, bytes chunk, list found) except -1:
        """Read the rows that some more bytes complete."""
        cdef bytes data = self.rest + chunk if self.rest else chunk
        cdef const unsigned char* raw = <const unsigned char*>PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = len(data), at = 0, start
        cdef Py_ssize_t[MAX_COPY_FIELDS] starts
        cdef Py_ssize_t[MAX_COPY_FIELDS] lengths
        cdef int field
        if not self.has_begun:
            if size < COPY_HEADER:
                self.rest = data
                return 0
            if data[:11] != COPY_SIGNATURE:
                raise ValueError("these bytes are not a binary COPY")
            at = COPY_HEADER + read_int(raw + 15)
            self.has_begun = True
        while size - at >= 2:
            if raw[at] == 0xFF:  # the end
                at = size
                break
            start = at + 2
            for field in range(self.fields):
                if size - start < 4:
                    break
                starts[field] = start + 4
                lengths[field] = read_int(raw + start)
                start = starts[field] + max(lengths[field], 0)
            else:
                if start <= size:
                    self.rows += 1
                    self.read_row(<const char*>raw, starts, lengths, found)
                    at = start
                    continue
            break
        self.rest = data[at:]
        return 0

    cdef int read_row(self, const char* raw, Py_ssize_t* starts, Py_ssize_t* lengths, list found) except -1:
        raise NotImplementedError


@cython.final
cdef class RowReader(CopyReader):
    """A reader of rows (id, step, error).

    It decodes each step by the first of its tables that has the step, and returns the rows to look at again: those that
    it cannot decode, and those of workflows.
    """

    cdef dict by_name

    def __init__(self, tables):
        cdef Table table
        self.fields = 3
        self.by_name = {}
        for table in reversed(tables):
            self.by_name.update(table.by_name)

    def feed(self, bytes chunk):
        """Take some bytes; return the rows to look at as tuples of an id (bytes), a step and an error (text or
        None)."""
        cdef list found = []
        self.parse(chunk, found)
        return found

    cdef int read_row(self, const char* raw, Py_ssize_t* starts, Py_ssize_t* lengths, list found) except -1:
        if lengths[1] >= 0 and self.can_decode(raw + starts[1], lengths[1]):
            return 0
        found.append((
            raw[starts[0]:starts[0] + lengths[0]],
            None if lengths[1] < 0 else PyUnicode_DecodeUTF8(raw + starts[1], lengths[1], NULL),
            None if lengths[2] < 0 else PyUnicode_DecodeUTF8(raw + starts[2], lengths[2], NULL),
        ))
        return 0

    cdef bint can_decode(self, const char* text, Py_ssize_t size) except -1:
        """Return whether a step can certainly be decoded, and is not that of a workflow, which decodes its input."""
        cdef Span task, step, payload
        cdef StepEntry entry
        if scan(text, size, &task, &step, &payload) != 0:
            return False
        named = self.by_name.get(text[task.start:task.end] + b"\0" + text[step.start:step.end])
        if named is None:
            return False
        entry = <StepEntry>named
        if entry.run is None:
            return False
        try:
            entry.codec.decode(text[payload.start:payload.end])
        except DecodeError:
            return False
        return True
