/* Items in order of arrival, and a fair line of those who wait for one (wait.c).
 *
 * While somebody waits, nothing lies here: an item goes to the first in line, and is that receiver's from then on. One that is cancelled before it has run puts the item back, at the head. */
#include "datapath.h"

#include <string.h>

static int objects_grow(struct objects *queue)
{
    Py_ssize_t size = queue->size ? 2 * queue->size : 8;
    PyObject **at = PyMem_Malloc((size_t)size * sizeof(*at));

    if (!at) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < queue->count; i++)
        at[i] = queue->at[(queue->head + i) & (queue->size - 1)];
    PyMem_Free(queue->at);
    queue->at = at;
    queue->size = size;
    queue->head = 0;
    return 0;
}

int objects_append(struct objects *queue, PyObject *object)
{
    if (queue->count == queue->size && objects_grow(queue))
        return -1;
    queue->at[(queue->head + queue->count) & (queue->size - 1)] = Py_NewRef(object);
    queue->count++;
    return 0;
}

int objects_prepend(struct objects *queue, PyObject *object)
{
    if (queue->count == queue->size && objects_grow(queue))
        return -1;
    queue->head = (queue->head - 1) & (queue->size - 1);
    queue->at[queue->head] = Py_NewRef(object);
    queue->count++;
    return 0;
}

PyObject *objects_pop(struct objects *queue)
{
    PyObject *object;

    if (!queue->count)
        return NULL;
    object = queue->at[queue->head];
    queue->head = (queue->head + 1) & (queue->size - 1);
    queue->count--;
    return object;
}

bool objects_remove(struct objects *queue, PyObject *object)
{
    Py_ssize_t i = 0, mask = queue->size - 1;

    while (i < queue->count && queue->at[(queue->head + i) & mask] != object)
        i++;
    if (i == queue->count)
        return false;
    for (; i + 1 < queue->count; i++)
        queue->at[(queue->head + i) & mask] = queue->at[(queue->head + i + 1) & mask];
    queue->count--;
    Py_DECREF(object);
    return true;
}

int objects_visit(struct objects *queue, visitproc visit, void *arg)
{
    for (Py_ssize_t i = 0; i < queue->count; i++)
        Py_VISIT(queue->at[(queue->head + i) & (queue->size - 1)]);
    return 0;
}

void objects_clear(struct objects *queue)
{
    PyObject *object;

    while ((object = objects_pop(queue)))
        Py_DECREF(object);
    PyMem_Free(queue->at);
    memset(queue, 0, sizeof(*queue));
}

int inbox_put(Inbox *inbox, PyObject *item, bool front)
{
    PyObject *wait;

    while ((wait = objects_pop(&inbox->waiters))) {
        int given = wait_give((Wait *)wait, item);

        Py_DECREF(wait);
        if (given > 0)
            inbox->table->woken++;
        if (given)
            return given;
    }
    return front ? objects_prepend(&inbox->items, item) : objects_append(&inbox->items, item);
}

static PyObject *put(PyObject *self, PyObject *item)
{
    int given = inbox_put((Inbox *)self, item, false);

    return given < 0 ? NULL : PyBool_FromLong(given);
}

static PyObject *put_back(PyObject *self, PyObject *item)
{
    int given = inbox_put((Inbox *)self, item, true);

    return given < 0 ? NULL : PyBool_FromLong(given);
}

static PyObject *get(PyObject *self, PyObject *unused)
{
    PyObject *item = objects_pop(&((Inbox *)self)->items);

    (void)unused;
    if (item)
        return item;
    Py_RETURN_NONE;
}

static PyObject *line_up(PyObject *self, PyObject *unused)
{
    Inbox *inbox = (Inbox *)self;
    Wait *wait = wait_new(inbox->table);

    (void)unused;
    if (wait && objects_append(&inbox->waiters, (PyObject *)wait))
        Py_CLEAR(wait);
    return (PyObject *)wait;
}

static PyObject *leave_line(PyObject *self, PyObject *wait)
{
    return PyBool_FromLong(objects_remove(&((Inbox *)self)->waiters, wait));
}

/* A receiver that was woken runs (or was cancelled, and does not). */
static PyObject *runs(PyObject *self, PyObject *unused)
{
    Table *table = ((Inbox *)self)->table;

    (void)unused;
    if (table->woken)
        table->woken--;
    Py_RETURN_NONE;
}

static int inbox_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", NULL};
    Inbox *inbox = (Inbox *)self;
    PyObject *table;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", names, table_type, &table))
        return -1;
    if (inbox->table) {
        PyErr_SetString(PyExc_ValueError, "an inbox is made once");
        return -1;
    }
    inbox->table = (Table *)Py_NewRef(table);
    return 0;
}

static PyObject *remove_item(PyObject *self, PyObject *item)
{
    return PyBool_FromLong(objects_remove(&((Inbox *)self)->items, item));
}

static PyObject *drain(struct objects *queue)
{
    PyObject *list = PyList_New(0), *object;

    while (list && (object = objects_pop(queue))) {
        if (PyList_Append(list, object))
            Py_CLEAR(list);
        Py_DECREF(object);
    }
    return list;
}

static PyObject *drain_items(PyObject *self, PyObject *unused)
{
    (void)unused;
    return drain(&((Inbox *)self)->items);
}

static PyObject *drain_line(PyObject *self, PyObject *unused)
{
    (void)unused;
    return drain(&((Inbox *)self)->waiters);
}

static PyObject *items(PyObject *self, PyObject *unused)
{
    struct objects *queue = &((Inbox *)self)->items;
    PyObject *list = PyList_New(0);

    (void)unused;
    for (Py_ssize_t i = 0; list && i < queue->count; i++)
        if (PyList_Append(list, queue->at[(queue->head + i) & (queue->size - 1)]))
            Py_CLEAR(list);
    return list;
}

/* What an inline spin asks: is there something to take? */
static PyObject *done(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(((Inbox *)self)->items.count > 0);
}

static Py_ssize_t inbox_length(PyObject *self)
{
    return ((Inbox *)self)->items.count;
}

static int inbox_traverse(PyObject *self, visitproc visit, void *arg)
{
    int rc = objects_visit(&((Inbox *)self)->items, visit, arg);

    if (rc || (rc = objects_visit(&((Inbox *)self)->waiters, visit, arg)))
        return rc;
    Py_VISIT((PyObject *)((Inbox *)self)->table);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int inbox_clear(PyObject *self)
{
    objects_clear(&((Inbox *)self)->items);
    objects_clear(&((Inbox *)self)->waiters);
    return 0;
}

static void inbox_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    inbox_clear(self);
    Py_CLEAR(((Inbox *)self)->table);
    object_free(self);
}

static PyMethodDef inbox_methods[] = {
    {"put", put, METH_O, "One more item, for the first in line or for later; True when somebody has it now."},
    {"put_back", put_back, METH_O, "An item that was taken is the next one again; True as for put()."},
    {"get", get, METH_NOARGS, "The next item, or None when there is none."},
    {"line_up", line_up, METH_NOARGS, "A new Wait, last in line, to be awaited by one task; an item is its result."},
    {"leave_line", leave_line, METH_O, "The Wait is not in line any more; False when it was not."},
    {"runs", runs, METH_NOARGS, "A receiver that got an item in line runs now, or will not."},
    {"remove", remove_item, METH_O, "An item is gone; False when it is not here."},
    {"drain", drain_items, METH_NOARGS, "Takes all items, as a list."},
    {"drain_line", drain_line, METH_NOARGS, "Takes all Waits out of the line, as a list."},
    {"items", items, METH_NOARGS, "The items that are here, as a list."},
    {"done", done, METH_NOARGS, "True when there is something to take."},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "Inbox[item]"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef inbox_members[] = {
    {"waiting", T_PYSSIZET, offsetof(Inbox, waiters.count), READONLY, "How many are in line."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot inbox_slots[] = {
    {Py_tp_init, inbox_init},       {Py_tp_dealloc, inbox_dealloc}, {Py_tp_traverse, inbox_traverse}, {Py_tp_clear, inbox_clear},
    {Py_tp_methods, inbox_methods}, {Py_tp_members, inbox_members},   {Py_sq_length, inbox_length},
    {Py_tp_doc, "Inbox(table): items in order of arrival, and a fair line of those who wait for one."},
    {0, NULL},
};

PyType_Spec inbox_spec = {
    .name = "aiordma._native._datapath.Inbox",
    .basicsize = sizeof(Inbox),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = inbox_slots,
};
