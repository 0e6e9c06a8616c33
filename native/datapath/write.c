/* A small write, read or atomic operation: an awaitable with the habits of asyncio's futures, which is an entry of the
 * pending table itself.
 *
 * Most are awaited at once and complete inside the await, so no future is made before somebody has to wait. Work
 * requests of one queue pair complete in the order they were posted: of those that share a doorbell only the last is
 * signaled, and its completion is that of all before it.
 *
 * What comes back lands in a staging buffer, which is the device's until the completion, also after the wait was
 * cancelled; then it is copied out of there, for whoever still waits. */
#include "datapath.h"

static bool is_over(const Write *write)
{
    return write->state > WRITE_POSTED;
}

static bool is_done(PyObject *what)
{
    return is_over((Write *)what);
}

/* Calls the callbacks in the next turn of the loop. Errors there are the table's to report. */
static int schedule_callbacks(Write *write)
{
    PyObject *callbacks = write->callbacks, *call_soon, *kwargs = NULL;
    int rc = 0;

    if (!callbacks)
        return 0;
    write->callbacks = NULL;
    call_soon = PyObject_GetAttrString(write->sender->loop, "call_soon");
    for (Py_ssize_t i = 0; call_soon && !rc && i < PyList_Size(callbacks); i++) {
        PyObject *pair = PyList_GetItem(callbacks, i), *args, *handle = NULL;

        args = PyTuple_Pack(2, PyTuple_GetItem(pair, 0), (PyObject *)write);
        kwargs = PyDict_New();
        if (args && kwargs && !PyDict_SetItemString(kwargs, "context", PyTuple_GetItem(pair, 1)))
            handle = PyObject_Call(call_soon, args, kwargs);
        rc = handle ? 0 : -1;
        Py_XDECREF(handle);
        Py_XDECREF(args);
        Py_XDECREF(kwargs);
    }
    if (!call_soon)
        rc = -1;
    Py_XDECREF(call_soon);
    Py_DECREF(callbacks);
    return rc;
}

static PyObject *outcome(const Write *write)
{
    return write->value ? write->value : Py_None;
}

/* The state is final: wakes who waits. -1 and an exception. */
static int tell(Write *write)
{
    PyObject *done, *result = NULL;

    if (write->future) {
        done = PyObject_CallMethodObjArgs(write->future, name_done, NULL);
        if (!done)
            return -1;
        Py_DECREF(done);
        if (done == Py_False) {
            if (write->state == WRITE_DONE)
                result = PyObject_CallMethodObjArgs(write->future, name_set_result, outcome(write), NULL);
            else if (write->state == WRITE_CANCELLED)
                result = PyObject_CallMethod(write->future, "cancel", NULL);
            else
                result = PyObject_CallMethod(write->future, "set_exception", "O", write->error);
            if (!result)
                return -1;
            Py_DECREF(result);
            write->sender->table->handed_out++;
        }
    }
    return schedule_callbacks(write);
}

static int is_cancelled(PyObject *future) /* -1 and an exception */
{
    PyObject *cancelled = PyObject_CallMethod(future, "cancelled", NULL);

    Py_XDECREF(cancelled);
    return cancelled ? cancelled == Py_True : -1;
}

static int end(Write *write, enum write_state state, PyObject *error)
{
    int cancelled = 0;

    if (is_over(write))
        return 0;
    /* A task that waited for the future was cancelled: so is the write, as with any future. */
    if (write->future && (cancelled = is_cancelled(write->future)) < 0)
        return -1;
    if (cancelled) {
        state = WRITE_CANCELLED;
        error = NULL;
    }
    write->state = state;
    write->error = error ? Py_NewRef(error) : NULL;
    Py_CLEAR(write->data);
    Py_CLEAR(write->region);
    return tell(write);
}

static int notice_cancellation(Write *write)
{
    int cancelled;

    if (is_over(write) || !write->future)
        return 0;
    cancelled = is_cancelled(write->future);
    return cancelled > 0 ? end(write, WRITE_CANCELLED, NULL) : cancelled;
}

/* What came back. NULL and an exception. */
static PyObject *landed(const Write *write)
{
    const char *at = (const char *)(uintptr_t)write->address;
    uint64_t word;

    if (write->opcode == IBV_WR_RDMA_READ)
        return PyBytes_FromStringAndSize(at, write->nbytes);
    memcpy(&word, at, sizeof(word)); /* the device has put it there in the order of this machine */
    return PyLong_FromUnsignedLongLong(word);
}

/* The device is done with it, and all went well. */
static int succeed(Write *write)
{
    PyObject *type, *error, *traceback;
    int rc;

    if (!write->nbytes || is_over(write))
        return end(write, WRITE_DONE, NULL);
    write->value = landed(write);
    if (write->value)
        return end(write, WRITE_DONE, NULL);
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    rc = end(write, WRITE_FAILED, error);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return rc;
}

/* --- the device -------------------------------------------------------------------------------------- */

int write_posting(Write *write, struct ibv_send_wr *wr)
{
    Sender *sender = write->sender;

    if (table_add(sender->table, (PyObject *)write, &write->wr_id))
        return -1;
    wr->wr_id = write->wr_id;
    write->in_table = 1;
    if (!is_over(write))
        write->state = WRITE_POSTED;
    Py_INCREF((PyObject *)write);
    if (sender->last)
        sender->last->next = write;
    else
        sender->first = write;
    sender->last = write;
    sender->posted++;
    sender->table->waiting++;
    return 0;
}

/* The device does not have the write (any more), which is not in the list of its sender either. */
static void not_posted(Sender *sender, Write *write)
{
    write->next = NULL;
    if (write->in_table)
        table_remove(sender->table, write->wr_id, (PyObject *)write);
    write->in_table = 0;
    sender->writes--;
    sender->posted--;
    sender->table->waiting--;
}

void write_give_back(Write *write)
{
    PyObject *landing = write->landing;

    write->landing = NULL;
    if (landing)
        sender_give(write->sender, landing);
}

/* Takes the first write off the list of its sender; its reference is the caller's. */
static Write *unlist(Sender *sender)
{
    Write *write = sender->first;

    sender->first = write->next;
    if (!sender->first)
        sender->last = NULL;
    not_posted(sender, write);
    return write;
}

static int failed(Write *write, const struct glue_wc *wc)
{
    PyObject *result = PyObject_CallMethod((PyObject *)write->sender, "write_failed", "OII", (PyObject *)write,
                                           wc->status, wc->vendor_err);

    Py_XDECREF(result);
    return result ? 0 : -1;
}

int write_completed(Write *write, const struct glue_wc *wc)
{
    Sender *sender = write->sender;
    bool last = false;
    int rc = 0;

    write->in_table = 0;
    if (wc->status == IBV_WC_SUCCESS && sender->governor && !is_over(write))
        governor_learn(sender->governor, now_ns() - write->started_ns);
    Py_INCREF((PyObject *)sender);
    while (!last && sender->first) {
        Write *first = unlist(sender);

        last = first == write;
        if (last && wc->status != IBV_WC_SUCCESS)
            rc = failed(first, wc);
        else if (succeed(first))
            table_unraisable(sender->table);
        write_give_back(first);
        Py_DECREF((PyObject *)first);
    }
    if (!rc && !sender->open && !sender->posted)
        rc = call_none((PyObject *)sender, name_idle);
    if (!rc)
        rc = sender_pump(sender);
    Py_DECREF((PyObject *)sender);
    return rc;
}

void writes_give_back(Sender *sender)
{
    for (Write *write = sender->first; write; write = write->next)
        write_give_back(write);
}

void writes_forget(Sender *sender)
{
    while (sender->first)
        Py_DECREF((PyObject *)unlist(sender));
}

/* It was never the device's: ends it, with this error. */
void write_refused(Write *write, PyObject *error)
{
    if (end(write, WRITE_FAILED, error))
        table_unraisable(write->sender->table);
}

void writes_drop(Sender *sender, unsigned int count, PyObject *error)
{
    struct Write *keep = NULL, *write = sender->first;

    for (unsigned int kept = sender->writes; kept > count && write; kept--) {
        keep = write;
        write = write->next;
    }
    sender->last = keep;
    if (keep)
        keep->next = NULL;
    else
        sender->first = NULL;
    while (write) {
        struct Write *next = write->next;

        not_posted(sender, write);
        write_refused(write, error);
        write_give_back(write);
        Py_DECREF((PyObject *)write);
        write = next;
    }
}

static const char *kind(const Write *write)
{
    switch (write->opcode) {
    case IBV_WR_RDMA_READ:
        return "read";
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        return "fetch_add";
    case IBV_WR_ATOMIC_CMP_AND_SWP:
        return "compare_swap";
    default:
        return "write";
    }
}

int writes_fail(Sender *sender, PyObject *make_error)
{
    for (Write *write = sender->first, *next; write; write = next) {
        PyObject *error = is_over(write) ? NULL : PyObject_CallFunction(make_error, "s", kind(write));

        Py_INCREF((PyObject *)write);
        if (error)
            write_refused(write, error);
        else if (!is_over(write))
            table_unraisable(sender->table);
        Py_XDECREF(error);
        next = write->next;
        Py_DECREF((PyObject *)write);
    }
    return 0;
}

Write *write_new(Sender *sender, enum ibv_wr_opcode opcode)
{
    Write *write = (Write *)PyType_GenericAlloc(write_type, 0);

    if (write) {
        write->sender = (Sender *)Py_NewRef((PyObject *)sender);
        write->opcode = opcode;
    }
    return write;
}

/* --- the user ---------------------------------------------------------------------------------------- */

/* Callbacks are to hear at once when a task that waits for the future is cancelled. */
static int watch_future(Write *write)
{
    PyObject *notice = PyObject_GetAttrString((PyObject *)write, "_notice"), *result = NULL;

    if (notice)
        result = PyObject_CallMethod(write->future, "add_done_callback", "O", notice);
    Py_XDECREF(notice);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* The future that tasks wait for. A borrowed reference; NULL and an exception. */
static PyObject *future_of(Write *write)
{
    Table *table = write->sender->table;

    if (write->future)
        return write->future;
    write->future = PyObject_CallMethod(write->sender->loop, "create_future", NULL);
    if (write->future && write->callbacks && watch_future(write))
        return NULL;
    if (write->future && table->adaptive && !table->polling && table->waiting > 1 &&
        call_none((PyObject *)table, name_keep_polling))
        return NULL;
    return write->future;
}

static PyObject *set_outcome(const Write *write)
{
    if (write->state == WRITE_DONE)
        return Py_NewRef(outcome(write));
    if (write->state == WRITE_FAILED && write->error)
        PyErr_SetObject((PyObject *)Py_TYPE(write->error), write->error);
    else if (write->state == WRITE_CANCELLED)
        PyErr_SetObject(cancelled_error, write->message);
    else
        PyErr_Format(invalid_state_error, "the %s has not ended", kind(write));
    return NULL;
}

/* Lets the reactor poll for it. */
static int spin_for(Write *write)
{
    Sender *sender = write->sender;
    struct spin spin = {
        .cq = sender->cq,
        .governor = sender->governor,
        .once = !sender->spins,
        .done = is_done,
        .what = (PyObject *)write,
    };

    if (notice_cancellation(write))
        return -1;
    return is_over(write) ? 0 : table_spin(sender->table, &spin);
}

static PyObject *write_spin(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (spin_for((Write *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *write_await(PyObject *self)
{
    Write *write = (Write *)self;
    PyObject *future;

    if (spin_for(write))
        return NULL;
    if (is_over(write)) {
        PyObject *value = set_outcome(write);

        return value ? ready_with(value) : NULL;
    }
    future = future_of(write);
    return future ? PyObject_CallMethod(future, "__await__", NULL) : NULL;
}

static PyObject *write_done(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((Write *)self))
        return NULL;
    return PyBool_FromLong(is_over((Write *)self));
}

static PyObject *write_cancelled(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((Write *)self))
        return NULL;
    return PyBool_FromLong(((Write *)self)->state == WRITE_CANCELLED);
}

static PyObject *write_result(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((Write *)self))
        return NULL;
    return set_outcome((Write *)self);
}

static PyObject *write_exception(PyObject *self, PyObject *unused)
{
    Write *write = (Write *)self;

    (void)unused;
    if (notice_cancellation(write))
        return NULL;
    if (write->state == WRITE_FAILED && write->error)
        return Py_NewRef(write->error);
    if (write->state == WRITE_DONE)
        Py_RETURN_NONE;
    return set_outcome(write);
}

static PyObject *write_cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"msg", NULL};
    PyObject *message = Py_None;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &message) || notice_cancellation((Write *)self))
        return NULL;
    if (is_over((Write *)self))
        Py_RETURN_FALSE;
    ((Write *)self)->message = message == Py_None ? NULL : Py_NewRef(message);
    if (end((Write *)self, WRITE_CANCELLED, NULL))
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *write_fail(PyObject *self, PyObject *error)
{
    if (end((Write *)self, WRITE_FAILED, error))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *write_follow(PyObject *self, PyObject *future)
{
    PyObject *cancelled = PyObject_CallMethod(future, "cancelled", NULL), *error;
    int rc;

    if (!cancelled)
        return NULL;
    Py_DECREF(cancelled);
    if (cancelled == Py_True) {
        rc = end((Write *)self, WRITE_CANCELLED, NULL);
    } else {
        error = PyObject_CallMethod(future, "exception", NULL);
        if (!error)
            return NULL;
        rc = error == Py_None ? end((Write *)self, WRITE_DONE, NULL) : end((Write *)self, WRITE_FAILED, error);
        Py_DECREF(error);
    }
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

/* What asyncio.gather() asks of a future that was cancelled. */
static PyObject *write_make_cancelled_error(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyObject_CallFunctionObjArgs(cancelled_error, ((Write *)self)->message, NULL);
}

static PyObject *write_notice(PyObject *self, PyObject *future)
{
    (void)future;
    if (notice_cancellation((Write *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *write_get_loop(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(((Write *)self)->sender->loop);
}

static PyObject *write_add_done_callback(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "context", NULL};
    Write *write = (Write *)self;
    Table *table = write->sender->table;
    PyObject *callback, *context = Py_None, *pair;
    int rc;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O", names, &callback, &context) || notice_cancellation(write))
        return NULL;
    context = context == Py_None ? PyObject_CallFunctionObjArgs(copy_context, NULL) : Py_NewRef(context);
    if (!context)
        return NULL;
    pair = PyTuple_Pack(2, callback, context);
    Py_DECREF(context);
    if (!pair)
        return NULL;
    if (!write->callbacks)
        write->callbacks = PyList_New(0);
    rc = write->callbacks ? PyList_Append(write->callbacks, pair) : -1;
    if (!rc && write->future && !is_over(write) && PyList_Size(write->callbacks) == 1)
        rc = watch_future(write);
    Py_DECREF(pair);
    if (!rc && is_over(write))
        rc = schedule_callbacks(write);
    else if (!rc && table->adaptive && !table->polling && table->waiting > 1)
        rc = call_none((PyObject *)table, name_keep_polling);
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *write_remove_done_callback(PyObject *self, PyObject *callback)
{
    Write *write = (Write *)self;
    long removed = 0;

    for (Py_ssize_t i = write->callbacks ? PyList_Size(write->callbacks) : 0; i-- > 0;) {
        PyObject *pair = PyList_GetItem(write->callbacks, i);
        int same = PyObject_RichCompareBool(PyTuple_GetItem(pair, 0), callback, Py_EQ);

        if (same < 0 || (same && PyList_SetSlice(write->callbacks, i, i + 1, NULL)))
            return NULL;
        removed += same;
    }
    return PyLong_FromLong(removed);
}

/* What makes asyncio take it for a future. */
static PyObject *get_blocking(PyObject *self, void *unused)
{
    (void)self;
    (void)unused;
    Py_RETURN_FALSE;
}

static PyObject *write_repr(PyObject *self)
{
    static const char *const states[] = {"not posted", "posted", "done", "failed", "cancelled"};

    return PyUnicode_FromFormat("<%s %s>", kind((Write *)self), states[((Write *)self)->state]);
}

static int write_traverse(PyObject *self, visitproc visit, void *arg)
{
    Write *write = (Write *)self;

    Py_VISIT((PyObject *)write->sender);
    Py_VISIT(write->data);
    Py_VISIT((PyObject *)write->region);
    Py_VISIT(write->landing);
    Py_VISIT(write->future);
    Py_VISIT(write->callbacks);
    Py_VISIT(write->error);
    Py_VISIT(write->message);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int write_clear(PyObject *self)
{
    Write *write = (Write *)self;

    Py_CLEAR(write->data);
    Py_CLEAR(write->region);
    Py_CLEAR(write->landing);
    Py_CLEAR(write->value);
    Py_CLEAR(write->future);
    Py_CLEAR(write->callbacks);
    Py_CLEAR(write->error);
    Py_CLEAR(write->message);
    return 0;
}

static void write_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    if (((Write *)self)->weakrefs)
        PyObject_ClearWeakRefs(self);
    write_clear(self);
    Py_CLEAR(((Write *)self)->sender);
    object_free(self);
}

static PyMethodDef write_methods[] = {
    {"done", write_done, METH_NOARGS, "True when it has ended, failed or was cancelled."},
    {"cancelled", write_cancelled, METH_NOARGS, "True when it was cancelled."},
    {"result", write_result, METH_NOARGS, "As await has it or raises it; InvalidStateError before the end."},
    {"exception", write_exception, METH_NOARGS, "The error it failed with, or None."},
    {"_make_cancelled_error", write_make_cancelled_error, METH_NOARGS, "For asyncio.gather()."},
    {"_notice", write_notice, METH_O, "The future that tasks wait for has ended."},
    {"cancel", (PyCFunction)(void (*)(void))write_cancel, METH_VARARGS | METH_KEYWORDS, "Abandons the wait: it happens all the same, once it is posted."},
    {"fail", write_fail, METH_O, "fail(error): ends the wait, if it has not ended."},
    {"follow", write_follow, METH_O, "follow(future): ends as that future did."},
    {"spin", write_spin, METH_NOARGS, "Polls for it, as await does before it goes to the event loop."},
    {"get_loop", write_get_loop, METH_NOARGS, "Its event loop."},
    {"add_done_callback", (PyCFunction)(void (*)(void))write_add_done_callback, METH_VARARGS | METH_KEYWORDS,
     "As asyncio.Future.add_done_callback()."},
    {"remove_done_callback", write_remove_done_callback, METH_O, "As asyncio.Future.remove_done_callback()."},
    {NULL, NULL, 0, NULL},
};

static PyObject *get_kind(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(kind((Write *)self));
}

static PyGetSetDef write_getset[] = {
    {"kind", get_kind, NULL, "The method it is of, such as \"write\".", NULL},
    {"_asyncio_future_blocking", get_blocking, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef write_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Write, weakrefs), READONLY, NULL},
    {"_cancel_message", T_OBJECT, offsetof(Write, message), READONLY, "For asyncio.gather()."},
    {"data", T_OBJECT, offsetof(Write, data), READONLY, "What a batch is to write; None when that has ended."},
    {"region", T_OBJECT, offsetof(Write, region), READONLY, "And where."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot write_slots[] = {
    {Py_tp_dealloc, write_dealloc}, {Py_tp_traverse, write_traverse}, {Py_tp_clear, write_clear},
    {Py_tp_methods, write_methods}, {Py_tp_getset, write_getset},     {Py_tp_members, write_members},
    {Py_am_await, write_await},     {Py_tp_iter, write_await},        {Py_tp_repr, write_repr},
    {Py_tp_doc,
     "A small write, read or atomic operation under way, awaitable once or often; what asyncio.Future has, it has.\n\n"
     "Cancelling abandons the wait: it happens all the same, once it is posted."},
    {0, NULL},
};

PyType_Spec write_spec = {
    .name = "aiordma._native._datapath.Write",
    .basicsize = sizeof(Write),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = write_slots,
};

/* --- an await that is over at once ------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *value; /* NULL: None */
} Ready;

PyObject *ready_with(PyObject *value)
{
    Ready *ready;

    if (value == Py_None) {
        Py_DECREF(value);
        return Py_NewRef(ready_iterator);
    }
    ready = (Ready *)PyType_GenericAlloc((PyTypeObject *)Py_TYPE(ready_iterator), 0);
    if (ready)
        ready->value = value;
    else
        Py_DECREF(value);
    return (PyObject *)ready;
}

/* Needs no exception to say that it is the end. */
static PySendResult ready_send(PyObject *self, PyObject *unused, PyObject **value)
{
    PyObject *held = ((Ready *)self)->value;

    (void)unused;
    *value = Py_NewRef(held ? held : Py_None);
    return PYGEN_RETURN;
}

static PyObject *ready_next(PyObject *self)
{
    PyObject *value;
    PySendResult sent = ready_send(self, NULL, &value);

    return sent_as_iterator(sent, value);
}

static void ready_dealloc(PyObject *self)
{
    Py_CLEAR(((Ready *)self)->value);
    object_free(self);
}

static PyType_Slot ready_slots[] = {
    {Py_tp_dealloc, ready_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, ready_next},
    {Py_am_send, (void *)ready_send},
    {Py_tp_doc, "What the await of something that is done iterates over."},
    {0, NULL},
};

PyType_Spec ready_spec = {
    .name = "aiordma._native._datapath.Ready",
    .basicsize = sizeof(Ready),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ready_slots,
};
