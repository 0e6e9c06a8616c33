/* What a user calls for every small message and one-sided operation. Connection derives from this type and has all the
 * rest: what cannot be done at once goes to its methods of the same names with `later`. No Python runs in between. */
#include "datapath.h"

typedef struct {
    PyObject_HEAD
    Sender *sends;      /* NULL until the queue pair is made */
    Receiver *receives; /* likewise */
    const void *ledger, *qp; /* of `sends`: to be fetched with it, and for nothing else */
} Endpoint;

static PyObject *endpoint_send(PyObject *self, PyObject *data)
{
    Endpoint *endpoint = (Endpoint *)self;
    Sender *sender = endpoint->sends;
    int goes;

    sender_fetch(sender, endpoint->ledger, endpoint->qp);
    prefetch(endpoint->receives, sizeof(Receiver)); /* an answer may be awaited next */
    goes = sender ? sender_send(sender, data) : 0;
    if (endpoint->receives)
        receiver_expects(endpoint->receives);
    if (goes > 0) {
        endpoint->ledger = sender->ledger;
        endpoint->qp = sender->qp;
        return Py_NewRef(sender->table->done);
    }
    return goes < 0 ? NULL : PyObject_CallMethodObjArgs(self, name_send_later, data, NULL);
}

/* The method takes the arguments as they are. */
static PyObject *later(PyObject *self, PyObject *name, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    PyObject *method = PyObject_GetAttr(self, name), *positional = PyTuple_New(count), *result = NULL;
    PyObject *named = names ? PyDict_New() : NULL;
    bool made = method && positional && (named || !names);

    for (Py_ssize_t i = 0; made && i < count; i++)
        made = !PyTuple_SetItem(positional, i, Py_NewRef(args[i]));
    for (Py_ssize_t i = 0; made && names && i < PyTuple_Size(names); i++)
        made = !PyDict_SetItem(named, PyTuple_GetItem(names, i), args[count + i]);
    if (made)
        result = PyObject_Call(method, positional, named);
    Py_XDECREF(method);
    Py_XDECREF(positional);
    Py_XDECREF(named);
    return result;
}

/* The value of the only keyword, or None if there is none. NULL: there are others, or other ones. */
static PyObject *only_notify(PyObject *const *named, PyObject *names)
{
    if (!names)
        return Py_None;
    if (PyTuple_Size(names) != 1 || PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), "notify"))
        return NULL;
    return named[0];
}

static PyObject *endpoint_write(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Sender *sender = ((Endpoint *)self)->sends;
    PyObject *notify = only_notify(args + count, names);

    if (count == 2 && sender && notify) {
        OneSided *op = sender_write(sender, args[0], args[1], notify);

        if (op || PyErr_Occurred())
            return (PyObject *)op;
    }
    return later(self, name_write_later, args, count, names);
}

static PyObject *endpoint_read(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Sender *sender = ((Endpoint *)self)->sends;

    if (count == 1 && !names && sender) {
        OneSided *op = sender_ask(sender, args[0], IBV_WR_RDMA_READ, 0, 0);

        if (op || PyErr_Occurred())
            return (PyObject *)op;
    }
    return later(self, name_read_later, args, count, names);
}

static PyObject *endpoint_read_into(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Sender *sender = ((Endpoint *)self)->sends;

    if (count == 2 && !names && sender) {
        OneSided *op = sender_read_into(sender, args[0], args[1]);

        if (op || PyErr_Occurred())
            return (PyObject *)op;
    }
    return later(self, name_read_into_later, args, count, names);
}

static PyObject *endpoint_fetch_add(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Sender *sender = ((Endpoint *)self)->sends;
    uint64_t value;

    if (count == 2 && !names && sender && sender_word(args[1], &value)) {
        OneSided *op = sender_ask(sender, args[0], IBV_WR_ATOMIC_FETCH_AND_ADD, value, 0);

        if (op || PyErr_Occurred())
            return (PyObject *)op;
    }
    return later(self, name_fetch_add_later, args, count, names);
}

static PyObject *endpoint_compare_swap(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Sender *sender = ((Endpoint *)self)->sends;
    uint64_t expected, desired;

    if (count == 3 && !names && sender && sender_word(args[1], &expected) && sender_word(args[2], &desired)) {
        OneSided *op = sender_ask(sender, args[0], IBV_WR_ATOMIC_CMP_AND_SWP, expected, desired);

        if (op || PyErr_Occurred())
            return (PyObject *)op;
    }
    return later(self, name_compare_swap_later, args, count, names);
}

static PyObject *next_message(PyObject *self, bool iterates)
{
    Receiver *receiver = ((Endpoint *)self)->receives;

    if (receiver) {
        prefetch(receiver->messages, offsetof(Inbox, resumed));
        return next_new(receiver->messages, receiver, iterates);
    }
    PyErr_SetString(misuse_error, "nothing can be received before the connection is made");
    return NULL;
}

static PyObject *endpoint_recv(PyObject *self, PyObject *unused)
{
    (void)unused;
    return next_message(self, false);
}

static PyObject *endpoint_anext(PyObject *self)
{
    return next_message(self, true);
}

/* --- the type ------------------------------------------------------------------------------------------------------- */

static int endpoint_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT((PyObject *)((Endpoint *)self)->sends);
    Py_VISIT((PyObject *)((Endpoint *)self)->receives);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int endpoint_clear(PyObject *self)
{
    Py_CLEAR(((Endpoint *)self)->sends);
    Py_CLEAR(((Endpoint *)self)->receives);
    return 0;
}

static void endpoint_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    endpoint_clear(self);
    object_free(self);
}

static PyObject *get_part(PyObject *part, const char *name)
{
    if (part)
        return Py_NewRef(part);
    PyErr_SetString(PyExc_AttributeError, name);
    return NULL;
}

static PyObject *get_sends(PyObject *self, void *unused)
{
    (void)unused;
    return get_part((PyObject *)((Endpoint *)self)->sends, "_sends");
}

static PyObject *get_receives(PyObject *self, void *unused)
{
    (void)unused;
    return get_part((PyObject *)((Endpoint *)self)->receives, "_receives");
}

/* Set once, and as long as the connection lives: a call under way needs them. */
static int set_part(PyObject **part, PyObject *value, PyTypeObject *type)
{
    if (!value || *part || !PyObject_TypeCheck(value, type)) {
        PyErr_SetString(PyExc_TypeError, "a sender and a receiver, each set once");
        return -1;
    }
    *part = Py_NewRef(value);
    return 0;
}

static int set_sends(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    return set_part((PyObject **)&((Endpoint *)self)->sends, value, sender_type);
}

static int set_receives(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    return set_part((PyObject **)&((Endpoint *)self)->receives, value, receiver_type);
}

static PyMethodDef endpoint_methods[] = {
    {"send", endpoint_send, METH_O,
     "send($self, data, /)\n--\n\n"
     "Sends one message: a buffer object of any size, or a list or tuple of them. Awaiting returns None when `data` may\n"
     "change again. Waits in turn for a credit. Messages arrive in the order they were sent."},
    {"write", (PyCFunction)(void (*)(void))endpoint_write, METH_FASTCALL | METH_KEYWORDS,
     "write($self, data, remote, *, notify=None)\n--\n\n"
     "Writes a buffer object to the start of `remote` (RDMA WRITE). Awaiting returns None when the data is in the peer's\n"
     "memory. `notify` (0 to 2**32 - 1) also wakes the peer's notified() with that value."},
    {"read", (PyCFunction)(void (*)(void))endpoint_read, METH_FASTCALL | METH_KEYWORDS,
     "read($self, remote)\n--\n\n"
     "Reads all of `remote` (RDMA READ). Awaiting returns the bytes."},
    {"read_into", (PyCFunction)(void (*)(void))endpoint_read_into, METH_FASTCALL | METH_KEYWORDS,
     "read_into($self, remote, buffer)\n--\n\n"
     "Reads all of `remote` into the start of a writable buffer object. Awaiting returns the number of bytes. The buffer\n"
     "belongs to the device until then."},
    {"fetch_add", (PyCFunction)(void (*)(void))endpoint_fetch_add, METH_FASTCALL | METH_KEYWORDS,
     "fetch_add($self, remote, value)\n--\n\n"
     "Adds `value` to 8 remote bytes, atomically. Awaiting returns the old value."},
    {"compare_swap", (PyCFunction)(void (*)(void))endpoint_compare_swap, METH_FASTCALL | METH_KEYWORDS,
     "compare_swap($self, remote, expected, desired)\n--\n\n"
     "Replaces 8 remote bytes by `desired` if they are `expected`, atomically. Awaiting returns the old value."},
    {"recv", endpoint_recv, METH_NOARGS,
     "recv($self, /)\n--\n\n"
     "The next message, in the order they were sent; several receivers are served in turn. Cancelled: no message is\n"
     "lost."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef endpoint_getset[] = {
    {"_sends", get_sends, set_sends, "The Sender.", NULL},
    {"_receives", get_receives, set_receives, "The Receiver.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot endpoint_slots[] = {
    {Py_tp_dealloc, endpoint_dealloc}, {Py_tp_traverse, endpoint_traverse}, {Py_tp_clear, endpoint_clear},
    {Py_tp_methods, endpoint_methods}, {Py_tp_getset, endpoint_getset},
    {Py_am_aiter, PyObject_SelfIter},  {Py_am_anext, endpoint_anext},
    {Py_tp_doc, "What is done at once of a connection's messages and one-sided operations."},
    {0, NULL},
};

PyType_Spec endpoint_spec = {
    .name = "aiordma._native._datapath.Endpoint",
    .basicsize = sizeof(Endpoint),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = endpoint_slots,
};
