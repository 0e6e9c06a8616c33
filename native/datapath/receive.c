/* Posted receives, and the messages that arrive in them.
 *
 * Ring      the buffers posted to one queue pair or one shared receive queue, and who its users are
 * Buffer    one of them; in the pending table while it is posted, in an inbox while it holds a message
 * Receiver  one user: its credits and its inbox. ReceiveQueue derives from it and has all that is rare:
 *             completed(buffer, status, opcode, byte_len, imm, vendor_err)  what is no message in good order
 *             refused(error)           the frame breaks the protocol, or a receive could not be posted again
 *             left(buffer)             a buffer comes back after the receiver was closed
 *             used()                   as many messages were taken as ledger.mark says */
#include "datapath.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

/* --- Ring -------------------------------------------------------------------------------------------- */

static Receiver *ring_user(Ring *ring, uint32_t qp_num)
{
    struct user *user;

    if (ring->last && ring->last_qp_num == qp_num)
        return ring->last;
    user = users_find(&ring->users, qp_num);
    if (!user)
        return NULL;
    prefetch(user->receiver, sizeof(Receiver));
    prefetch(user->ledger, sizeof(Ledger));
    prefetch(user->messages, sizeof(Inbox));
    prefetch(user->sender, offsetof(Sender, groups));
    user->ledger = user->receiver->ledger;
    ring->last = user->receiver;
    ring->last_qp_num = qp_num;
    return ring->last;
}

static int post_failed(const Ring *ring, int rc)
{
    PyObject *error = PyObject_CallFunction(device_error, "is", rc, ring->srq ? "ibv_post_srq_recv" : "ibv_post_recv");

    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return -1;
}

/* Posts one buffer that is not posted. -1 and DeviceError when the device refuses. */
static int ring_post(Ring *ring, Buffer *buffer)
{
    int rc;

    if (table_add(ring->table, (PyObject *)buffer, &buffer->wr_id))
        return -1;
    rc = ring->srq ? glue_post_srq_recv(ring->srq, buffer->wr_id, buffer->address, ring->size, buffer->lkey)
                   : glue_post_recv(ring->qp, buffer->wr_id, buffer->address, ring->size, buffer->lkey);
    if (rc) {
        table_remove(ring->table, buffer->wr_id, (PyObject *)buffer);
        return post_failed(ring, rc);
    }
    buffer->posted = 1;
    ring->posted++;
    return 0;
}

static PyObject *ring_add(PyObject *self, PyObject *args)
{
    Ring *ring = (Ring *)self;
    Buffer *buffer;
    PyObject *owner;
    unsigned long long address;
    unsigned long lkey;

    if (!PyArg_ParseTuple(args, "OKk", &owner, &address, &lkey))
        return NULL;
    buffer = (Buffer *)PyType_GenericAlloc(buffer_type, 0);
    if (!buffer)
        return NULL;
    buffer->ring = (Ring *)Py_NewRef(self);
    buffer->owner = Py_NewRef(owner);
    buffer->address = address;
    buffer->lkey = (uint32_t)lkey;
    buffer->index = PyList_Size(ring->buffers);
    if (PyList_Append(ring->buffers, (PyObject *)buffer)) {
        Py_DECREF((PyObject *)buffer);
        return NULL;
    }
    return (PyObject *)buffer;
}

static PyObject *ring_post_method(PyObject *self, PyObject *buffer)
{
    if (Py_TYPE(buffer) != buffer_type || ((Buffer *)buffer)->ring != (Ring *)self) {
        PyErr_SetString(PyExc_TypeError, "post() takes a buffer of this ring");
        return NULL;
    }
    if (((Buffer *)buffer)->posted) {
        PyErr_SetString(misuse_error, "the buffer is posted already");
        return NULL;
    }
    if (ring_post((Ring *)self, (Buffer *)buffer))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *ring_enter(PyObject *self, PyObject *args)
{
    Ring *ring = (Ring *)self;
    unsigned int qp_num;
    PyObject *receiver;

    if (!PyArg_ParseTuple(args, "IO!", &qp_num, receiver_type, &receiver))
        return NULL;
    ring->last = NULL;
    if (users_enter(&ring->users, qp_num, (Receiver *)receiver))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *ring_forget(PyObject *self, PyObject *number)
{
    Ring *ring = (Ring *)self;
    unsigned long qp_num = PyLong_AsUnsignedLong(number);

    if (PyErr_Occurred())
        return NULL;
    ring->last = NULL;
    users_forget(&ring->users, (uint32_t)qp_num);
    Py_RETURN_NONE;
}

static PyObject *payload(const Buffer *buffer)
{
    return PyBytes_FromStringAndSize((const char *)(uintptr_t)(buffer->address + HEADER_SIZE), buffer->length);
}

/* Nothing can touch the buffers any more, and their memory goes: what somebody was woken for and has not taken
 * is copied. */
static PyObject *ring_close(PyObject *self, PyObject *unused)
{
    Ring *ring = (Ring *)self;
    Py_ssize_t count = PyList_Size(ring->buffers);

    (void)unused;
    ring->closed = 1;
    ring->last = NULL;
    users_clear(&ring->users);
    for (Py_ssize_t i = 0; i < count; i++) {
        Buffer *buffer = (Buffer *)PyList_GetItem(ring->buffers, i);

        if (buffer->posted) {
            table_remove(ring->table, buffer->wr_id, (PyObject *)buffer);
            buffer->posted = 0;
        }
        if (buffer->handed && !buffer->copy && !(buffer->copy = payload(buffer)))
            return NULL;
        Py_CLEAR(buffer->owner);
    }
    ring->posted = 0;
    return PyObject_CallMethod(ring->buffers, "clear", NULL);
}

static int ring_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", "size", "qp", "srq", NULL};
    Ring *ring = (Ring *)self;
    unsigned long long qp = 0, srq = 0;
    unsigned long size;
    PyObject *table;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!k|$KK", names, table_type, &table, &size, &qp, &srq))
        return -1;
    if (ring->table || !qp == !srq || size < HEADER_SIZE) {
        PyErr_SetString(PyExc_ValueError, "a ring has one of qp and srq, room for a header, and is made once");
        return -1;
    }
    ring->buffers = PyList_New(0);
    if (!ring->buffers)
        return -1;
    ring->table = (Table *)Py_NewRef(table);
    ring->qp = (struct ibv_qp *)(uintptr_t)qp;
    ring->srq = (struct ibv_srq *)(uintptr_t)srq;
    ring->size = (uint32_t)size;
    return 0;
}

static int ring_traverse(PyObject *self, visitproc visit, void *arg)
{
    Ring *ring = (Ring *)self;
    int rc = users_visit(&ring->users, visit, arg);

    if (rc)
        return rc;
    Py_VISIT((PyObject *)ring->table);
    Py_VISIT(ring->buffers);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int ring_clear(PyObject *self)
{
    Ring *ring = (Ring *)self;

    ring->last = NULL;
    users_clear(&ring->users);
    if (ring->buffers)
        PyList_SetSlice(ring->buffers, 0, PyList_Size(ring->buffers), NULL);
    return 0;
}

static void ring_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    ring_clear(self);
    Py_CLEAR(((Ring *)self)->buffers);
    Py_CLEAR(((Ring *)self)->table);
    object_free(self);
}

static PyMethodDef ring_methods[] = {
    {"add", ring_add, METH_VARARGS, "add(owner, address, lkey): a buffer more, not posted; owner keeps its memory."},
    {"post", ring_post_method, METH_O, "Posts a buffer. Raises DeviceError when the device refuses."},
    {"enter", ring_enter, METH_VARARGS, "enter(qp_num, receiver): what arrives for this queue pair is the receiver's."},
    {"forget", ring_forget, METH_O, "The queue pair is gone: what still completes for it is posted again."},
    {"close", ring_close, METH_NOARGS, "The queue is gone, and its memory goes. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef ring_members[] = {
    {"posted", T_PYSSIZET, offsetof(Ring, posted), READONLY, "How many buffers the device has."},
    {"size", T_UINT, offsetof(Ring, size), READONLY, "Bytes of a buffer."},
    {"buffers", T_OBJECT, offsetof(Ring, buffers), READONLY, "All of them, a list."},
    {"closed", T_BOOL, offsetof(Ring, closed), READONLY, "True after close()."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_init, ring_init},       {Py_tp_dealloc, ring_dealloc}, {Py_tp_traverse, ring_traverse},
    {Py_tp_clear, ring_clear},     {Py_tp_methods, ring_methods}, {Py_tp_members, ring_members},
    {Py_tp_doc, "Ring(table, size, *, qp=0, srq=0): the receives of a queue pair, or of a shared queue."},
    {0, NULL},
};

PyType_Spec ring_spec = {
    .name = "aiordma._native._datapath.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = ring_slots,
};

/* --- Buffer ------------------------------------------------------------------------------------------ */

static PyObject *buffer_frame(PyObject *self, PyObject *arg)
{
    Buffer *buffer = (Buffer *)self;
    Py_ssize_t nbytes = PyLong_AsSsize_t(arg);

    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    if (buffer->ring->closed || nbytes < 0 || nbytes > (Py_ssize_t)buffer->ring->size) {
        PyErr_SetString(PyExc_ValueError, "a frame is no longer than its buffer, and gone with it");
        return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)(uintptr_t)buffer->address, nbytes);
}

/* The message leaves the buffer, which is free then. */
static PyObject *buffer_leave(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (((Buffer *)self)->copy)
        return Py_NewRef(((Buffer *)self)->copy);
    return payload((Buffer *)self);
}

static PyObject *get_message_address(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((Buffer *)self)->address + HEADER_SIZE);
}

static int buffer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Buffer *buffer = (Buffer *)self;

    Py_VISIT((PyObject *)buffer->ring);
    Py_VISIT(buffer->owner);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int buffer_clear(PyObject *self)
{
    Py_CLEAR(((Buffer *)self)->owner);
    return 0;
}

static void buffer_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    buffer_clear(self);
    Py_CLEAR(((Buffer *)self)->copy);
    Py_CLEAR(((Buffer *)self)->ring);
    object_free(self);
}

static PyMethodDef buffer_methods[] = {
    {"frame", buffer_frame, METH_O, "frame(nbytes): the first bytes of what has arrived."},
    {"message", buffer_leave, METH_NOARGS, "The message, copied."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef buffer_getset[] = {
    {"address", get_message_address, NULL, "Where the message begins.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef buffer_members[] = {
    {"index", T_PYSSIZET, offsetof(Buffer, index), READONLY, "Its place in the ring."},
    {"length", T_UINT, offsetof(Buffer, length), READONLY, "Bytes of the message."},
    {"posted", T_BOOL, offsetof(Buffer, posted), READONLY, "The device has it."},
    {"owner", T_OBJECT, offsetof(Buffer, owner), READONLY, "Who keeps the memory."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_dealloc, buffer_dealloc}, {Py_tp_traverse, buffer_traverse}, {Py_tp_clear, buffer_clear},
    {Py_tp_methods, buffer_methods}, {Py_tp_getset, buffer_getset},     {Py_tp_members, buffer_members},
    {Py_tp_doc, "One receive buffer of a ring."},
    {0, NULL},
};

PyType_Spec buffer_spec = {
    .name = "aiordma._native._datapath.Buffer",
    .basicsize = sizeof(Buffer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = buffer_slots,
};

/* --- Receiver: helpers ------------------------------------------------------------------------------- */

struct header {
    uint8_t kind, flags;
    uint16_t reserved;
    uint32_t length, data, control;
};

/* True when the buffer holds a message in good order; check_header() of protocol/frames.py says what is wrong with
 * the rest. */
static bool message_header(Buffer *buffer, uint32_t byte_len, struct header *header)
{
    if (byte_len < HEADER_SIZE)
        return false;
    memcpy(header, (const void *)(uintptr_t)buffer->address, sizeof(*header));
    buffer->length = byte_len - HEADER_SIZE;
    return header->kind == FRAME_MESSAGE && !header->flags && !header->reserved &&
           ntohl(header->length) == buffer->length;
}

/* The exception that is set is told to the receiver, which ends the connection. */
static int refuse(Receiver *receiver)
{
    PyObject *type, *value, *traceback, *result;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    result = PyObject_CallMethod((PyObject *)receiver, "refused", "O", value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int hand_over(Receiver *receiver, Buffer *buffer, bool front)
{
    int given;

    if (receiver->messages->waiters.count)
        resumed_prefetch(&receiver->messages->resumed);
    given = inbox_put(receiver->messages, (PyObject *)buffer, front);
    if (given > 0) {
        buffer->handed = 1;
        receiver->handed++;
    }
    return given < 0 ? -1 : 0;
}

static void not_handed(Receiver *receiver, Buffer *buffer)
{
    if (buffer->handed) {
        buffer->handed = 0;
        receiver->handed--;
    }
}

/* --- Receiver: what is taken ------------------------------------------------------------------------- */

/* A credit is owed for a message that was taken. */
static int owe(Receiver *receiver)
{
    Ledger *ledger = receiver->ledger;

    if (!ledger || receiver->closed)
        return 0;
    if (ledger_release(ledger))
        return -1;
    if (ledger->data_released >= ledger->mark && call_none((PyObject *)receiver, name_used))
        return -1;
    return ledger_update_due(ledger) ? sender_control(receiver->sender) : 0;
}

/* The message was taken: its buffer is posted again, and its credit is owed. */
static int recycle(Receiver *receiver, Buffer *buffer)
{
    if (receiver->closed) {
        PyObject *result = PyObject_CallMethod((PyObject *)receiver, "left", "O", (PyObject *)buffer);

        Py_XDECREF(result);
        return result ? 0 : -1;
    }
    if (ring_post(buffer->ring, buffer))
        return refuse(receiver);
    receiver->expected = (struct expected){
        .buffer = buffer,
        .ring = buffer->ring,
        .slot = table_slot(buffer->ring->table, buffer->wr_id),
        .data = (const void *)(uintptr_t)buffer->address,
    };
    return owe(receiver);
}

void receiver_expects(const Receiver *receiver)
{
    const struct expected *expected = &receiver->expected;

    prefetch(receiver->messages, offsetof(Inbox, resumed));
    prefetch(expected->buffer, sizeof(Buffer));
    prefetch(expected->ring, sizeof(Ring));
    prefetch(expected->slot, sizeof(struct pending));
    prefetch(expected->data, SMALL);
}

/* --- Receiver: what arrives -------------------------------------------------------------------------- */

/* A consumer gets messages while its reader waits in line: what the reader has and has not handled, or what lies in the
 * inbox, comes before. One that wants to be called by the event loop only gets none inside the await of a task. */
static bool consumes(const Receiver *receiver)
{
    if (receiver->messages->table->spinning && !receiver->consumes_inline)
        return false;
    return receiver->consumer && receiver->consumer != Py_None && receiver->messages->waiters.count && !receiver->messages->items.count;
}

static int consume(Receiver *receiver, Buffer *buffer)
{
    PyObject *message = payload(buffer), *until;

    if (!message || recycle(receiver, buffer)) {
        Py_XDECREF(message);
        return -1;
    }
    receiver->messages->table->handed_out++;
    until = PyObject_CallFunctionObjArgs(receiver->consumer, message, NULL);
    Py_DECREF(message);
    if (until && until != Py_None)
        until = PyObject_CallMethod(receiver->sender->connection, "hold", "N", until);
    Py_XDECREF(until);
    return until ? 0 : -1;
}

/* A message that breaks the protocol: its buffer is free, and the connection ends. */
static int refuse_message(Receiver *receiver, Buffer *buffer)
{
    PyObject *type, *value, *traceback, *result;

    PyErr_Fetch(&type, &value, &traceback);
    result = PyObject_CallMethod((PyObject *)receiver, "left", "O", (PyObject *)buffer);
    if (!result)
        table_unraisable(receiver->messages->table);
    Py_XDECREF(result);
    PyErr_Restore(type, value, traceback);
    return refuse(receiver);
}

static int message_arrived(Receiver *receiver, Buffer *buffer, const struct header *header)
{
    Ledger *ledger = receiver->ledger;
    int more;

    if (ledger_receive_data(ledger) || (more = ledger_learn(ledger, ntohl(header->data), ntohl(header->control))) < 0)
        return refuse_message(receiver, buffer);
    receiver->received++;
    if (!consumes(receiver)) {
        if (hand_over(receiver, buffer, false))
            return -1;
    } else if (consume(receiver, buffer)) {
        table_unraisable(receiver->messages->table); /* the frame's credits count all the same */
    }
    if (receiver->closed)
        return 0;
    if (more && sender_pump(receiver->sender))
        return -1;
    return ledger_update_due(ledger) ? sender_control(receiver->sender) : 0;
}

int buffer_completed(Buffer *buffer, const struct glue_wc *wc)
{
    Ring *ring = buffer->ring;
    Receiver *receiver;
    struct header header;
    int rc;

    buffer->posted = 0;
    ring->posted--;
    receiver = ring_user(ring, wc->qp_num);
    if (!receiver) /* of a queue pair that is gone: the receive is for the others */
        return ring->closed ? 0 : ring_post(ring, buffer);
    Py_INCREF((PyObject *)receiver);
    if (wc->status == IBV_WC_SUCCESS && wc->opcode == IBV_WC_RECV && receiver->ledger && !receiver->closed &&
        message_header(buffer, wc->byte_len, &header)) {
        rc = message_arrived(receiver, buffer, &header);
    } else {
        PyObject *result = PyObject_CallMethod((PyObject *)receiver, "completed", "OIIIII", (PyObject *)buffer,
                                               wc->status, wc->opcode, wc->byte_len, wc->imm, wc->vendor_err);
        rc = result ? 0 : -1;
        Py_XDECREF(result);
    }
    Py_DECREF((PyObject *)receiver);
    return rc;
}

/* --- Receiver: in Python ----------------------------------------------------------------------------- */

PyObject *receiver_take(Receiver *receiver, PyObject *item)
{
    Buffer *buffer = (Buffer *)item;
    PyObject *message;

    if (Py_TYPE(item) != buffer_type)
        return Py_NewRef(item);
    message = buffer->copy ? Py_NewRef(buffer->copy) : payload(buffer);
    if (!message)
        return NULL;
    not_handed(receiver, buffer);
    if (recycle(receiver, buffer))
        Py_CLEAR(message);
    return message;
}

static PyObject *take(PyObject *self, PyObject *item)
{
    return receiver_take((Receiver *)self, item);
}

static PyObject *take_next(PyObject *self, PyObject *unused)
{
    Receiver *receiver = (Receiver *)self;
    PyObject *item, *message;

    (void)unused;
    if (!receiver->sender || !table_here(receiver->sender->table) || !(item = objects_pop(&receiver->messages->items)))
        Py_RETURN_NONE;
    message = receiver_take(receiver, item);
    Py_DECREF(item);
    return message;
}

static PyObject *take_into(PyObject *self, PyObject *args)
{
    Receiver *receiver = (Receiver *)self;
    Buffer *buffer;
    PyObject *item, *length = NULL;
    Py_buffer view;

    if (!PyArg_ParseTuple(args, "O!w*", buffer_type, &item, &view))
        return NULL;
    buffer = (Buffer *)item;
    if (view.len < (Py_ssize_t)buffer->length) {
        PyErr_SetString(PyExc_ValueError, "the message does not fit");
    } else {
        const void *from = (const void *)(uintptr_t)(buffer->address + HEADER_SIZE);

        memcpy(view.buf, buffer->copy ? PyBytes_AsString(buffer->copy) : from, buffer->length);
        length = PyLong_FromUnsignedLong(buffer->length);
        not_handed(receiver, buffer);
        if (length && recycle(receiver, buffer))
            Py_CLEAR(length);
    }
    PyBuffer_Release(&view);
    return length;
}

static PyObject *receiver_recycle(PyObject *self, PyObject *item)
{
    if (Py_TYPE(item) != buffer_type) {
        PyErr_SetString(PyExc_TypeError, "recycle() takes a buffer");
        return NULL;
    }
    if (recycle((Receiver *)self, (Buffer *)item))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *receiver_lend(PyObject *self, PyObject *item)
{
    if (Py_TYPE(item) == buffer_type)
        not_handed((Receiver *)self, (Buffer *)item);
    Py_RETURN_NONE;
}

static PyObject *receiver_owe(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (owe((Receiver *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *receiver_return(PyObject *self, PyObject *item)
{
    Receiver *receiver = (Receiver *)self;

    if (Py_TYPE(item) == buffer_type) {
        not_handed(receiver, (Buffer *)item);
        if (hand_over(receiver, (Buffer *)item, true))
            return NULL;
    } else if (inbox_put(receiver->messages, item, true) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static int receiver_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sender", "messages", NULL};
    Receiver *receiver = (Receiver *)self;
    PyObject *sender, *messages;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!", names, sender_type, &sender, inbox_type, &messages))
        return -1;
    if (receiver->sender) {
        PyErr_SetString(PyExc_ValueError, "a receiver is made once");
        return -1;
    }
    receiver->sender = (Sender *)Py_NewRef(sender);
    receiver->messages = (Inbox *)Py_NewRef(messages);
    return 0;
}

static int receiver_traverse(PyObject *self, visitproc visit, void *arg)
{
    Receiver *receiver = (Receiver *)self;

    Py_VISIT((PyObject *)receiver->ledger);
    Py_VISIT((PyObject *)receiver->sender);
    Py_VISIT((PyObject *)receiver->messages);
    Py_VISIT(receiver->consumer);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int receiver_clear(PyObject *self)
{
    Receiver *receiver = (Receiver *)self;

    receiver->closed = 1;
    Py_CLEAR(receiver->ledger);
    Py_CLEAR(receiver->consumer);
    return 0;
}

static void receiver_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    receiver_clear(self);
    Py_CLEAR(((Receiver *)self)->sender);
    Py_CLEAR(((Receiver *)self)->messages);
    object_free(self);
}

static PyObject *get_ledger(PyObject *self, void *unused)
{
    Ledger *ledger = ((Receiver *)self)->ledger;

    (void)unused;
    return Py_NewRef(ledger ? (PyObject *)ledger : Py_None);
}

static int set_ledger(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    return assign_ledger(&((Receiver *)self)->ledger, value);
}

static PyMethodDef receiver_methods[] = {
    {"take", take, METH_O, "take(item): a message as bytes, its buffer posted again; other items as they are."},
    {"take_next", take_next, METH_NOARGS, "take() of the next item; None when there is none, or in another thread."},
    {"take_into", take_into, METH_VARARGS, "take_into(buffer, writable): as take(), copied there; returns its length."},
    {"lend", receiver_lend, METH_O, "lend(buffer): its message is taken, and looked at where it lies."},
    {"recycle", receiver_recycle, METH_O, "recycle(buffer): posts it again; its credit is owed."},
    {"owe", receiver_owe, METH_NOARGS, "The user has taken something whose receive was posted again."},
    {"put_back", receiver_return, METH_O, "put_back(item): what was taken is the next one again."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef receiver_getset[] = {
    {"ledger", get_ledger, set_ledger, "The credits; None until the handshake is over.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef receiver_members[] = {
    {"messages", T_OBJECT, offsetof(Receiver, messages), READONLY, "The inbox."},
    {"consumer", T_OBJECT, offsetof(Receiver, consumer), 0,
     "Called with each message that comes while somebody waits in line, in whose stead it takes it; or None. What it\n"
     "returns that is not None goes to connection.hold()."},
    {"consumes_inline", T_BOOL, offsetof(Receiver, consumes_inline), 0, "Inside the await of any task, too."},
    {"received", T_LONGLONG, offsetof(Receiver, received), 0, "Messages that have arrived."},
    {"handed", T_PYSSIZET, offsetof(Receiver, handed), READONLY, "Buffers that somebody was woken for."},
    {"closed", T_BOOL, offsetof(Receiver, closed), 0, "Nothing more is taken in."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot receiver_slots[] = {
    {Py_tp_init, receiver_init},       {Py_tp_dealloc, receiver_dealloc}, {Py_tp_traverse, receiver_traverse},
    {Py_tp_clear, receiver_clear},     {Py_tp_methods, receiver_methods}, {Py_tp_members, receiver_members},
    {Py_tp_getset, receiver_getset},
    {Py_tp_doc, "Receiver(sender, messages): one user of a ring, its credits and its inbox."},
    {0, NULL},
};

PyType_Spec receiver_spec = {
    .name = "aiordma._native._datapath.Receiver",
    .basicsize = sizeof(Receiver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = receiver_slots,
};
