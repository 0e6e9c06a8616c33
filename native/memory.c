/* aiordma._native._memory: a buffer object over memory that something else owns.
 *
 * A Python class can export the buffer protocol only from 3.12 on (PEP 688), and a lease must know how many
 * views of it are alive: registered memory may not be handed out again while somebody can still write to it.
 * So the smallest possible type lives here: Memory(address, nbytes, owner), with `exports` counting the live
 * views and close() refusing new ones. It never frees anything; `owner` is held until the object dies.
 *
 * And new_bytes(), for what arrives as bytes. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    PyObject_HEAD
    void *address;
    Py_ssize_t nbytes;
    Py_ssize_t exports; /* live views; guarded by the GIL */
    int closed;
    PyObject *owner;
    PyObject *weakrefs;
} Memory;

static int memory_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "nbytes", "owner", NULL};
    Memory *self = (Memory *)object;
    unsigned long long address;
    Py_ssize_t nbytes;
    PyObject *owner = Py_None, *old;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Kn|O", names, &address, &nbytes, &owner))
        return -1;
    if (nbytes < 0 || (nbytes > 0 && address == 0)) {
        PyErr_SetString(PyExc_ValueError, "Memory needs a non-null address and a length of at least 0");
        return -1;
    }
    if (self->exports) {
        PyErr_SetString(PyExc_BufferError, "Memory has live views");
        return -1;
    }
    self->address = (void *)(uintptr_t)address;
    self->nbytes = nbytes;
    self->closed = 0;
    old = self->owner;
    self->owner = Py_NewRef(owner);
    Py_XDECREF(old);
    return 0;
}

static int memory_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(((Memory *)object)->owner);
    Py_VISIT((PyObject *)Py_TYPE(object));
    return 0;
}

static int memory_clear(PyObject *object)
{
    Py_CLEAR(((Memory *)object)->owner);
    return 0;
}

static void memory_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(object);
    if (((Memory *)object)->weakrefs)
        PyObject_ClearWeakRefs(object);
    memory_clear(object);
    free_object(object);
    Py_DECREF((PyObject *)type);
}

static int memory_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    Memory *self = (Memory *)object;

    if (self->closed) {
        view->obj = NULL;
        PyErr_SetString(PyExc_BufferError, "the memory was released");
        return -1;
    }
    if (PyBuffer_FillInfo(view, object, self->address, self->nbytes, 0, flags))
        return -1;
    self->exports++;
    return 0;
}

/* Tells a closed object that its last view is gone, so that its owner may use the memory again. Runs inside the
 * release of a buffer, where nothing may be raised: an error is reported as unraisable. */
static void memory_releasebuffer(PyObject *object, Py_buffer *view)
{
    Memory *self = (Memory *)object;
    PyObject *type, *value, *traceback, *done;

    (void)view;
    self->exports--;
    if (self->exports || !self->closed)
        return;
    PyErr_Fetch(&type, &value, &traceback);
    done = PyObject_CallMethod(object, "_last_view_gone", NULL);
    if (!done)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(done);
    PyErr_Restore(type, value, traceback);
}

static PyObject *memory_last_view_gone(PyObject *object, PyObject *unused)
{
    (void)object;
    (void)unused;
    Py_RETURN_NONE;
}

static Py_ssize_t memory_length(PyObject *object)
{
    return ((Memory *)object)->nbytes;
}

static PyObject *memory_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    ((Memory *)object)->closed = 1;
    Py_RETURN_NONE;
}

static PyObject *get_address(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong((uintptr_t)((Memory *)object)->address);
}

static PyObject *get_nbytes(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((Memory *)object)->nbytes);
}

static PyObject *get_exports(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((Memory *)object)->exports);
}

static PyObject *get_closed(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Memory *)object)->closed);
}

static PyMethodDef memory_methods[] = {
    {"_close_memory", memory_close, METH_NOARGS, "Refuses new views from now on; live ones stay valid."},
    {"_last_view_gone", memory_last_view_gone, METH_NOARGS,
     "Called when no view of a closed object is left; for subclasses."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef memory_getset[] = {
    {"address", get_address, NULL, "Virtual address of the first byte.", NULL},
    {"nbytes", get_nbytes, NULL, "Length in bytes.", NULL},
    {"exports", get_exports, NULL, "How many views of the memory are alive.", NULL},
    {"memory_closed", get_closed, NULL, "True once no new views are given.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef memory_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Memory, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_init, memory_init},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_traverse, memory_traverse},
    {Py_tp_clear, memory_clear},
    {Py_tp_methods, memory_methods},
    {Py_tp_getset, memory_getset},
    {Py_tp_members, memory_members},
    {Py_sq_length, memory_length},
    {Py_bf_getbuffer, memory_getbuffer},
    {Py_bf_releasebuffer, memory_releasebuffer},
    {Py_tp_doc, "Memory(address, nbytes, owner=None): a writable buffer over memory that `owner` keeps."},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    .name = "aiordma._native._memory.Memory",
    .basicsize = sizeof(Memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = memory_slots,
};

/* A bytes object that the device fills before anybody else sees it: no copy of a large result, and no page is
 * touched before its data comes. */
static PyObject *new_bytes(PyObject *module, PyObject *arg)
{
    Py_ssize_t nbytes = PyLong_AsSsize_t(arg);

    (void)module;
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize(NULL, nbytes);
}

static PyMethodDef module_methods[] = {
    {"new_bytes", new_bytes, METH_O, "A bytes object of this length whose contents are not set yet."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&memory_spec);
    int rc;

    if (!type)
        return -1;
    rc = PyModule_AddObjectRef(module, "Memory", type);
    Py_DECREF(type);
    return rc;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_memory",
    .m_doc = "A buffer object over memory that something else owns.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__memory(void)
{
    return PyModuleDef_Init(&module_def);
}
