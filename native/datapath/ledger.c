/* The counters of a connection's credits that move with each frame. What they mean, and why nobody ever blocks, is
 * told in protocol/credit.py, whose CreditLedger derives from this type and has the rest. */
#include "datapath.h"

#include <limits.h>

int ledger_send_data(Ledger *ledger)
{
    if (ledger->data_sent >= ledger->data_limit) {
        PyErr_SetString(misuse_error, "no data credit");
        return -1;
    }
    ledger->data_sent++;
    return 0;
}

void ledger_stamp(Ledger *ledger, uint32_t *data, uint32_t *control)
{
    ledger->data_told = ledger->window + ledger->data_released;
    ledger->control_told = ledger->control + ledger->control_received;
    *data = (uint32_t)ledger->data_told;
    *control = (uint32_t)ledger->control_told;
}

int ledger_receive_data(Ledger *ledger)
{
    ledger->data_received++;
    if (ledger->data_received > ledger->data_told) {
        PyErr_Format(protocol_error, "peer sent data frame %lld with credit for %lld", ledger->data_received,
                     ledger->data_told);
        return -1;
    }
    return 0;
}

int ledger_learn(Ledger *ledger, uint32_t data, uint32_t control)
{
    long long data_rise = (uint32_t)(data - (uint32_t)ledger->data_limit);
    long long control_rise = (uint32_t)(control - (uint32_t)ledger->control_limit);

    if (ledger->data_limit + data_rise > ledger->data_sent + ledger->peer_window_max) {
        PyErr_Format(protocol_error, "peer grants %lld data credits more, %lld are left of %lld", data_rise,
                     ledger->data_limit - ledger->data_sent, ledger->peer_window_max);
        return -1;
    }
    if (ledger->control_limit + control_rise > ledger->control_sent + ledger->peer_control) {
        PyErr_Format(protocol_error, "peer grants %lld control credits more, %lld are left of %lld", control_rise,
                     ledger->control_limit - ledger->control_sent, ledger->peer_control);
        return -1;
    }
    ledger->data_limit += data_rise;
    ledger->control_limit += control_rise;
    return data_rise > 0;
}

int ledger_release(Ledger *ledger)
{
    if (ledger->data_released >= ledger->data_received) {
        PyErr_SetString(misuse_error, "more released than received");
        return -1;
    }
    ledger->data_released++;
    return 0;
}

bool ledger_update_due(const Ledger *ledger)
{
    long long left = ledger->control_limit - ledger->control_sent;
    long long owed = ledger->window + ledger->data_released - ledger->data_told;

    if (left <= 0)
        return false;
    if (owed > 0 &&
        (ledger->data_received == ledger->data_told || (left > 1 && owed >= (ledger->window + 1) / 2)))
        return true;
    return ledger->control + ledger->control_received - ledger->control_told >= (ledger->control + 1) / 2;
}

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

static void ledger_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    free_object(self);
    Py_DECREF((PyObject *)type);
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
    {Py_tp_init, ledger_init},       {Py_tp_dealloc, ledger_dealloc}, {Py_tp_methods, ledger_methods},
    {Py_tp_getset, ledger_getset},   {Py_tp_members, ledger_members},
    {Py_tp_doc, "The counters of credits that move with each frame; see aiordma.protocol.credit."},
    {0, NULL},
};

PyType_Spec ledger_spec = {
    .name = "aiordma._native._datapath.Ledger",
    .basicsize = sizeof(Ledger),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = ledger_slots,
};
