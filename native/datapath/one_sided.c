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

static bool is_over(const OneSided *op)
{
    return op->state > OP_POSTED;
}

static bool is_done(PyObject *what)
{
    return is_over((OneSided *)what);
}

/* Calls the callbacks in the next turn of the loop. Errors there are the table's to report. */
static int schedule_callbacks(OneSided *op)
{
    PyObject *callbacks = op->callbacks, *call_soon, *kwargs = NULL;
    int rc = 0;

    if (!callbacks)
        return 0;
    op->callbacks = NULL;
    call_soon = PyObject_GetAttrString(op->sender->loop, "call_soon");
    for (Py_ssize_t i = 0; call_soon && !rc && i < PyList_Size(callbacks); i++) {
        PyObject *pair = PyList_GetItem(callbacks, i), *args, *handle = NULL;

        args = PyTuple_Pack(2, PyTuple_GetItem(pair, 0), (PyObject *)op);
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

static PyObject *outcome(const OneSided *op)
{
    return op->value ? op->value : Py_None;
}

/* The state is final: wakes who waits. -1 and an exception. */
static int tell(OneSided *op)
{
    PyObject *done, *result = NULL;

    if (op->future) {
        done = PyObject_CallMethodObjArgs(op->future, name_done, NULL);
        if (!done)
            return -1;
        Py_DECREF(done);
        if (done == Py_False) {
            if (op->state == OP_DONE)
                result = PyObject_CallMethodObjArgs(op->future, name_set_result, outcome(op), NULL);
            else if (op->state == OP_CANCELLED)
                result = PyObject_CallMethod(op->future, "cancel", NULL);
            else
                result = PyObject_CallMethod(op->future, "set_exception", "O", op->error);
            if (!result)
                return -1;
            Py_DECREF(result);
            op->sender->table->handed_out++;
        }
    }
    return schedule_callbacks(op);
}

static int is_cancelled(PyObject *future) /* -1 and an exception */
{
    PyObject *cancelled = PyObject_CallMethod(future, "cancelled", NULL);

    Py_XDECREF(cancelled);
    return cancelled ? cancelled == Py_True : -1;
}

static int end(OneSided *op, enum one_sided_state state, PyObject *error)
{
    int cancelled = 0;

    if (is_over(op))
        return 0;
    /* A task that waited for the future was cancelled: so is the operation, as with any future. */
    if (op->future && (cancelled = is_cancelled(op->future)) < 0)
        return -1;
    if (cancelled) {
        state = OP_CANCELLED;
        error = NULL;
    }
    op->state = state;
    op->error = error ? Py_NewRef(error) : NULL;
    Py_CLEAR(op->data);
    Py_CLEAR(op->region);
    return tell(op);
}

static int notice_cancellation(OneSided *op)
{
    int cancelled;

    if (is_over(op) || !op->future)
        return 0;
    cancelled = is_cancelled(op->future);
    return cancelled > 0 ? end(op, OP_CANCELLED, NULL) : cancelled;
}

static PyObject *copied_into(const OneSided *op, const char *at)
{
    Py_buffer view;

    if (PyObject_GetBuffer(op->data, &view, PyBUF_WRITABLE))
        return NULL;
    memcpy(view.buf, at, op->nbytes);
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(op->nbytes);
}

/* What came back. NULL and an exception. */
static PyObject *landed(const OneSided *op)
{
    const char *at = (const char *)(uintptr_t)op->address;
    uint64_t word;

    if (op->into)
        return copied_into(op, at);
    if (op->opcode == IBV_WR_RDMA_READ)
        return PyBytes_FromStringAndSize(at, op->nbytes);
    memcpy(&word, at, sizeof(word)); /* the device has put it there in the order of this machine */
    return PyLong_FromUnsignedLongLong(word);
}

/* The device is done with it, and all went well. */
static int succeed(OneSided *op)
{
    PyObject *type, *error, *traceback;
    int rc;

    if (!op->nbytes || is_over(op))
        return end(op, OP_DONE, NULL);
    op->value = landed(op);
    if (op->value)
        return end(op, OP_DONE, NULL);
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    rc = end(op, OP_FAILED, error);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return rc;
}

/* --- the device -------------------------------------------------------------------------------------- */

int one_sided_posting(OneSided *op, struct ibv_send_wr *wr)
{
    Sender *sender = op->sender;

    if (table_add(sender->table, (PyObject *)op, &op->wr_id))
        return -1;
    wr->wr_id = op->wr_id;
    op->in_table = 1;
    if (!is_over(op))
        op->state = OP_POSTED;
    Py_INCREF((PyObject *)op);
    if (sender->last)
        sender->last->next = op;
    else
        sender->first = op;
    sender->last = op;
    sender->posted++;
    sender->table->waiting++;
    return 0;
}

/* The device does not have it (any more), which is not in the list of its sender either. */
static void not_posted(Sender *sender, OneSided *op)
{
    op->next = NULL;
    if (op->in_table)
        table_remove(sender->table, op->wr_id, (PyObject *)op);
    op->in_table = 0;
    sender->one_sided--;
    sender->posted--;
    sender->table->waiting--;
}

void one_sided_give_back(OneSided *op)
{
    PyObject *landing = op->landing;

    op->landing = NULL;
    if (landing)
        sender_give(op->sender, landing);
}

/* Takes the first one off the list of its sender; its reference is the caller's. */
static OneSided *unlist(Sender *sender)
{
    OneSided *op = sender->first;

    sender->first = op->next;
    if (!sender->first)
        sender->last = NULL;
    not_posted(sender, op);
    return op;
}

static int failed(OneSided *op, const struct glue_wc *wc)
{
    PyObject *result = PyObject_CallMethod((PyObject *)op->sender, "one_sided_failed", "OII", (PyObject *)op,
                                           wc->status, wc->vendor_err);

    Py_XDECREF(result);
    return result ? 0 : -1;
}

int one_sided_completed(OneSided *op, const struct glue_wc *wc)
{
    Sender *sender = op->sender;
    bool last = false;
    int rc = 0;

    op->in_table = 0;
    if (wc->status == IBV_WC_SUCCESS && sender->governor && !is_over(op))
        governor_learn(sender->governor, now_ns() - op->started_ns);
    Py_INCREF((PyObject *)sender);
    while (!last && sender->first) {
        OneSided *first = unlist(sender);

        last = first == op;
        if (last && wc->status != IBV_WC_SUCCESS)
            rc = failed(first, wc);
        else if (succeed(first))
            table_unraisable(sender->table);
        one_sided_give_back(first);
        Py_DECREF((PyObject *)first);
    }
    if (!rc && !sender->open && !sender->posted)
        rc = call_none((PyObject *)sender, name_idle);
    if (!rc)
        rc = sender_pump(sender);
    Py_DECREF((PyObject *)sender);
    return rc;
}

void one_sided_give_back_all(Sender *sender)
{
    for (OneSided *op = sender->first; op; op = op->next)
        one_sided_give_back(op);
}

void one_sided_forget_all(Sender *sender)
{
    while (sender->first)
        Py_DECREF((PyObject *)unlist(sender));
}

/* It was never the device's: ends it, with this error. */
void one_sided_refused(OneSided *op, PyObject *error)
{
    if (end(op, OP_FAILED, error))
        table_unraisable(op->sender->table);
}

void one_sided_drop_last(Sender *sender, unsigned int count, PyObject *error)
{
    struct OneSided *keep = NULL, *op = sender->first;

    for (unsigned int kept = sender->one_sided; kept > count && op; kept--) {
        keep = op;
        op = op->next;
    }
    sender->last = keep;
    if (keep)
        keep->next = NULL;
    else
        sender->first = NULL;
    while (op) {
        struct OneSided *next = op->next;

        not_posted(sender, op);
        one_sided_refused(op, error);
        one_sided_give_back(op);
        Py_DECREF((PyObject *)op);
        op = next;
    }
}

static const char *kind(const OneSided *op)
{
    switch (op->opcode) {
    case IBV_WR_RDMA_READ:
        return op->into ? "read_into" : "read";
    case IBV_WR_ATOMIC_FETCH_AND_ADD:
        return "fetch_add";
    case IBV_WR_ATOMIC_CMP_AND_SWP:
        return "compare_swap";
    default:
        return "write";
    }
}

int one_sided_fail_all(Sender *sender, PyObject *make_error)
{
    OneSided *posted[ONE_SIDED];
    unsigned int count = 0;

    for (OneSided *op = sender->first; op; op = op->next) /* the list may change when they are told */
        posted[count++] = (OneSided *)Py_NewRef((PyObject *)op);
    for (unsigned int i = 0; i < count; i++) {
        OneSided *op = posted[i];
        PyObject *error = is_over(op) ? NULL : PyObject_CallFunction(make_error, "s", kind(op));

        if (error)
            one_sided_refused(op, error);
        else if (!is_over(op))
            table_unraisable(sender->table);
        Py_XDECREF(error);
        Py_DECREF((PyObject *)op);
    }
    return 0;
}

/* Those that are dead, to be used again: making one and freeing it were a tenth of a write. */
static struct {
    OneSided *op[16];
    unsigned int count;
} dead;

static bool bury(OneSided *op)
{
    if (dead.count == sizeof(dead.op) / sizeof(dead.op[0]))
        return false;
    dead.op[dead.count++] = op;
    return true;
}

static OneSided *revive(void)
{
    OneSided *op = dead.op[--dead.count];

    memset(op, 0, sizeof(*op));
    PyObject_Init((PyObject *)op, one_sided_type);
    PyObject_GC_Track((PyObject *)op);
    return op;
}

OneSided *one_sided_new(Sender *sender, enum ibv_wr_opcode opcode)
{
    OneSided *op = dead.count ? revive() : (OneSided *)PyType_GenericAlloc(one_sided_type, 0);

    if (op) {
        op->sender = (Sender *)Py_NewRef((PyObject *)sender);
        op->opcode = opcode;
    }
    return op;
}

/* --- the user ---------------------------------------------------------------------------------------- */

/* Callbacks are to hear at once when a task that waits for the future is cancelled. */
static int watch_future(OneSided *op)
{
    PyObject *notice = PyObject_GetAttrString((PyObject *)op, "_notice"), *result = NULL;

    if (notice)
        result = PyObject_CallMethod(op->future, "add_done_callback", "O", notice);
    Py_XDECREF(notice);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* The future that tasks wait for. A borrowed reference; NULL and an exception. */
static PyObject *future_of(OneSided *op)
{
    Table *table = op->sender->table;

    if (op->future)
        return op->future;
    op->future = PyObject_CallMethod(op->sender->loop, "create_future", NULL);
    if (op->future && op->callbacks && watch_future(op))
        return NULL;
    if (op->future && table->waiting > 1 && table_poll_on_turns(table))
        return NULL;
    return op->future;
}

static PyObject *set_outcome(const OneSided *op)
{
    if (op->state == OP_DONE)
        return Py_NewRef(outcome(op));
    if (op->state == OP_FAILED && op->error)
        PyErr_SetObject((PyObject *)Py_TYPE(op->error), op->error);
    else if (op->state == OP_CANCELLED)
        PyErr_SetObject(cancelled_error, op->message);
    else
        PyErr_Format(invalid_state_error, "the %s has not ended", kind(op));
    return NULL;
}

/* Lets the reactor poll for it. */
static int spin_for(OneSided *op)
{
    Sender *sender = op->sender;
    struct spin spin = {
        .cq = sender->cq,
        .governor = sender->governor,
        .once = !sender->spins,
        .done = is_done,
        .what = (PyObject *)op,
    };

    if (notice_cancellation(op))
        return -1;
    return is_over(op) ? 0 : table_spin(sender->table, &spin);
}

static PyObject *one_sided_spin(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (spin_for((OneSided *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *one_sided_await(PyObject *self)
{
    OneSided *op = (OneSided *)self;
    PyObject *future;

    if (spin_for(op))
        return NULL;
    if (is_over(op)) {
        PyObject *value = set_outcome(op);

        return value ? ready_with(value) : NULL;
    }
    future = future_of(op);
    return future ? PyObject_CallMethod(future, "__await__", NULL) : NULL;
}

static PyObject *one_sided_done(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((OneSided *)self))
        return NULL;
    return PyBool_FromLong(is_over((OneSided *)self));
}

static PyObject *one_sided_cancelled(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((OneSided *)self))
        return NULL;
    return PyBool_FromLong(((OneSided *)self)->state == OP_CANCELLED);
}

static PyObject *one_sided_result(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (notice_cancellation((OneSided *)self))
        return NULL;
    return set_outcome((OneSided *)self);
}

static PyObject *one_sided_exception(PyObject *self, PyObject *unused)
{
    OneSided *op = (OneSided *)self;

    (void)unused;
    if (notice_cancellation(op))
        return NULL;
    if (op->state == OP_FAILED && op->error)
        return Py_NewRef(op->error);
    if (op->state == OP_DONE)
        Py_RETURN_NONE;
    return set_outcome(op);
}

static PyObject *one_sided_cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"msg", NULL};
    PyObject *message = Py_None;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &message) || notice_cancellation((OneSided *)self))
        return NULL;
    if (is_over((OneSided *)self))
        Py_RETURN_FALSE;
    ((OneSided *)self)->message = message == Py_None ? NULL : Py_NewRef(message);
    if (end((OneSided *)self, OP_CANCELLED, NULL))
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *one_sided_fail(PyObject *self, PyObject *error)
{
    if (end((OneSided *)self, OP_FAILED, error))
        return NULL;
    Py_RETURN_NONE;
}

/* Ends with what that future came to. */
static int end_with_result(OneSided *op, PyObject *future)
{
    PyObject *value = PyObject_CallMethod(future, "result", NULL);

    if (!value)
        return -1;
    if (is_over(op))
        Py_DECREF(value);
    else
        op->value = value;
    return end(op, OP_DONE, NULL);
}

static PyObject *one_sided_follow(PyObject *self, PyObject *future)
{
    OneSided *op = (OneSided *)self;
    int rc = is_cancelled(future);
    PyObject *error;

    if (rc > 0) {
        rc = end(op, OP_CANCELLED, NULL);
    } else if (!rc) {
        error = PyObject_CallMethod(future, "exception", NULL);
        if (!error)
            return NULL;
        rc = error == Py_None ? end_with_result(op, future) : end(op, OP_FAILED, error);
        Py_DECREF(error);
    }
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

/* What asyncio.gather() asks of a future that was cancelled. */
static PyObject *one_sided_make_cancelled_error(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyObject_CallFunctionObjArgs(cancelled_error, ((OneSided *)self)->message, NULL);
}

static PyObject *one_sided_notice(PyObject *self, PyObject *future)
{
    (void)future;
    if (notice_cancellation((OneSided *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *one_sided_get_loop(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(((OneSided *)self)->sender->loop);
}

static PyObject *one_sided_add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    OneSided *op = (OneSided *)self;
    Table *table = op->sender->table;
    PyObject *context = context_of_callback(args, count, names), *pair;
    int rc;

    if (!context)
        return NULL;
    pair = notice_cancellation(op) ? NULL : PyTuple_Pack(2, args[0], context);
    Py_DECREF(context);
    if (!pair)
        return NULL;
    if (!op->callbacks)
        op->callbacks = PyList_New(0);
    rc = op->callbacks ? PyList_Append(op->callbacks, pair) : -1;
    if (!rc && op->future && !is_over(op) && PyList_Size(op->callbacks) == 1)
        rc = watch_future(op);
    Py_DECREF(pair);
    if (!rc && is_over(op))
        rc = schedule_callbacks(op);
    else if (!rc && table->waiting > 1)
        rc = table_poll_on_turns(table);
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *one_sided_remove_done_callback(PyObject *self, PyObject *callback)
{
    OneSided *op = (OneSided *)self;
    long removed = 0;

    for (Py_ssize_t i = op->callbacks ? PyList_Size(op->callbacks) : 0; i-- > 0;) {
        PyObject *pair = PyList_GetItem(op->callbacks, i);
        int same = PyObject_RichCompareBool(PyTuple_GetItem(pair, 0), callback, Py_EQ);

        if (same < 0 || (same && PyList_SetSlice(op->callbacks, i, i + 1, NULL)))
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

static PyObject *one_sided_repr(PyObject *self)
{
    static const char *const states[] = {"not posted", "posted", "done", "failed", "cancelled"};

    return PyUnicode_FromFormat("<%s %s>", kind((OneSided *)self), states[((OneSided *)self)->state]);
}

static int one_sided_traverse(PyObject *self, visitproc visit, void *arg)
{
    OneSided *op = (OneSided *)self;

    Py_VISIT((PyObject *)op->sender);
    Py_VISIT(op->data);
    Py_VISIT((PyObject *)op->region);
    Py_VISIT(op->landing);
    Py_VISIT(op->future);
    Py_VISIT(op->callbacks);
    Py_VISIT(op->error);
    Py_VISIT(op->message);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int one_sided_clear(PyObject *self)
{
    OneSided *op = (OneSided *)self;

    Py_CLEAR(op->data);
    Py_CLEAR(op->region);
    Py_CLEAR(op->landing);
    Py_CLEAR(op->value);
    Py_CLEAR(op->future);
    Py_CLEAR(op->callbacks);
    Py_CLEAR(op->error);
    Py_CLEAR(op->message);
    return 0;
}

static void one_sided_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    if (((OneSided *)self)->weakrefs)
        PyObject_ClearWeakRefs(self);
    one_sided_clear(self);
    Py_CLEAR(((OneSided *)self)->sender);
    if (bury((OneSided *)self))
        Py_DECREF((PyObject *)one_sided_type);
    else
        object_free(self);
}

static PyMethodDef one_sided_methods[] = {
    {"done", one_sided_done, METH_NOARGS, "True when it has ended, failed or was cancelled."},
    {"cancelled", one_sided_cancelled, METH_NOARGS, "True when it was cancelled."},
    {"result", one_sided_result, METH_NOARGS, "As await has it or raises it; InvalidStateError before the end."},
    {"exception", one_sided_exception, METH_NOARGS, "The error it failed with, or None."},
    {"_make_cancelled_error", one_sided_make_cancelled_error, METH_NOARGS, "For asyncio.gather()."},
    {"_notice", one_sided_notice, METH_O, "The future that tasks wait for has ended."},
    {"cancel", (PyCFunction)(void (*)(void))one_sided_cancel, METH_VARARGS | METH_KEYWORDS,
     "Abandons the wait: it happens all the same, once it is posted."},
    {"fail", one_sided_fail, METH_O, "fail(error): ends the wait, if it has not ended."},
    {"follow", one_sided_follow, METH_O, "follow(future): ends as that future did."},
    {"spin", one_sided_spin, METH_NOARGS, "Polls for it, as await does before it goes to the event loop."},
    {"get_loop", one_sided_get_loop, METH_NOARGS, "Its event loop."},
    {"add_done_callback", (PyCFunction)(void (*)(void))one_sided_add_done_callback, METH_FASTCALL | METH_KEYWORDS,
     "As asyncio.Future.add_done_callback()."},
    {"remove_done_callback", one_sided_remove_done_callback, METH_O, "As asyncio.Future.remove_done_callback()."},
    {NULL, NULL, 0, NULL},
};

static PyObject *get_kind(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(kind((OneSided *)self));
}

static PyObject *get_notify(PyObject *self, void *unused)
{
    const OneSided *op = (OneSided *)self;

    (void)unused;
    if (op->opcode != IBV_WR_RDMA_WRITE_WITH_IMM)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(op->notify);
}

static PyGetSetDef one_sided_getset[] = {
    {"notify", get_notify, NULL, "What a write notifies the peer of, or None.", NULL},
    {"kind", get_kind, NULL, "The method it is of, such as \"write\".", NULL},
    {"_asyncio_future_blocking", get_blocking, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef one_sided_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(OneSided, weakrefs), READONLY, NULL},
    {"_cancel_message", T_OBJECT, offsetof(OneSided, message), READONLY, "For asyncio.gather()."},
    {"data", T_OBJECT, offsetof(OneSided, data), READONLY,
     "What a batch is to write, or what is read into; None when that has ended."},
    {"region", T_OBJECT, offsetof(OneSided, region), READONLY, "Where a batch is to do something; likewise."},
    {"compare_add", T_ULONGLONG, offsetof(OneSided, compare_add), READONLY, "Of an atomic operation."},
    {"swap", T_ULONGLONG, offsetof(OneSided, swap), READONLY, "Of a compare_swap."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot one_sided_slots[] = {
    {Py_tp_dealloc, one_sided_dealloc}, {Py_tp_traverse, one_sided_traverse}, {Py_tp_clear, one_sided_clear},
    {Py_tp_methods, one_sided_methods}, {Py_tp_getset, one_sided_getset},     {Py_tp_members, one_sided_members},
    {Py_am_await, one_sided_await},     {Py_tp_iter, one_sided_await},        {Py_tp_repr, one_sided_repr},
    {Py_tp_doc,
     "A small write, read or atomic operation under way, awaitable once or often; what asyncio.Future has, it has.\n\n"
     "Cancelling abandons the wait: it happens all the same, once it is posted."},
    {0, NULL},
};

PyType_Spec one_sided_spec = {
    .name = "aiordma._native._datapath.OneSided",
    .basicsize = sizeof(OneSided),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = one_sided_slots,
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
