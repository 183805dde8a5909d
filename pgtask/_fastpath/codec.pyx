"""The JSON of a step: finding the names and the payload in an envelope, decoding and encoding the payload."""

from pgtask._json_losses import losses_of_step
from pgtask.errors import DecodeError, DefinitionError

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t*) except NULL

cdef object encoder = msgspec.json.Encoder()


cdef struct Span:
    Py_ssize_t start
    Py_ssize_t end


cdef inline Py_ssize_t skip_space(const char* text, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    while at < size and text[at] in (32, 9, 10, 13):
        at += 1
    return at


cdef Py_ssize_t scan_name(const char* text, Py_ssize_t at, Py_ssize_t size, Span* name) noexcept nogil:
    """Read `{ "name" :` from `at`. Return where the value begins, -1 if the text differs, -2 if the name has an escape."""
    at = skip_space(text, at, size)
    if at >= size or text[at] != c"{":
        return -1
    at = skip_space(text, at + 1, size)
    if at >= size or text[at] != c'"':
        return -1
    name.start = at + 1
    at += 1
    while at < size and text[at] != c'"':
        if text[at] == c"\\":
            return -2
        at += 1
    name.end = at
    at = skip_space(text, at + 1, size)
    if at >= size or text[at] != c":":
        return -1
    return skip_space(text, at + 1, size)


cdef int scan(const char* text, Py_ssize_t size, Span* task, Span* step, Span* payload) noexcept nogil:
    """Find the two names and the payload of `{"Task":{"Step":payload}}` without building an object; 0 when found."""
    cdef Py_ssize_t at = scan_name(text, 0, size, task)
    if at < 0:
        return <int>at
    at = scan_name(text, at, size, step)
    if at < 0:
        return <int>at
    payload.start = at
    cdef Py_ssize_t end = size
    cdef int closing
    for closing in range(2):
        while end > at and text[end - 1] in (32, 9, 10, 13):
            end -= 1
        if end <= at or text[end - 1] != c"}":
            return -1
        end -= 1
    while end > at and text[end - 1] in (32, 9, 10, 13):
        end -= 1
    if end <= at:
        return -1
    payload.end = end
    return 0


def scan_envelope(str text):
    """Return the task's name, the step's name and the payload (bytes) of an envelope. Raises `DecodeError`.

    The payload may be invalid JSON; decoding it finds that.
    """
    cdef Py_ssize_t size
    cdef const char* raw = PyUnicode_AsUTF8AndSize(text, &size)
    cdef Span task, step, payload
    cdef int found = scan(raw, size, &task, &step, &payload)
    if found == 0:
        return (
            raw[task.start:task.end].decode(),
            raw[step.start:step.end].decode(),
            raw[payload.start:payload.end],
        )
    return scan_slowly(text)


cdef object _outer = msgspec.json.Decoder(dict[str, msgspec.Raw])


def scan_slowly(str text):
    """Do the work of `scan_envelope` by a full parse: for names with escapes, and for the error of a bad envelope."""
    try:
        outer = _outer.decode(text)
        if len(outer) == 1:
            (task, rest), = outer.items()
            inner = _outer.decode(rest)
            if len(inner) == 1:
                (step, payload), = inner.items()
                return task, step, bytes(payload)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, RecursionError) as error:
        raise DecodeError(f"the step is not valid JSON: {error}") from None
    raise DecodeError('the step is not of the form {"Task":{"Step":{...}}}')


@cython.final
cdef class Codec:
    """A step class and its JSON, `{"Task":{"Step":payload}}`, as serde writes it.

    The payload of a class without fields is `null` (`{}` is read too); that of a transparent class is the bare value of
    its field.
    """

    cdef readonly object cls
    cdef readonly str label
    cdef readonly bytes prefix
    cdef object decoder
    cdef str only_field
    cdef bint is_unit
    cdef bint is_loose  # has fields of any type
    cdef object losses  # finds values that JSON would change silently, in the fields where it could; else None

    def __init__(self, cls, str task, str step, bint transparent):
        fields = cls.__struct_fields__
        if transparent and len(fields) != 1:
            raise DefinitionError(f"step {task}.{step}: transparent = True needs exactly one field, it has {len(fields)}")
        self.cls = cls
        self.label = f"{task}.{step}"
        self.prefix = b'{%b:{%b:' % (encoder.encode(task), encoder.encode(step))
        self.is_unit = not fields
        self.only_field = fields[0] if transparent else None
        if transparent:
            self.decoder = msgspec.json.Decoder(msgspec.structs.fields(cls)[0].type)
        else:
            self.decoder = msgspec.json.Decoder(cls)
        self.losses = losses_of_step(cls)
        self.is_loose = self.losses is not None and bool(self.losses.fields)

    cpdef object decode(self, bytes payload):
        """Return the step that a payload holds. Raises `DecodeError` with msgspec's message."""
        try:
            if self.only_field is not None:
                return self.cls(**{self.only_field: self.decoder.decode(payload)})
            if self.is_unit and payload == b"null":
                return self.cls()
            return self.decoder.decode(payload)
        except MemoryError:
            raise  # not an error of the row
        except Exception as error:
            raise DecodeError(f"{self.label} cannot be decoded: {error or type(error).__name__}") from None

    cpdef bytes payload(self, step):
        """Return the JSON of a step without its envelope. Raises msgspec's error for a value that it cannot encode, and
        `ValueError` for one that JSON would change silently."""
        cdef bytes payload
        if self.is_unit:
            return b"null"
        payload = encoder.encode(step if self.only_field is None else getattr(step, self.only_field))
        if self.losses is not None and (self.is_loose or b"null" in payload):
            self.losses.refuse(step, payload)
        return payload

    def encode(self, step):
        """Return the envelope of a step, as text."""
        return (self.prefix + self.payload(step) + b"}}").decode()
