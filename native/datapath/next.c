/* The await of what comes next in an inbox: an item (Inbox.wait()), or a message (what conn.recv() returns).
 *
 * What lies there is the result without more ado. Else the first in line lets the reactor poll, and then the event loop
 * has other tasks run until an item comes; Wait is the future for that. One that is cancelled in between loses nothing:
 * the item it has got goes back. To asyncio it is a coroutine (send, throw, close), by hand: coroutines of Python's, one
 * inside the other, took a third of the time of a message there and back. */
#include "datapath.h"

enum next_state { NEXT_NEW, NEXT_IN_LINE, NEXT_RESTS, NEXT_OVER };

typedef struct {
    PyObject_HEAD
    Inbox *inbox;
    Receiver *receiver;   /* whose messages they are; NULL: the item as it is */
    Wait *wait;           /* while it is in line, and until it runs again */
    PyObject *rest;       /* a coroutine that receives a large message */
    long long started_ns; /* of a wait that a governor learns from, or 0 */
    enum next_state state;
    char runs, iterates, of_messages;
} Next;

PyObject *next_new(Inbox *inbox, Receiver *receiver, bool iterates)
{
    Next *next = (Next *)spare_take(&inbox->spare_next);

    if (!next && !(next = (Next *)PyType_GenericAlloc(next_type, 0)))
        return NULL;
    next->state = NEXT_NEW;
    next->started_ns = 0;
    next->of_messages = receiver != NULL;
    next->inbox = (Inbox *)Py_NewRef((PyObject *)inbox);
    next->receiver = (Receiver *)Py_XNewRef((PyObject *)receiver);
    next->iterates = iterates;
    return (PyObject *)next;
}

/* --- its steps; each returns what the await does next, with the result or what it waits for in `value` --------------- */

/* An item, whose reference is ours now. */
static PySendResult take(Next *next, PyObject *item, PyObject **value)
{
    PyObject *message;

    if (!next->receiver) {
        *value = item;
        return PYGEN_RETURN;
    }
    message = receiver_take(next->receiver, item);
    Py_DECREF(item);
    if (!message)
        return PYGEN_ERROR;
    if (PyBytes_CheckExact(message)) {
        *value = message;
        return PYGEN_RETURN;
    }
    next->rest = PyObject_CallMethod(next->receiver->sender->connection, "_recv_large", "N", message);
    if (!next->rest)
        return PYGEN_ERROR;
    next->state = NEXT_RESTS;
    return PyIter_Send(next->rest, Py_None, value);
}

static void learn(const Next *next)
{
    if (next->started_ns)
        governor_learn(next->inbox->governor, now_ns() - next->started_ns);
}

/* The wait is over, or has yet to be. */
static PySendResult look(Next *next, PyObject **value)
{
    PyObject *item;
    PySendResult sent = wait_send((PyObject *)next->wait, NULL, &item);

    if (sent != PYGEN_RETURN) {
        *value = item;
        return sent;
    }
    wait_over(next->wait);
    next->wait = NULL;
    inbox_runs(next->inbox);
    learn(next);
    return take(next, item, value);
}

static PySendResult line_up(Next *next, PyObject **value)
{
    next->wait = wait_new(next->inbox);
    if (!next->wait || objects_append(&next->inbox->waiters, (PyObject *)next->wait))
        return PYGEN_ERROR;
    resumed_set(&next->inbox->resumed, RESUMED_NEXT, next, sizeof(*next));
    next->state = NEXT_IN_LINE;
    return look(next, value);
}

/* A message is awaited in the loop of its connection, which says so otherwise. Whoever asks for an item has looked. */
static bool in_its_loop(const Next *next)
{
    PyObject *loop, *result;

    if (!next->receiver)
        return true;
    loop = PyObject_CallFunctionObjArgs(running_loop, NULL);
    if (!loop)
        return false;
    Py_DECREF(loop);
    if (loop == next->inbox->table->loop && table_here(next->inbox->table))
        return true;
    result = PyObject_CallMethod(next->receiver->sender->connection, "_check_loop", NULL);
    Py_XDECREF(result);
    return result != NULL;
}

static bool has_failed(const Inbox *inbox)
{
    PyObject *error;

    if (!inbox->make_error)
        return false;
    error = PyObject_CallFunctionObjArgs(inbox->make_error, NULL);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return true;
}

/* Nothing lies there: polls, if nobody else waits. */
static PySendResult poll_or_wait(Next *next, PyObject **value)
{
    Inbox *inbox = next->inbox;
    PyObject *item;

    if (!in_its_loop(next) || has_failed(inbox))
        return PYGEN_ERROR;
    if (!inbox->cq || inbox->waiters.count)
        return line_up(next, value);
    if (inbox->governor)
        next->started_ns = now_ns();
    if (inbox_spin(inbox, inbox_has, (PyObject *)inbox))
        return PYGEN_ERROR;
    if ((item = objects_pop(&inbox->items))) {
        learn(next);
        return take(next, item, value);
    }
    return has_failed(inbox) ? PYGEN_ERROR : line_up(next, value);
}

static PySendResult begin(Next *next, PyObject **value)
{
    PyObject *item = table_here(next->inbox->table) ? objects_pop(&next->inbox->items) : NULL;

    return item ? take(next, item, value) : poll_or_wait(next, value);
}

/* --- as a coroutine ------------------------------------------------------------------------------------------------- */

static bool is_free(bool taken)
{
    if (taken)
        PyErr_SetString(PyExc_RuntimeError, "what comes next is being awaited already");
    return !taken;
}

static bool may_run(const Next *next)
{
    if (next->state != NEXT_OVER)
        return is_free(next->runs);
    PyErr_SetString(PyExc_RuntimeError, "what came next was awaited before, and cannot be again");
    return false;
}

/* It is in line no more; an item it has got is the next one again. -1 and an exception. */
static int leave_line(Next *next)
{
    Inbox *inbox = next->inbox;
    Wait *wait = next->wait;
    PyObject *item, *result;
    int rc = 0;

    next->wait = NULL;
    if (!objects_remove(&inbox->waiters, (PyObject *)wait) && (item = wait_item(wait))) {
        inbox_runs(inbox);
        if (inbox->give_back) {
            result = PyObject_CallFunctionObjArgs(inbox->give_back, item, NULL);
            rc = result ? 0 : -1;
            Py_XDECREF(result);
        } else if (inbox_put(inbox, item, true) < 0) {
            rc = -1;
        }
    }
    Py_DECREF((PyObject *)wait);
    return rc;
}

/* An exception that is set ends it. */
static void fails(Next *next)
{
    PyObject *type, *value, *traceback;

    next->state = NEXT_OVER;
    PyErr_Fetch(&type, &value, &traceback);
    if (next->wait && leave_line(next))
        table_unraisable(next->inbox->table);
    PyErr_Restore(type, value, traceback);
    if (next->iterates && PyErr_ExceptionMatches(closed_error)) {
        PyErr_Clear();
        PyErr_SetNone(PyExc_StopAsyncIteration);
    }
}

/* It has returned. A spare one has no inbox, whose it is. */
static void over(Next *next)
{
    Inbox *inbox = next->inbox;

    next->state = NEXT_OVER;
    next->inbox = NULL;
    Py_CLEAR(next->receiver);
    Py_CLEAR(next->rest);
    spare_put(&inbox->spare_next, Py_NewRef((PyObject *)next));
    Py_DECREF((PyObject *)inbox);
}

static PySendResult next_send(PyObject *self, PyObject *arg, PyObject **value)
{
    Next *next = (Next *)self;
    PySendResult sent;

    *value = NULL;
    if (!may_run(next) || !is_free(next->wait && wait_has_task(next->wait)))
        return PYGEN_ERROR; /* of whoever asks; the one that awaits it goes on */
    next->runs = 1;
    if (next->state == NEXT_NEW)
        sent = begin(next, value);
    else if (next->state == NEXT_IN_LINE)
        sent = look(next, value);
    else
        sent = PyIter_Send(next->rest, arg, value);
    next->runs = 0;
    if (sent == PYGEN_ERROR)
        fails(next);
    else if (sent == PYGEN_RETURN)
        over(next);
    return sent;
}

static PyObject *next_await(PyObject *self)
{
    const Next *next = (Next *)self;

    return is_free(next->runs || next->wait || next->state == NEXT_RESTS) ? Py_NewRef(self) : NULL;
}

static PyObject *next_iternext(PyObject *self)
{
    PyObject *value;
    PySendResult sent = next_send(self, Py_None, &value);

    return sent_as_iterator(sent, value);
}

static PyObject *send(PyObject *self, PyObject *arg)
{
    PyObject *value;
    PySendResult sent = next_send(self, arg, &value);

    return sent_as_iterator(sent, value);
}

/* Raises what throw() was given: an instance, or a class with or without one. */
static void set_thrown(PyObject *args)
{
    PyObject *type, *value = NULL, *traceback = NULL;

    if (!PyArg_UnpackTuple(args, "throw", 1, 3, &type, &value, &traceback))
        return;
    if (PyExceptionInstance_Check(type)) {
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    } else if (PyExceptionClass_Check(type)) {
        traceback = traceback == Py_None ? NULL : traceback;
        PyErr_Restore(Py_NewRef(type), Py_XNewRef(value), Py_XNewRef(traceback));
    } else {
        PyErr_SetString(PyExc_TypeError, "throw() takes an exception");
    }
}

static PyObject *throw(PyObject *self, PyObject *args)
{
    Next *next = (Next *)self;
    PyObject *method, *value = NULL;

    if (!may_run(next))
        return NULL;
    if (next->state != NEXT_RESTS) {
        set_thrown(args);
        fails(next);
        return NULL;
    }
    next->runs = 1;
    method = PyObject_GetAttrString(next->rest, "throw");
    if (method)
        value = PyObject_Call(method, args, NULL);
    Py_XDECREF(method);
    next->runs = 0;
    if (!value)
        fails(next);
    return value;
}

static PyObject *next_close(PyObject *self, PyObject *unused)
{
    Next *next = (Next *)self;
    PyObject *result;

    (void)unused;
    if (!is_free(next->runs))
        return NULL;
    next->state = NEXT_OVER;
    if (next->wait && leave_line(next))
        return NULL;
    if (next->rest) {
        result = PyObject_CallMethod(next->rest, "close", NULL);
        Py_CLEAR(next->rest);
        return result;
    }
    Py_RETURN_NONE;
}

/* --- the type ------------------------------------------------------------------------------------------------------- */

static PyObject *get_name(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(!((Next *)self)->of_messages ? "Inbox.wait"
                                : ((Next *)self)->iterates ? "Connection.__anext__"
                                                           : "Connection.recv");
}

static int next_traverse(PyObject *self, visitproc visit, void *arg)
{
    Next *next = (Next *)self;

    Py_VISIT((PyObject *)next->inbox);
    Py_VISIT((PyObject *)next->receiver);
    Py_VISIT((PyObject *)next->wait);
    Py_VISIT(next->rest);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int next_clear(PyObject *self)
{
    Next *next = (Next *)self;

    if (next->wait)
        objects_remove(&next->inbox->waiters, (PyObject *)next->wait);
    Py_CLEAR(next->wait);
    Py_CLEAR(next->rest);
    return 0;
}

/* Nobody will await it (any more): says so if nobody ever did, as Python does of its own coroutines. */
static void next_finalize(PyObject *self)
{
    Next *next = (Next *)self;
    PyObject *type, *value, *traceback;
    int rc = 0;

    PyErr_Fetch(&type, &value, &traceback);
    if (next->receiver && next->state == NEXT_NEW)
        rc = PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s' was never awaited",
                              next->iterates ? "Connection.__anext__" : "Connection.recv");
    next->state = NEXT_OVER;
    if (rc)
        table_unraisable(next->inbox->table);
    if (next->wait && leave_line(next))
        table_unraisable(next->inbox->table);
    PyErr_Restore(type, value, traceback);
}

static void next_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    next_finalize(self);
    next_clear(self);
    Py_CLEAR(((Next *)self)->receiver);
    Py_CLEAR(((Next *)self)->inbox);
    object_free(self);
}

static PyMethodDef next_methods[] = {
    {"send", send, METH_O, "As a coroutine's."},
    {"throw", throw, METH_VARARGS, "As a coroutine's; what it has got is the next one again."},
    {"close", next_close, METH_NOARGS, "As a coroutine's; what it has got is the next one again."},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "Next[item]"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef next_getset[] = {
    {"__name__", get_name, NULL, "What was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef next_members[] = {
    {"cr_running", T_BOOL, offsetof(Next, runs), READONLY, "As a coroutine's."},
    {"cr_await", T_OBJECT, offsetof(Next, rest), READONLY, "As a coroutine's, while a large message is received."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot next_slots[] = {
    {Py_tp_dealloc, next_dealloc}, {Py_tp_traverse, next_traverse}, {Py_tp_clear, next_clear},
    {Py_tp_methods, next_methods}, {Py_tp_members, next_members},   {Py_tp_getset, next_getset},
    {Py_am_await, next_await},     {Py_am_send, (void *)next_send},    {Py_tp_finalize, next_finalize},
    {Py_tp_iter, PyObject_SelfIter}, {Py_tp_iternext, next_iternext},
    {Py_tp_doc, "The await of what comes next in an inbox: a coroutine, as far as asyncio can tell."},
    {0, NULL},
};

PyType_Spec next_spec = {
    .name = "aiordma._native._datapath.Next",
    .basicsize = sizeof(Next),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = next_slots,
};
