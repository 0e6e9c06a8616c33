/* aiordma._native._frames: the two most frequent frames of RPC, to bytes and from them. protocol/rpc.py has the layout,
 * all other frames, and what is wrong with those that are none. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <arpa/inet.h>
#include <endian.h>
#include <stdint.h>
#include <string.h>

enum { FRAME_CALL = 1, FRAME_STATUS = 6 };

struct call_header {
    uint8_t kind, variant;
    uint16_t method_length;
    uint32_t call_id;
    uint64_t timeout;
    uint32_t metadata_length;
} __attribute__((packed));

struct status_header {
    uint8_t kind, code;
    uint16_t details_length;
    uint32_t call_id, metadata_length;
} __attribute__((packed));

#define MAX_METHOD 255
#define MAX_TIMEOUT 1000000000000000 /* microseconds */

/* --- from bytes -------------------------------------------------------------------------------------- */

/* A message of which there are at least the bytes of a header: 1; other bytes: 0; no bytes: -1 and an exception. */
static int header_of(PyObject *message, void *header, Py_ssize_t size, char **data, Py_ssize_t *length)
{
    if (PyBytes_AsStringAndSize(message, data, length))
        return -1;
    if (*length < size)
        return 0;
    memcpy(header, *data, (size_t)size);
    return 1;
}

static PyObject *plain_call(PyObject *module, PyObject *message)
{
    struct call_header header;
    Py_ssize_t length, name;
    unsigned long long timeout;
    PyObject *method;
    char *data;
    int rc = header_of(message, &header, sizeof(header), &data, &length);

    (void)module;
    if (rc < 0)
        return NULL;
    if (!rc || header.kind != FRAME_CALL || header.variant || header.metadata_length)
        Py_RETURN_NONE;
    timeout = be64toh(header.timeout);
    if (timeout > MAX_TIMEOUT)
        Py_RETURN_NONE;
    name = ntohs(header.method_length);
    data += sizeof(header);
    length -= (Py_ssize_t)sizeof(header);
    if (name < 1 || name > MAX_METHOD || name > length)
        Py_RETURN_NONE;
    method = PyUnicode_DecodeUTF8(data, name, NULL);
    if (!method) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError))
            return NULL;
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    return Py_BuildValue("(kNKy#)", (unsigned long)ntohl(header.call_id), method, timeout, data + name,
                         length - name);
}

static PyObject *plain_reply(PyObject *module, PyObject *message)
{
    struct status_header header;
    Py_ssize_t length;
    char *data;
    int rc = header_of(message, &header, sizeof(header), &data, &length);

    (void)module;
    if (rc < 0)
        return NULL;
    if (!rc || header.kind != FRAME_STATUS || header.code || header.details_length || header.metadata_length)
        Py_RETURN_NONE;
    return Py_BuildValue("(ky#)", (unsigned long)ntohl(header.call_id), data + sizeof(header),
                         length - (Py_ssize_t)sizeof(header));
}

/* --- to bytes ---------------------------------------------------------------------------------------- */

static PyObject *frame(const void *header, size_t size, PyObject *name, PyObject *payload)
{
    Py_ssize_t name_length = 0, length;
    char *name_data = NULL, *data, *at;
    PyObject *bytes;

    if ((name && PyBytes_AsStringAndSize(name, &name_data, &name_length)) ||
        PyBytes_AsStringAndSize(payload, &data, &length))
        return NULL;
    bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size + name_length + length);
    if (!bytes)
        return NULL;
    at = PyBytes_AsString(bytes);
    memcpy(at, header, size);
    if (name_length)
        memcpy(at + size, name_data, (size_t)name_length);
    memcpy(at + size + name_length, data, (size_t)length);
    return bytes;
}

static PyObject *plain_call_frame(PyObject *module, PyObject *args)
{
    struct call_header header = {.kind = FRAME_CALL};
    PyObject *name, *payload;
    unsigned long long timeout;
    unsigned int call_id;

    (void)module;
    if (!PyArg_ParseTuple(args, "ISKS", &call_id, &name, &timeout, &payload))
        return NULL;
    if (PyBytes_Size(name) < 1 || PyBytes_Size(name) > MAX_METHOD) {
        PyErr_SetString(PyExc_ValueError, "the name of a method has 1 to 255 bytes");
        return NULL;
    }
    header.call_id = htonl(call_id);
    header.method_length = htons((uint16_t)PyBytes_Size(name));
    header.timeout = htobe64(timeout);
    return frame(&header, sizeof(header), name, payload);
}

static PyObject *plain_reply_frame(PyObject *module, PyObject *args)
{
    struct status_header header = {.kind = FRAME_STATUS};
    PyObject *payload;
    unsigned int call_id;

    (void)module;
    if (!PyArg_ParseTuple(args, "IS", &call_id, &payload))
        return NULL;
    header.call_id = htonl(call_id);
    return frame(&header, sizeof(header), NULL, payload);
}

static PyMethodDef functions[] = {
    {"plain_call", plain_call, METH_O,
     "plain_call(message): call, method, timeout (microseconds, 0 for none) and request of a unary call without\n"
     "metadata; None for all other messages."},
    {"plain_reply", plain_reply, METH_O,
     "plain_reply(message): call and reply of a status OK that has nothing else; None for all other messages."},
    {"plain_call_frame", plain_call_frame, METH_VARARGS,
     "plain_call_frame(call_id, method, timeout, request): such a call."},
    {"plain_reply_frame", plain_reply_frame, METH_VARARGS, "plain_reply_frame(call_id, reply): such a status."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_frames",
    .m_doc = "The most frequent frames of RPC.",
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__frames(void)
{
    return PyModuleDef_Init(&module_def);
}
