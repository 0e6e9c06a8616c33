/* aiordma._native._datapath: the module itself, and what its files share. */
#include "datapath.h"

PyTypeObject *ledger_type, *inbox_type, *table_type, *ring_type, *buffer_type, *receiver_type, *group_type,
    *sender_type, *governor_type, *grant_type, *region_type, *one_sided_type, *ready_type, *wait_type,
    *next_type, *endpoint_type;
PyObject *protocol_error, *misuse_error, *device_error, *cancelled_error, *invalid_state_error, *closed_error,
    *copy_context, *running_loop;
PyObject *ready_iterator;
PyObject *name_done, *name_set_result, *name_pump, *name_send_control, *name_used, *name_poll_turn, *name_turned,
    *name_wake, *name_sleep, *name_idle, *name_take, *name_give, *name_address, *name_lkey, *name_run, *name_self,
    *name_call_soon, *name_send_later, *name_write_later, *name_read_later, *name_read_into_later, *name_fetch_add_later,
    *name_compare_swap_later;

int call_none(PyObject *object, PyObject *name)
{
    PyObject *result = PyObject_CallMethodObjArgs(object, name, NULL);

    Py_XDECREF(result);
    return result ? 0 : -1;
}

int assign_ledger(Ledger **field, PyObject *value)
{
    PyObject *old = (PyObject *)*field;

    if (!value || !PyObject_TypeCheck(value, ledger_type)) {
        PyErr_SetString(PyExc_TypeError, "ledger: a Ledger");
        return -1;
    }
    *field = (Ledger *)Py_NewRef(value);
    Py_XDECREF(old);
    return 0;
}

static const struct {
    const char *name;
    PyType_Spec *spec;
    PyTypeObject **type;
} types[] = {
    {"Inbox", &inbox_spec, &inbox_type},
    {"Table", &table_spec, &table_type},          {"Ring", &ring_spec, &ring_type},
    {"Buffer", &buffer_spec, &buffer_type},       {"Receiver", &receiver_spec, &receiver_type},
    {"Group", &group_spec, &group_type},          {"Sender", &sender_spec, &sender_type},
    {"Governor", &governor_spec, &governor_type}, {"Grant", &grant_spec, &grant_type},
    {"Region", &region_spec, &region_type},       {"OneSided", &one_sided_spec, &one_sided_type},
    {"Ready", &ready_spec, &ready_type},          {"Wait", &wait_spec, &wait_type},
    {"Next", &next_spec, &next_type},
    {"Endpoint", &endpoint_spec, &endpoint_type},
};

static const struct {
    const char *text;
    PyObject **name;
} names[] = {
    {"done", &name_done},
    {"set_result", &name_set_result},
    {"pump", &name_pump},
    {"send_control", &name_send_control},
    {"used", &name_used},
    {"poll_turn", &name_poll_turn},
    {"turned", &name_turned},
    {"wake", &name_wake},
    {"sleep", &name_sleep},
    {"idle", &name_idle},
    {"take", &name_take},
    {"give", &name_give},
    {"address", &name_address},
    {"lkey", &name_lkey},
    {"run", &name_run},
    {"call_soon", &name_call_soon},
    {"__self__", &name_self},
    {"_send_later", &name_send_later},
    {"_write_later", &name_write_later},
    {"_read_later", &name_read_later},
    {"_read_into_later", &name_read_into_later},
    {"_fetch_add_later", &name_fetch_add_later},
    {"_compare_swap_later", &name_compare_swap_later},
};

static const struct {
    const char *module, *name;
    PyObject **object;
} imports[] = {
    {"aiordma._native._ledger", "Ledger", (PyObject **)&ledger_type},
    {"aiordma.errors", "ProtocolError", &protocol_error},
    {"aiordma.errors", "MisuseError", &misuse_error},
    {"aiordma.errors", "call_failed", &device_error},
    {"aiordma.errors", "ConnectionClosedError", &closed_error},
    {"asyncio.events", "_get_running_loop", &running_loop},
    {"asyncio.exceptions", "CancelledError", &cancelled_error},
    {"asyncio.exceptions", "InvalidStateError", &invalid_state_error},
    {"contextvars", "copy_context", &copy_context},
};

static int import_others(void)
{
    for (size_t i = 0; i < sizeof(imports) / sizeof(imports[0]); i++) {
        PyObject *module = PyImport_ImportModule(imports[i].module);

        if (!module)
            return -1;
        *imports[i].object = PyObject_GetAttrString(module, imports[i].name);
        Py_DECREF(module);
        if (!*imports[i].object)
            return -1;
    }
    return 0;
}

static int module_exec(PyObject *module)
{
    if (table_type) {
        PyErr_SetString(PyExc_ImportError, "_datapath cannot be loaded twice in one process");
        return -1;
    }
    if (table_count_forks()) {
        PyErr_NoMemory();
        return -1;
    }
    if (import_others())
        return -1;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (!(*names[i].name = PyUnicode_InternFromString(names[i].text)))
            return -1;
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        PyObject *type = PyType_FromSpec(types[i].spec);

        if (!type)
            return -1;
        *types[i].type = (PyTypeObject *)type;
        if (PyModule_AddObjectRef(module, types[i].name, type))
            return -1;
    }
    if (PyModule_AddIntMacro(module, POLL_BATCH) || PyModule_AddIntMacro(module, TURN_LIMIT) ||
        PyModule_AddIntMacro(module, MESSAGES) || PyModule_AddIntMacro(module, ONE_SIDED))
        return -1;
    ready_iterator = PyType_GenericAlloc(ready_type, 0);
    return ready_iterator ? 0 : -1;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_datapath",
    .m_doc = "What happens once for every small message.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__datapath(void)
{
    return PyModuleDef_Init(&module_def);
}
