/* Items in order of arrival, and a fair line of those who wait for one (wait.c).
 *
 * While somebody waits, nothing lies here: an item goes to the first in line, and is that receiver's from then on. One that is cancelled before it has run puts the item back, at the head. */
#include "datapath.h"

#include <string.h>

static void free_places(struct objects *queue)
{
    if (queue->at != queue->few)
        PyMem_Free(queue->at);
}

static int objects_grow(struct objects *queue)
{
    Py_ssize_t size = queue->size ? 2 * queue->size : FEW;
    PyObject **at = queue->size ? PyMem_Malloc((size_t)size * sizeof(*at)) : queue->few;

    if (!at) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < queue->count; i++)
        at[i] = queue->at[(queue->head + i) & (queue->size - 1)];
    free_places(queue);
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
    free_places(queue);
    memset(queue, 0, sizeof(*queue));
}

PyObject *spare_take(PyObject **spare)
{
    PyObject *object = *spare;

    if (!object || Py_REFCNT(object) > 1)
        return NULL;
    *spare = NULL;
    return object;
}

void spare_put(PyObject **spare, PyObject *object)
{
    PyObject *before = *spare;

    *spare = object;
    Py_XDECREF(before);
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

bool inbox_has(PyObject *inbox)
{
    return ((Inbox *)inbox)->items.count > 0;
}

int inbox_spin(Inbox *inbox, bool (*done)(PyObject *), PyObject *what)
{
    struct spin spin = {.cq = inbox->cq, .governor = inbox->governor, .done = done, .what = what};

    return inbox->cq ? table_spin(inbox->table, &spin) : 0;
}

void inbox_runs(Inbox *inbox)
{
    if (inbox->table->woken)
        inbox->table->woken--;
}

static PyObject *spin(PyObject *self, PyObject *what)
{
    if (inbox_spin((Inbox *)self, says_done, what))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *wait_for_next(PyObject *self, PyObject *unused)
{
    (void)unused;
    return next_new((Inbox *)self, NULL, false);
}

static PyObject *fail(PyObject *self, PyObject *make_error)
{
    Inbox *inbox = (Inbox *)self;
    PyObject *wait, *before = inbox->make_error;
    int rc = 0;

    inbox->make_error = Py_NewRef(make_error);
    Py_XDECREF(before);
    while (!rc && (wait = objects_pop(&inbox->waiters))) {
        PyObject *error = PyObject_CallFunctionObjArgs(make_error, NULL);

        rc = error ? wait_fail((Wait *)wait, error) : -1;
        Py_XDECREF(error);
        Py_DECREF(wait);
    }
    if (rc)
        return NULL;
    Py_RETURN_NONE;
}

static int inbox_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", "cq", "governor", "give_back", NULL};
    Inbox *inbox = (Inbox *)self;
    PyObject *table, *value = Py_None, *give_back = Py_None;
    Governor *governor;
    unsigned long long cq = 0;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|KOO", names, table_type, &table, &cq, &value, &give_back))
        return -1;
    if (governor_of(value, &governor))
        return -1;
    if (inbox->table) {
        PyErr_SetString(PyExc_ValueError, "an inbox is made once");
        return -1;
    }
    inbox->cq = (struct ibv_cq *)(uintptr_t)cq;
    inbox->governor = (Governor *)Py_XNewRef((PyObject *)governor);
    inbox->give_back = give_back == Py_None ? NULL : Py_NewRef(give_back);
    inbox->table = (Table *)Py_NewRef(table);
    return 0;
}

static PyObject *remove_item(PyObject *self, PyObject *item)
{
    return PyBool_FromLong(objects_remove(&((Inbox *)self)->items, item));
}

static PyObject *drain(PyObject *self, PyObject *unused)
{
    PyObject *list = PyList_New(0), *object;

    (void)unused;
    while (list && (object = objects_pop(&((Inbox *)self)->items))) {
        if (PyList_Append(list, object))
            Py_CLEAR(list);
        Py_DECREF(object);
    }
    return list;
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
    Py_VISIT((PyObject *)((Inbox *)self)->governor);
    Py_VISIT(((Inbox *)self)->give_back);
    Py_VISIT(((Inbox *)self)->make_error);
    Py_VISIT(((Inbox *)self)->spare_next);
    Py_VISIT(((Inbox *)self)->spare_wait);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int inbox_clear(PyObject *self)
{
    objects_clear(&((Inbox *)self)->items);
    objects_clear(&((Inbox *)self)->waiters);
    Py_CLEAR(((Inbox *)self)->give_back);
    Py_CLEAR(((Inbox *)self)->make_error);
    Py_CLEAR(((Inbox *)self)->spare_next);
    Py_CLEAR(((Inbox *)self)->spare_wait);
    return 0;
}

static void inbox_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    inbox_clear(self);
    Py_CLEAR(((Inbox *)self)->governor);
    Py_CLEAR(((Inbox *)self)->table);
    object_free(self);
}

static PyMethodDef inbox_methods[] = {
    {"put", put, METH_O, "One more item, for the first in line or for later; True when somebody has it now."},
    {"put_back", put_back, METH_O, "An item that was taken is the next one again; True as for put()."},
    {"wait", wait_for_next, METH_NOARGS, "A Next: the next item, when there is one; raises what fail() was given."},
    {"spin", spin, METH_O, "spin(what): polls until what.done(), as for an item, or not at all without a queue."},
    {"fail", fail, METH_O,
     "fail(make_error): everyone in line gets an error of their own, and who comes later; those who have their item\n"
     "already keep it, and what lies here can be taken."},
    {"remove", remove_item, METH_O, "An item is gone; False when it is not here."},
    {"drain", drain, METH_NOARGS, "Takes all items, as a list."},
    {"items", items, METH_NOARGS, "The items that are here, as a list."},
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
    {Py_tp_doc, "Inbox(table, cq=0, governor=None, give_back=None): items in order of arrival, and a fair line of those who wait for\n"
     "one, while the queue is polled."},
    {0, NULL},
};

PyType_Spec inbox_spec = {
    .name = "aiordma._native._datapath.Inbox",
    .basicsize = sizeof(Inbox),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = inbox_slots,
};
