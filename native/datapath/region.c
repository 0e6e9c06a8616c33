/* What the peer lets us into: a Grant is what it announced, a Region a range of one. regions.py has the rest, and the
 * words for what is not allowed. */
#include "datapath.h"

bool region_allows(const Region *region, const Sender *sender, size_t nbytes, unsigned int right)
{
    const Grant *grant = region->grant;

    return grant->connection == sender->connection && nbytes <= region->length &&
           (grant->rights & right) && !grant->revoked;
}

static int grant_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"connection", "name", "address", "length", "rkey", "rights", NULL};
    Grant *grant = (Grant *)self;
    PyObject *connection, *name;

    if (grant->connection) {
        PyErr_SetString(PyExc_ValueError, "a grant is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOKKII", names, &connection, &name, &grant->address, &grant->length,
                                     &grant->rkey, &grant->rights))
        return -1;
    grant->connection = Py_NewRef(connection);
    grant->name = Py_NewRef(name);
    return 0;
}

static int grant_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(((Grant *)self)->connection);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int grant_clear(PyObject *self)
{
    Py_CLEAR(((Grant *)self)->connection);
    return 0;
}

static void grant_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    grant_clear(self);
    Py_CLEAR(((Grant *)self)->name);
    object_free(self);
}

static PyMemberDef grant_members[] = {
    {"connection", T_OBJECT, offsetof(Grant, connection), READONLY, "Whose it is."},
    {"name", T_OBJECT, offsetof(Grant, name), READONLY, "The name the peer shared it under."},
    {"address", T_ULONGLONG, offsetof(Grant, address), READONLY, "Virtual address of the first byte, on the peer."},
    {"length", T_ULONGLONG, offsetof(Grant, length), READONLY, "Bytes."},
    {"rkey", T_UINT, offsetof(Grant, rkey), READONLY, "The key."},
    {"rights", T_UINT, offsetof(Grant, rights), READONLY, "REMOTE_* flags of Access."},
    {"revoked", T_BOOL, offsetof(Grant, revoked), 0, "The peer has taken it back."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot grant_slots[] = {
    {Py_tp_init, grant_init},   {Py_tp_dealloc, grant_dealloc}, {Py_tp_traverse, grant_traverse},
    {Py_tp_clear, grant_clear}, {Py_tp_members, grant_members},
    {Py_tp_doc, "Grant(connection, name, address, length, rkey, rights): what the peer announced under a name."},
    {0, NULL},
};

PyType_Spec grant_spec = {
    .name = "aiordma._native._datapath.Grant",
    .basicsize = sizeof(Grant),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = grant_slots,
};

static int region_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"grant", "offset", "length", NULL};
    Region *region = (Region *)self;
    unsigned long long offset, length;
    PyObject *grant;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KK", names, grant_type, &grant, &offset, &length))
        return -1;
    if (region->grant || offset > ((Grant *)grant)->length || length > ((Grant *)grant)->length - offset) {
        PyErr_SetString(PyExc_ValueError, "a region is made once, and lies within what was granted");
        return -1;
    }
    region->grant = (Grant *)Py_NewRef(grant);
    region->offset = offset;
    region->length = length;
    return 0;
}

static int region_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT((PyObject *)((Region *)self)->grant);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static void region_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    Py_CLEAR(((Region *)self)->grant);
    object_free(self);
}

static PyMemberDef region_members[] = {
    {"grant", T_OBJECT, offsetof(Region, grant), READONLY, "What it is a range of."},
    {"offset", T_ULONGLONG, offsetof(Region, offset), READONLY, "Its first byte, from that of the grant."},
    {"length", T_ULONGLONG, offsetof(Region, length), READONLY, "Bytes."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot region_slots[] = {
    {Py_tp_init, region_init},
    {Py_tp_dealloc, region_dealloc},
    {Py_tp_traverse, region_traverse},
    {Py_tp_members, region_members},
    {Py_tp_doc, "Region(grant, offset, length): a range of what the peer announced."},
    {0, NULL},
};

PyType_Spec region_spec = {
    .name = "aiordma._native._datapath.Region",
    .basicsize = sizeof(Region),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = region_slots,
};
