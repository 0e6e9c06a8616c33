/* Who waits for an item of an inbox: what a task awaits there, with as much of a future as asyncio's tasks use.
 *
 * A future has the loop call each waiter back in a callback of its own. Here those that have got something line up in
 * the table, and are called one after the other: by the callback of the loop that polled, or by one that was asked for
 * once. So a batch of messages costs the loop one callback, and a message found by the loop none. It is never a task
 * that calls them, for tasks cannot run inside another; what an await finds while they are called joins the line.
 * Others, who would run a task, can have a callback of theirs in it (soon()). */
#include "datapath.h"

enum wait_state { WAIT_WAITS, WAIT_DONE, WAIT_FAILED, WAIT_CANCELLED };

#define TURN_WAKES 64 /* called in one callback of the loop */

/* --- the line in the table --------------------------------------------------------------------------- */

int table_line_up(Table *table, PyObject *object)
{
    table->handed_out++;
    if (objects_append(&table->to_wake, object))
        return -1;
    return table->waking ? 0 : table_ask(table, &table->wake_due, name_wake);
}

static int line_up(Wait *wait)
{
    return wait->callback ? table_line_up(wait->table, (PyObject *)wait) : 0;
}

/* A task that has got something is told so by a future that is done, and asks for it where it awaits. So the wait is
 * not held here meanwhile, and can be used again. Takes the reference. */
static void wake_task(Table *table, Wait *wait)
{
    PyObject *callback = wait->callback, *context = wait->context, *result;
    PyObject *future = wait->state == WAIT_DONE ? Py_NewRef(table->done) : Py_NewRef((PyObject *)wait);

    wait->callback = wait->context = NULL;
    Py_DECREF((PyObject *)wait);
    result = PyObject_CallMethodObjArgs(context, name_run, callback, future, NULL);
    if (!result)
        table_unraisable(table);
    Py_XDECREF(result);
    Py_DECREF(future);
    Py_DECREF(callback);
    Py_DECREF(context);
}

/* Takes the reference. */
static void call(Table *table, PyObject *callable)
{
    PyObject *result = PyObject_CallNoArgs(callable);

    if (!result)
        table_unraisable(table);
    Py_XDECREF(result);
    Py_DECREF(callable);
}

void table_wake(Table *table)
{
    PyObject *object;

    for (int i = 0; i < TURN_WAKES && (object = objects_pop(&table->to_wake)); i++) {
        if (Py_TYPE(object) == wait_type)
            wake_task(table, (Wait *)object);
        else
            call(table, object);
    }
    if (table->to_wake.count && table_ask(table, &table->wake_due, name_wake))
        table_unraisable(table);
}

/* --- the inbox --------------------------------------------------------------------------------------- */

Wait *wait_new(Inbox *inbox)
{
    Wait *wait = (Wait *)spare_take(&inbox->spare_wait);

    if (!wait) {
        wait = (Wait *)PyType_GenericAlloc(wait_type, 0);
        if (!wait)
            return NULL;
        wait->table = (Table *)Py_NewRef((PyObject *)inbox->table);
    }
    wait->state = WAIT_WAITS;
    wait->inbox = (Inbox *)Py_NewRef((PyObject *)inbox);
    return wait;
}

/* A spare one has no inbox, whose it is. To whoever kept it, it is as one that was cancelled. */
void wait_over(Wait *wait)
{
    Inbox *inbox = wait->inbox;

    wait->state = WAIT_CANCELLED;
    wait->inbox = NULL;
    wait->blocking = 0;
    Py_CLEAR(wait->value);
    spare_put(&inbox->spare_wait, (PyObject *)wait);
    Py_DECREF((PyObject *)inbox);
}

int wait_give(Wait *wait, PyObject *item)
{
    if (wait->state != WAIT_WAITS)
        return 0;
    wait->state = WAIT_DONE;
    wait->value = Py_NewRef(item);
    return line_up(wait) ? -1 : 1;
}

int wait_fail(Wait *wait, PyObject *error)
{
    if (wait->state != WAIT_WAITS)
        return 0;
    wait->state = WAIT_FAILED;
    wait->value = Py_NewRef(error);
    return line_up(wait);
}

PyObject *wait_item(const Wait *wait)
{
    return wait->state == WAIT_DONE ? wait->value : NULL;
}

bool wait_has_task(const Wait *wait)
{
    return wait->callback != NULL;
}

/* --- what is resumed --------------------------------------------------------------------------------- */

void resumed_prefetch(const struct resumed *resumed)
{
    for (int i = 0; i < RESUMED; i++)
        prefetch(resumed->part[i].at, resumed->part[i].size);
}

#define MOST 512 /* bytes of an object */

static void set_object(struct resumed *resumed, enum part part, PyObject *object)
{
    PyObject *size = PyObject_CallMethod(object, "__sizeof__", NULL);
    size_t bytes = size ? PyLong_AsSize_t(size) : 0;

    if (PyErr_Occurred()) {
        PyErr_Clear();
        bytes = 0;
    }
    resumed_set(resumed, part, object, bytes < MOST ? bytes : MOST);
    Py_XDECREF(size);
}

/* Another task than before. What is not made like those of asyncio has fewer parts. */
static void learn_task(struct resumed *resumed, PyObject *task, PyObject *context)
{
    PyObject *coroutine = PyObject_CallMethod(task, "get_coro", NULL), *inner;

    PyErr_Clear();
    for (enum part part = RESUMED_COROUTINES; part < RESUMED; part++)
        resumed_set(resumed, part, NULL, 0);
    set_object(resumed, RESUMED_CONTEXT, context);
    set_object(resumed, RESUMED_TASK, task);
    for (enum part part = RESUMED_COROUTINES; part < RESUMED && coroutine && coroutine != Py_None; part++) {
        set_object(resumed, part, coroutine);
        inner = PyObject_GetAttrString(coroutine, "cr_await");
        PyErr_Clear();
        Py_DECREF(coroutine);
        coroutine = inner;
    }
    Py_XDECREF(coroutine);
}

/* The callback of a task is a method of it. */
static void learn(const Wait *wait, PyObject *callback, PyObject *context)
{
    Inbox *inbox = wait->inbox;
    struct resumed *resumed;
    PyObject *task;

    if (!inbox)
        return;
    Py_INCREF((PyObject *)inbox);
    resumed = &inbox->resumed;
    if (PyCFunction_Check(callback))
        task = Py_XNewRef(PyCFunction_GetSelf(callback));
    else
        task = PyObject_GetAttr(callback, name_self);
    if (!task)
        PyErr_Clear();
    else if (task != resumed->part[RESUMED_TASK].at)
        learn_task(resumed, task, context);
    Py_XDECREF(task);
    resumed_set(resumed, RESUMED_WAIT, wait, sizeof(*wait));
    resumed_set(resumed, RESUMED_CALLBACK, callback, sizeof(PyObject));
    Py_DECREF((PyObject *)inbox);
}

/* --- the task ---------------------------------------------------------------------------------------- */

static PyObject *result(PyObject *self, PyObject *unused)
{
    Wait *wait = (Wait *)self;

    (void)unused;
    if (wait->state == WAIT_DONE)
        return Py_NewRef(wait->value);
    if (wait->state == WAIT_FAILED)
        PyErr_SetObject((PyObject *)Py_TYPE(wait->value), wait->value);
    else if (wait->state == WAIT_CANCELLED)
        PyErr_SetObject(cancelled_error, wait->value);
    else
        PyErr_SetString(invalid_state_error, "nothing has come yet");
    return NULL;
}

/* Yields itself once, which tells the task what it waits for; then it is over. */
PySendResult wait_send(PyObject *self, PyObject *unused, PyObject **value)
{
    Wait *wait = (Wait *)self;

    (void)unused;
    if (wait->state == WAIT_WAITS) {
        wait->blocking = 1;
        *value = Py_NewRef(self);
        return PYGEN_NEXT;
    }
    *value = result(self, NULL);
    return *value ? PYGEN_RETURN : PYGEN_ERROR;
}

PyObject *sent_as_iterator(PySendResult sent, PyObject *value)
{
    PyObject *stop;

    if (sent != PYGEN_RETURN)
        return value;
    stop = PyObject_CallFunctionObjArgs(PyExc_StopIteration, value, NULL);
    if (stop)
        PyErr_SetObject(PyExc_StopIteration, stop);
    Py_XDECREF(stop);
    Py_DECREF(value);
    return NULL;
}

static PyObject *wait_next(PyObject *self)
{
    PyObject *value;
    PySendResult sent = wait_send(self, NULL, &value);

    return sent_as_iterator(sent, value);
}

PyObject *context_of_callback(PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;

    if (count != 1 || named > 1 ||
        (named && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), "context"))) {
        PyErr_SetString(PyExc_TypeError, "add_done_callback() takes a callback, and a context by its name");
        return NULL;
    }
    return named && args[1] != Py_None ? Py_NewRef(args[1]) : PyObject_CallFunctionObjArgs(copy_context, NULL);
}

static PyObject *add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Wait *wait = (Wait *)self;
    PyObject *context = context_of_callback(args, count, names);

    if (!context)
        return NULL;
    learn(wait, args[0], context); /* which may run code of others */
    if (wait->callback) {
        Py_DECREF(context);
        PyErr_SetString(invalid_state_error, "another task waits already");
        return NULL;
    }
    wait->callback = Py_NewRef(args[0]);
    wait->context = context;
    if (wait->state != WAIT_WAITS && line_up(wait))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"msg", NULL};
    Wait *wait = (Wait *)self;
    PyObject *message = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &message))
        return NULL;
    if (wait->state != WAIT_WAITS)
        Py_RETURN_FALSE;
    wait->state = WAIT_CANCELLED;
    wait->value = message && message != Py_None ? Py_NewRef(message) : NULL;
    if (line_up(wait))
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *get_loop(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(((Wait *)self)->table->loop);
}

static int wait_traverse(PyObject *self, visitproc visit, void *arg)
{
    Wait *wait = (Wait *)self;

    Py_VISIT((PyObject *)wait->table);
    Py_VISIT((PyObject *)wait->inbox);
    Py_VISIT(wait->callback);
    Py_VISIT(wait->context);
    Py_VISIT(wait->value);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int wait_clear(PyObject *self)
{
    Wait *wait = (Wait *)self;

    Py_CLEAR(wait->callback);
    Py_CLEAR(wait->context);
    Py_CLEAR(wait->value);
    if (wait->state == WAIT_DONE || wait->state == WAIT_FAILED)
        wait->state = WAIT_CANCELLED;
    return 0;
}

static void wait_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    wait_clear(self);
    Py_CLEAR(((Wait *)self)->table);
    Py_CLEAR(((Wait *)self)->inbox);
    object_free(self);
}

static PyMethodDef wait_methods[] = {
    {"result", result, METH_NOARGS, "The item, or raises what ended the wait."},
    {"cancel", (PyCFunction)(void (*)(void))cancel, METH_VARARGS | METH_KEYWORDS, "Ends the wait; False when it is over."},
    {"add_done_callback", (PyCFunction)(void (*)(void))add_done_callback, METH_FASTCALL | METH_KEYWORDS,
     "As asyncio.Future.add_done_callback(); for the one task that waits."},
    {"get_loop", get_loop, METH_NOARGS, "The event loop."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef wait_members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(Wait, blocking), 0, "What asyncio knows a future by."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot wait_slots[] = {
    {Py_tp_dealloc, wait_dealloc},     {Py_tp_traverse, wait_traverse}, {Py_tp_clear, wait_clear},
    {Py_tp_methods, wait_methods},     {Py_tp_members, wait_members},
    {Py_am_await, PyObject_SelfIter},  {Py_tp_iter, PyObject_SelfIter}, {Py_tp_iternext, wait_next},
    {Py_am_send, (void *)wait_send},
    {Py_tp_doc, "What a task awaits that waits for an item of an inbox."},
    {0, NULL},
};

PyType_Spec wait_spec = {
    .name = "aiordma._native._datapath.Wait",
    .basicsize = sizeof(Wait),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = wait_slots,
};
