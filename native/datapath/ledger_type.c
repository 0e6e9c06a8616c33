/* aiordma._native._ledger: the type behind protocol/credit.py, whose CreditLedger derives from it and has the rest. */
#include "ledger.h"
#include "object.h"

#include <limits.h>
#include <stddef.h>
#include <structmember.h>

PyObject *protocol_error, *misuse_error;

static PyObject *send_data(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (ledger_send_data((Ledger *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *stamp(PyObject *self, PyObject *unused)
{
    uint32_t data, control;

    (void)unused;
    ledger_stamp((Ledger *)self, &data, &control);
    return Py_BuildValue("(kk)", (unsigned long)data, (unsigned long)control);
}

static PyObject *receive_data(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (ledger_receive_data((Ledger *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *learn(PyObject *self, PyObject *args)
{
    unsigned long data, control;
    int more;

    if (!PyArg_ParseTuple(args, "kk", &data, &control))
        return NULL;
    more = ledger_learn((Ledger *)self, (uint32_t)data, (uint32_t)control);
    return more < 0 ? NULL : PyBool_FromLong(more);
}

static PyObject *release(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (ledger_release((Ledger *)self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *update_due(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(ledger_update_due((Ledger *)self));
}

static PyObject *get_data_credits(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((Ledger *)self)->data_limit - ((Ledger *)self)->data_sent);
}

static PyObject *get_control_credits(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((Ledger *)self)->control_limit - ((Ledger *)self)->control_sent);
}

static int ledger_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "", names))
        return -1;
    ((Ledger *)self)->mark = LLONG_MAX;
    return 0;
}

static PyMethodDef ledger_methods[] = {
    {"send_data", send_data, METH_NOARGS, "Takes a data credit; the caller has seen that there is one."},
    {"stamp", stamp, METH_NOARGS, "The two limits for the header of the frame that goes out now, modulo 2**32."},
    {"receive_data", receive_data, METH_NOARGS, "A data frame arrived; ProtocolError without credit for it."},
    {"learn", learn, METH_VARARGS, "Takes in the limits of a received header; True when the data limit rose."},
    {"release", release, METH_NOARGS, "The user took a message, and its receive was posted again."},
    {"update_due", update_due, METH_NOARGS, "True when a credit frame should go out now (and may)."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ledger_getset[] = {
    {"data_credits", get_data_credits, NULL, "How many data frames may be sent now.", NULL},
    {"control_credits", get_control_credits, NULL, "How many credit frames may be sent now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define COUNTER(name) {#name, T_LONGLONG, offsetof(Ledger, name), 0, NULL}
static PyMemberDef ledger_members[] = {
    COUNTER(window),       COUNTER(asked),         COUNTER(control),          COUNTER(peer_control),
    COUNTER(peer_window_max), COUNTER(data_limit), COUNTER(data_sent),        COUNTER(control_limit),
    COUNTER(control_sent), COUNTER(data_received), COUNTER(data_released),    COUNTER(control_received),
    COUNTER(data_told),    COUNTER(control_told),  COUNTER(mark),             {NULL, 0, 0, 0, NULL},
};

static PyType_Slot ledger_slots[] = {
    {Py_tp_init, ledger_init},       {Py_tp_dealloc, object_free}, {Py_tp_methods, ledger_methods},
    {Py_tp_getset, ledger_getset},   {Py_tp_members, ledger_members},
    {Py_tp_doc, "The counters of credits that move with each frame; see aiordma.protocol.credit."},
    {0, NULL},
};

static PyType_Spec ledger_spec = {
    .name = "aiordma._native._ledger.Ledger",
    .basicsize = sizeof(Ledger),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = ledger_slots,
};

static int module_exec(PyObject *module)
{
    PyObject *errors = PyImport_ImportModule("aiordma.errors"), *type;
    int rc;

    if (!errors)
        return -1;
    protocol_error = PyObject_GetAttrString(errors, "ProtocolError");
    misuse_error = PyObject_GetAttrString(errors, "MisuseError");
    Py_DECREF(errors);
    if (!protocol_error || !misuse_error)
        return -1;
    type = PyType_FromSpec(&ledger_spec);
    if (!type)
        return -1;
    rc = PyModule_AddObjectRef(module, "Ledger", type);
    Py_DECREF(type);
    return rc;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_ledger",
    .m_doc = "The counters of a connection's credits.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__ledger(void)
{
    return PyModuleDef_Init(&module_def);
}
