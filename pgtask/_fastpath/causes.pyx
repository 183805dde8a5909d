"""Folding the errors of parked tasks by their causes: for `pgtask parked`."""

cdef enum:
    MAX_FOLDED = 2000  # bytes of an error
    MIN_HEX = 8  # digits of a number in hexadecimal, with a decimal digit among them


cdef inline bint is_digit(char c) noexcept nogil:
    return c'0' <= c <= c'9'


cdef inline bint is_hex(char c) noexcept nogil:
    return is_digit(c) or c'a' <= c <= c'f' or c'A' <= c <= c'F'


cdef inline bint is_word(char c) noexcept nogil:
    """Return whether a byte belongs to a word; those of UTF-8 do."""
    return is_digit(c) or c'a' <= c <= c'z' or c'A' <= c <= c'Z' or c == c'_' or <unsigned char>c >= 0x80


cdef Py_ssize_t skip_quoted(const char* text, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Return the place after the quoted value that begins at a quote; that of the quote itself if none does."""
    cdef Py_ssize_t end
    for end in range(at + 1, size):
        if text[end] == text[at] and (end + 1 == size or not is_word(text[end + 1])):
            return end + 1
    return at


cdef Py_ssize_t skip_number(const char* text, Py_ssize_t at, Py_ssize_t size, bint begins_word) noexcept nogil:
    """Return the place after the number, UUID or hexadecimal number that begins here; this place if none does."""
    cdef Py_ssize_t end = at
    cdef bint has_digit = False
    cdef Py_ssize_t fewest = MIN_HEX
    if begins_word:
        if size - at > 2 and text[at] == c'0' and text[at + 1] == c'x':
            end = at + 2
            has_digit = True
            fewest = 3
        while end < size and (is_hex(text[end]) or (text[end] == c'-' and end - at >= MIN_HEX)):
            has_digit = has_digit or is_digit(text[end])
            end += 1
        while end > at and text[end - 1] == c'-':
            end -= 1
        if has_digit and end - at >= fewest and (end == size or not is_word(text[end])):
            return end
    end = at
    while end < size and is_digit(text[end]):
        end += 1
        if size - end > 1 and (text[end] == c'.' or text[end] == c',') and is_digit(text[end + 1]) and end > at:
            end += 1
    return end


cdef Py_ssize_t fold(const char* text, Py_ssize_t size, char* out) noexcept nogil:
    """Write a text with `#` for each number, id and quoted value; return its size."""
    cdef Py_ssize_t at = 0, end, written = 0
    cdef bint begins_word
    while at < size:
        begins_word = at == 0 or not is_word(text[at - 1])
        end = at
        if is_hex(text[at]):
            end = skip_number(text, at, size, begins_word)
        elif begins_word and (text[at] == c"'" or text[at] == c'"'):
            end = skip_quoted(text, at, size)
        if end > at:
            out[written] = c'#'
            at = end
        else:
            out[written] = text[at]
            at += 1
        written += 1
    return written


cdef Py_ssize_t find_place(const char* text, Py_ssize_t size) noexcept nogil:
    """Return where ` (at FILE:LINE in FUNCTION)` begins at the end of a line, `size` if there is no such end."""
    cdef Py_ssize_t at
    if size == 0 or text[size - 1] != c')':
        return size
    for at in range(size - 5, -1, -1):
        if text[at] == c' ' and text[at + 1] == c'(' and text[at + 2] == c'a' and text[at + 3] == c't' and text[at + 4] == c' ':
            return at
    return size


cdef tuple split_error(const char* text, Py_ssize_t size):
    """Return the first line of an error, folded, and its place."""
    cdef char[MAX_FOLDED] out
    cdef Py_ssize_t end = 0, place, written
    while end < size and text[end] != c'\n':
        end += 1
    place = find_place(text, end)
    written = fold(text, min(place, MAX_FOLDED), out)
    return out[:written], text[min(place + 5, end):max(end - 1, min(place + 5, end))]


def fold_error(bytes text):
    """Return the first line of an error with `#` for each number, id and quoted value; and its place in user code."""
    return split_error(PyBytes_AS_STRING(text), len(text))


cdef class Counted:
    """The number of the tasks of a cause, and the first and the last of them by the time of their parking."""

    cdef Py_ssize_t count
    cdef bytes first, last
    cdef long long first_at, last_at


@cython.final
cdef class CauseReader(CopyReader):
    """A reader of rows (id, wakeup_at, step, error) of parked tasks, which counts them by cause.

    The memory is bounded: what has another cause than the first `max_causes` is counted as one, without a name.
    """

    cdef dict by_cause
    cdef Py_ssize_t max_causes

    def __init__(self, Py_ssize_t max_causes):
        self.fields = 4
        self.by_cause = {}
        self.max_causes = max_causes

    def feed(self, bytes chunk):
        """Take some bytes."""
        self.parse(chunk, None)

    def found(self):
        """Return for each cause the label of the step, the folded text, the place, the count, and the ids of the first and
        of the last task."""
        cdef Counted cause
        found = []
        for key, cause in self.by_cause.items():
            texts = (part.decode("utf-8", "replace") for part in key)
            found.append((*texts, cause.count, cause.first, cause.last))
        return found

    cdef int read_row(self, const char* raw, Py_ssize_t* starts, Py_ssize_t* lengths, list found) except -1:
        cdef tuple key = (label_of(raw + starts[2], lengths[2]), *split_error(raw + starts[3], lengths[3]))
        cdef Counted cause = <Counted>self.by_cause.get(key)
        cdef long long at = read_long(<const unsigned char*>raw + starts[1])
        if cause is None:
            if len(self.by_cause) >= self.max_causes:
                key = (b"", b"", b"")
            cause = <Counted>self.by_cause.setdefault(key, Counted())
        if cause.count == 0 or at < cause.first_at:
            cause.first, cause.first_at = raw[starts[0]:starts[0] + lengths[0]], at
        if cause.count == 0 or at >= cause.last_at:
            cause.last, cause.last_at = raw[starts[0]:starts[0] + lengths[0]], at
        cause.count += 1
        return 0


cdef inline long long read_long(const unsigned char* at) noexcept nogil:
    return (<long long>read_int(at) << 32) | <long long><unsigned int>read_int(at + 4)


cdef bytes label_of(const char* text, Py_ssize_t size):
    """Return `Task.Step` of the beginning of an envelope; `?` if it is none."""
    cdef Py_ssize_t[4] quotes
    cdef Py_ssize_t at = 0
    cdef int seen = 0
    while at < size and seen < 4:
        if text[at] == c'"':
            quotes[seen] = at
            seen += 1
        at += 1
    if seen < 4:
        return b"?"
    return text[quotes[0] + 1:quotes[1]] + b"." + text[quotes[2] + 1:quotes[3]]
