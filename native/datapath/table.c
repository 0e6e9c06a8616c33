/* The pending table: who gets a completion.
 *
 * A work-request id is slot number plus generation, so a completion that comes too late for its slot is seen and
 * dropped. An entry is an object of Python with a method `completed`, or one of this module's, which are called
 * without one. The entry owns the memory of its request until the completion (or flush) arrives. */
#include "datapath.h"

#include <pthread.h>

#define HOLD_NS 5000 /* of a spin, with the GIL: a thousandth of what its threads let each other wait */

static int table_grow(Table *table)
{
    uint32_t size = table->size ? 2 * table->size : 64;
    struct pending *slots = PyMem_Realloc(table->slots, size * sizeof(*slots));
    uint32_t *stack;

    if (!slots) {
        PyErr_NoMemory();
        return -1;
    }
    table->slots = slots;
    stack = PyMem_Realloc(table->free, size * sizeof(*stack));
    if (!stack) {
        PyErr_NoMemory();
        return -1;
    }
    table->free = stack;
    table->size = size;
    return 0;
}

int table_add(Table *table, PyObject *entry, uint64_t *wr_id)
{
    uint32_t slot;

    if (table->free_count) {
        slot = table->free[--table->free_count];
    } else {
        if (table->used == table->size && table_grow(table))
            return -1;
        slot = table->used++;
        table->slots[slot].generation = 0;
    }
    table->slots[slot].entry = Py_NewRef(entry);
    *wr_id = (uint64_t)table->slots[slot].generation << 32 | slot;
    return 0;
}

/* The entry leaves its slot; its reference is the caller's. */
static PyObject *vacate(Table *table, uint32_t slot)
{
    PyObject *entry = table->slots[slot].entry;

    table->slots[slot].entry = NULL;
    table->slots[slot].generation++;
    table->free[table->free_count++] = slot;
    return entry;
}

/* The entry of an id, or NULL when it is not there (any more). */
static PyObject *find(const Table *table, uint64_t wr_id)
{
    uint32_t slot = (uint32_t)wr_id;

    if (slot >= table->used || table->slots[slot].generation != (uint32_t)(wr_id >> 32))
        return NULL;
    return table->slots[slot].entry;
}

const struct pending *table_slot(const Table *table, uint64_t wr_id)
{
    return &table->slots[(uint32_t)wr_id];
}

bool table_remove(Table *table, uint64_t wr_id, PyObject *entry)
{
    if (find(table, wr_id) != entry)
        return false;
    Py_DECREF(vacate(table, (uint32_t)wr_id));
    return true;
}

/* Asking asyncio which loop runs costs a system call in some versions; the threads of a process are told apart for
 * free, and a child of fork() by counting. */
static unsigned long forks;

static void count_fork(void)
{
    forks++;
}

bool table_here(const Table *table)
{
    return table->thread == PyThread_get_thread_ident() && table->process == forks;
}

int table_count_forks(void)
{
    return pthread_atfork(NULL, NULL, count_fork);
}

void table_unraisable(Table *table)
{
    PyObject *type, *value, *traceback, *result;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback && value)
        PyException_SetTraceback(value, traceback);
    result = PyObject_CallFunctionObjArgs(table->on_error, value ? value : Py_None, NULL);
    if (!result)
        PyErr_WriteUnraisable(table->on_error);
    Py_XDECREF(result);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

void table_flush(Table *table)
{
    Sender *sender;

    while ((sender = table->dirty)) {
        Py_INCREF((PyObject *)sender);
        if (sender_flush(sender))
            table_unraisable(table);
        Py_DECREF((PyObject *)sender);
    }
}

static int call_completed(Table *table, PyObject *entry, const struct glue_wc *wc)
{
    PyObject *result = PyObject_CallMethod(entry, "completed", "IIIIII", wc->status, wc->opcode, wc->byte_len,
                                           wc->imm, wc->vendor_err, wc->qp_num);

    table->handed_out++;
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static void dispatch(Table *table, const struct glue_wc *wc)
{
    PyObject *entry = find(table, wc->wr_id);
    int rc;

    if (!entry) {
        table->stale++; /* its queue pair was destroyed before this was polled */
        return;
    }
    entry = vacate(table, (uint32_t)wc->wr_id);
    if (Py_TYPE(entry) == buffer_type)
        rc = buffer_completed((Buffer *)entry, wc);
    else if (Py_TYPE(entry) == one_sided_type)
        rc = one_sided_completed((OneSided *)entry, wc);
    else if (Py_TYPE(entry) == group_type)
        rc = group_completed((Group *)entry, wc);
    else
        rc = call_completed(table, entry, wc);
    Py_DECREF(entry);
    if (rc)
        table_unraisable(table);
}

/* The queue cannot be polled: the device was pulled out. Says so to the table, which tells everybody. */
static void lost(Table *table, int error)
{
    PyObject *result = PyObject_CallMethod((PyObject *)table, "failed", "i", error);

    if (!result)
        table_unraisable(table);
    Py_XDECREF(result);
}

/* Who lets the GIL go may wait for it for milliseconds, so that a completion that comes soon is waited for with it. */
static int poll_spin(struct ibv_cq *cq, struct glue_wc *wcs, uint64_t spin_ns)
{
    int got = glue_poll_spin(cq, wcs, POLL_BATCH, spin_ns < HOLD_NS ? spin_ns : HOLD_NS);

    if (got || spin_ns <= HOLD_NS)
        return got;
    Py_BEGIN_ALLOW_THREADS
    got = glue_poll_spin(cq, wcs, POLL_BATCH, spin_ns - HOLD_NS);
    Py_END_ALLOW_THREADS
    return got;
}

int table_poll(Table *table, struct ibv_cq *cq, uint64_t spin_ns)
{
    struct glue_wc wcs[POLL_BATCH];
    int got;

    table_flush(table); /* and the poll finds what that brings */
    got = spin_ns ? poll_spin(cq, wcs, spin_ns) : glue_poll(cq, wcs, POLL_BATCH);
    table->polls++;
    if (got <= 0) {
        table->empty_polls++;
        if (got < 0)
            lost(table, -got);
        return got;
    }
    table->dispatching = 1;
    for (int i = 0; i < got; i++)
        dispatch(table, &wcs[i]);
    table->dispatching = 0;
    table->completions += got;
    table->last_hit_ns = now_ns();
    return got;
}

/* -1 and an exception: the address is none. */
static int queue_at(PyObject *address, struct ibv_cq **cq)
{
    *cq = (struct ibv_cq *)(uintptr_t)PyLong_AsUnsignedLongLong(address);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *poll_queue(PyObject *self, PyObject *address)
{
    struct ibv_cq *cq;
    int got;

    if (queue_at(address, &cq))
        return NULL;
    got = table_poll((Table *)self, cq, 0);
    return PyLong_FromLong(got > 0 ? got : 0);
}

int table_serve(Table *table, struct ibv_cq *cq, uint64_t spin_ns)
{
    long long start = table->polling ? now_ns() : 0;
    int got;

    table->waking = 1;
    got = table_poll(table, cq, spin_ns);
    if (start)
        table->spin_ns += (got > 0 ? table->last_hit_ns : now_ns()) - start;
    table_wake(table);
    table->waking = 0;
    return got > 0 ? got : 0;
}

static PyObject *serve(PyObject *self, PyObject *address)
{
    struct ibv_cq *cq;

    return queue_at(address, &cq) ? NULL : PyLong_FromLong(table_serve((Table *)self, cq, 0));
}

void table_learn_gap(Table *table, long long before)
{
    if (before && table->last_hit_ns != before && table->arrivals)
        governor_learn(table->arrivals, table->last_hit_ns - before);
}

static PyObject *learn_gap(PyObject *self, PyObject *before)
{
    long long before_ns = PyLong_AsLongLong(before);

    if (PyErr_Occurred())
        return NULL;
    table_learn_gap((Table *)self, before_ns);
    Py_RETURN_NONE;
}

static PyObject *wake(PyObject *self, PyObject *unused)
{
    Table *table = (Table *)self;

    (void)unused;
    table->wake_due = 0;
    table->waking = 1;
    table_wake(table);
    table->waking = 0;
    Py_RETURN_NONE;
}

static PyObject *soon(PyObject *self, PyObject *callback)
{
    if (table_line_up((Table *)self, callback))
        return NULL;
    Py_RETURN_NONE;
}

/* Of an object with a method done(); one that raises counts as done, and raises again where it is awaited. */
bool says_done(PyObject *what)
{
    PyObject *done = PyObject_CallMethodObjArgs(what, name_done, NULL);
    bool is = done != Py_False;

    if (!done)
        PyErr_Clear();
    Py_XDECREF(done);
    return is;
}

static PyObject *spin(PyObject *self, PyObject *args)
{
    unsigned long long cq;
    PyObject *what, *governor;
    int once;
    struct spin how;

    if (!PyArg_ParseTuple(args, "OKOp", &what, &cq, &governor, &once))
        return NULL;
    if (governor_of(governor, &how.governor))
        return NULL;
    how.cq = (struct ibv_cq *)(uintptr_t)cq;
    how.once = once;
    how.done = says_done;
    how.what = what;
    if (table_spin((Table *)self, &how))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *self, PyObject *entry)
{
    uint64_t wr_id;

    if (table_add((Table *)self, entry, &wr_id))
        return NULL;
    return PyLong_FromUnsignedLongLong(wr_id);
}

static PyObject *remove_entry(PyObject *self, PyObject *args)
{
    unsigned long long wr_id;
    PyObject *entry;

    if (!PyArg_ParseTuple(args, "KO", &wr_id, &entry))
        return NULL;
    return PyBool_FromLong(table_remove((Table *)self, wr_id, entry));
}

static PyObject *turned(PyObject *self, PyObject *unused)
{
    (void)unused;
    table_turned((Table *)self);
    Py_RETURN_NONE;
}

static PyObject *add_queue(PyObject *self, PyObject *address)
{
    struct ibv_cq *cq;

    if (queue_at(address, &cq) || table_add_queue((Table *)self, cq))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *poll_on_turns(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (table_poll_on_turns((Table *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *poll_turn(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (table_poll_turn((Table *)self))
        return NULL;
    Py_RETURN_NONE;
}

static Py_ssize_t table_length(PyObject *self)
{
    return (Py_ssize_t)((Table *)self)->used - (Py_ssize_t)((Table *)self)->free_count;
}

static int table_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"loop", "on_error", "ready", "inline_cap_ns", "governor", "arrivals", NULL};
    Table *table = (Table *)self;
    PyObject *loop, *on_error, *ready, *governor, *arrivals, *result;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOLO!O!", names, &loop, &on_error, &ready,
                                     &table->inline_cap_ns, governor_type, &governor, governor_type, &arrivals))
        return -1;
    if (table->loop) {
        PyErr_SetString(PyExc_ValueError, "a table is made once");
        return -1;
    }
    table->done = PyObject_CallMethod(loop, "create_future", NULL);
    result = table->done ? PyObject_CallMethod(table->done, "set_result", "O", Py_None) : NULL;
    if (!result)
        return -1;
    Py_DECREF(result);
    table->loop = Py_NewRef(loop);
    table->on_error = Py_NewRef(on_error);
    if (PyObject_Size(ready) >= 0)
        table->ready = Py_NewRef(ready);
    else
        PyErr_Clear(); /* not known */
    table->governor = (Governor *)Py_NewRef(governor);
    table->arrivals = (Governor *)Py_NewRef(arrivals);
    table->thread = PyThread_get_thread_ident();
    table->process = forks;
    table->turn = 1; /* senders start at 0: their first message is the first of its turn */
    return 0;
}

static int table_traverse(PyObject *self, visitproc visit, void *arg)
{
    Table *table = (Table *)self;
    int rc = objects_visit(&table->to_wake, visit, arg);

    if (rc)
        return rc;
    for (uint32_t i = 0; i < table->used; i++)
        Py_VISIT(table->slots[i].entry);
    Py_VISIT(table->loop);
    Py_VISIT(table->done);
    Py_VISIT(table->on_error);
    Py_VISIT(table->ready);
    Py_VISIT((PyObject *)table->governor);
    Py_VISIT((PyObject *)table->arrivals);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int table_clear(PyObject *self)
{
    Table *table = (Table *)self;

    for (uint32_t i = 0; i < table->used; i++)
        Py_CLEAR(table->slots[i].entry);
    objects_clear(&table->to_wake);
    Py_CLEAR(table->loop);
    Py_CLEAR(table->done);
    Py_CLEAR(table->on_error);
    Py_CLEAR(table->ready);
    return 0;
}

static void table_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    table_clear(self);
    PyMem_Free(((Table *)self)->slots);
    PyMem_Free(((Table *)self)->free);
    PyMem_Free(((Table *)self)->queues);
    Py_CLEAR(((Table *)self)->governor);
    Py_CLEAR(((Table *)self)->arrivals);
    object_free(self);
}

static PyMethodDef table_methods[] = {
    {"add", add, METH_O, "Puts an entry in a slot; returns the work-request id to post with."},
    {"remove", remove_entry, METH_VARARGS,
     "remove(wr_id, entry): takes out an entry whose completion will not come; False when it is not there."},
    {"poll", poll_queue, METH_O,
     "poll(cq): posts what waits for that, polls the queue at this address once, and hands out what is there; how\n"
     "many. When the device has failed: 0, after self.failed(errno)."},
    {"serve", serve, METH_O,
     "serve(cq): the same, then runs those who waited for it. Only a callback of the loop may do this."},
    {"learn_gap", learn_gap, METH_O,
     "learn_gap(before): something may have been found, the last time at `before` ns: so long polling has to last."},
    {"wake", wake, METH_NOARGS, "Runs those whose wait is over. Only a callback of the loop may do this."},
    {"soon", soon, METH_O,
     "Has callback() called after those: by the callback of the loop that polls just now, or by one of its own, and\n"
     "never inside a task. What it raises is reported."},
    {"spin", spin, METH_VARARGS,
     "spin(what, cq, governor, once): polls inside an await, once, and then until what.done() or the time is up:\n"
     "governor sets the time and learns from the outcome, None is the cap, once ends there. Calls\n"
     "poll_on_turns() when polling should go on with the loop."},
    {"turned", turned, METH_NOARGS, "A callback of the loop: a turn is over. Posts what was gathered in it."},
    {"add_queue", add_queue, METH_O, "add_queue(cq): polled on turns from now on."},
    {"poll_on_turns", poll_on_turns, METH_NOARGS,
     "Polls on turns of the loop from now on: in busy mode, and in adaptive mode as long as that is likely to find\n"
     "something. Calls self.sleep() when that is over."},
    {"poll_turn", poll_turn, METH_NOARGS, "A callback of the loop: does so, and asks for the next turn."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef table_members[] = {
    {"dispatching", T_BOOL, offsetof(Table, dispatching), READONLY, "Completions that were polled are handed out."},
    {"polling", T_BOOL, offsetof(Table, polling), READONLY, "Polls on turns of the loop."},
    {"busy", T_BOOL, offsetof(Table, busy), 0, "Somebody is in busy mode."},
    {"adaptive", T_BOOL, offsetof(Table, adaptive), 0, "Somebody is in adaptive mode, and nobody in busy mode."},
    {"closed", T_BOOL, offsetof(Table, closed), 0, "Nothing is polled inside awaits any more."},
    {"waiting", T_LONGLONG, offsetof(Table, waiting), 0, "Operations, not receives, that are posted."},
    {"last_hit_ns", T_LONGLONG, offsetof(Table, last_hit_ns), 0, "When a poll found something last."},
    {"spin_ns", T_LONGLONG, offsetof(Table, spin_ns), 0, "Time spent polling in awaits, and on turns of the loop."},
    {"inline_polls", T_LONGLONG, offsetof(Table, inline_polls), READONLY, NULL},
    {"inline_hits", T_LONGLONG, offsetof(Table, inline_hits), READONLY, NULL},
    {"completions", T_LONGLONG, offsetof(Table, completions), READONLY, NULL},
    {"turns", T_LONGLONG, offsetof(Table, turns), READONLY, "On which it was polled."},
    {"governor", T_OBJECT, offsetof(Table, governor), READONLY, "Of what we have posted."},
    {"arrivals", T_OBJECT, offsetof(Table, arrivals), READONLY, "Of what comes."},
    {"stale", T_LONGLONG, offsetof(Table, stale), READONLY, NULL},
    {"polls", T_LONGLONG, offsetof(Table, polls), READONLY, NULL},
    {"empty_polls", T_LONGLONG, offsetof(Table, empty_polls), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_init, table_init},         {Py_tp_dealloc, table_dealloc}, {Py_tp_traverse, table_traverse},
    {Py_tp_clear, table_clear},       {Py_tp_methods, table_methods}, {Py_tp_members, table_members},
    {Py_sq_length, table_length},
    {Py_tp_doc, "Table(loop, on_error, ready, inline_cap_ns, governor, arrivals): posted work requests, and who gets\n"
                "their completions."},
    {0, NULL},
};

PyType_Spec table_spec = {
    .name = "aiordma._native._datapath.Table",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = table_slots,
};
