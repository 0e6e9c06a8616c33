/* What every type here does at the end of an object. */
#ifndef AIORDMA_OBJECT_H
#define AIORDMA_OBJECT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The last step of a tp_dealloc, or all of it: the object is freed, and its type let go, which is one of the heap. */
static inline void object_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF((PyObject *)type);
}

#endif
