/* Small messages on their way out.
 *
 * A message that fits the inline data of the device and finds its credit is copied here and is the device's: it
 * needs no slot, no registered memory and no completion of its own. The first one of a turn of the loop leaves at
 * once; those behind it share a doorbell, at the end of the turn or when somebody polls. Of GROUP messages the last
 * is signaled, and up to GROUPS groups are in flight; an error completes any of them, and ends the connection.
 *
 * Everything else goes through SendQueue, which derives from Sender: it posts after flush(), never before, and
 * nothing here passes who waits in its queues. Called back there: pump(), send_control(), message_failed(status,
 * vendor_err), message_refused(errno). */
#include "datapath.h"

#include <arpa/inet.h>
#include <string.h>

/* --- Group ------------------------------------------------------------------------------------------- */

static bool has_waiters(const Sender *sender)
{
    return PyObject_Size(sender->credit_queue) > 0 || PyObject_Size(sender->slot_queue) > 0 || sender->wanted_back > 0;
}

int sender_pump(Sender *sender)
{
    return has_waiters(sender) ? call_none((PyObject *)sender, name_pump) : 0;
}

int sender_control(Sender *sender)
{
    return call_none((PyObject *)sender, name_send_control);
}

int group_completed(Group *group, const struct glue_wc *wc)
{
    Sender *sender = group->sender;
    int rc = 0;

    group->entered = 0;
    if (!sender)
        return 0;
    Py_INCREF((PyObject *)sender);
    if (wc->status != IBV_WC_SUCCESS) {
        PyObject *result =
            PyObject_CallMethod((PyObject *)sender, "message_failed", "II", wc->status, wc->vendor_err);

        rc = result ? 0 : -1;
        Py_XDECREF(result);
    } else {
        sender->in_flight -= (unsigned int)group->count;
        group->count = 0;
        rc = sender_pump(sender);
    }
    Py_DECREF((PyObject *)sender);
    return rc;
}

static void group_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    free_object(self);
    Py_DECREF((PyObject *)type);
}

static PyType_Slot group_slots[] = {
    {Py_tp_dealloc, group_dealloc},
    {Py_tp_doc, "Messages that one completion stands for."},
    {0, NULL},
};

PyType_Spec group_spec = {
    .name = "aiordma._native._datapath.Group",
    .basicsize = sizeof(Group),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = group_slots,
};

/* --- posting ----------------------------------------------------------------------------------------- */

/* Fills in the work request of the next message; false when there is no memory for its place in the table. */
static bool next_request(Sender *sender, struct ibv_send_wr *wr, struct ibv_sge *sge, unsigned int frame)
{
    Group *group = sender->groups[sender->group];

    if (!group->entered) {
        if (table_add(sender->table, (PyObject *)group, &group->wr_id))
            return false;
        group->entered = 1;
    }
    sge->addr = (uintptr_t)(sender->frames + frame * sender->stride);
    sge->length = sender->lengths[frame];
    memset(wr, 0, sizeof(*wr));
    wr->wr_id = group->wr_id;
    wr->sg_list = sge;
    wr->num_sge = 1;
    wr->opcode = IBV_WR_SEND;
    wr->send_flags = IBV_SEND_INLINE;
    if (++group->count == GROUP) {
        wr->send_flags |= IBV_SEND_SIGNALED;
        sender->group = (sender->group + 1) % GROUPS;
    }
    return true;
}

static void leave_dirty(Sender *sender)
{
    Sender **at = &sender->table->dirty;

    if (!sender->dirty)
        return;
    while (*at != sender)
        at = &(*at)->next;
    *at = sender->next;
    sender->next = NULL;
    sender->dirty = 0;
}

static int refused(Sender *sender, int rc)
{
    PyObject *result = PyObject_CallMethod((PyObject *)sender, "message_refused", "i", rc);

    sender->open = 0;
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int sender_flush(Sender *sender)
{
    struct ibv_send_wr wrs[FRAMES], *bad = NULL;
    struct ibv_sge sges[FRAMES];
    unsigned int count = sender->queued;
    int rc;

    leave_dirty(sender);
    sender->queued = 0;
    if (!count)
        return 0;
    for (unsigned int i = 0; i < count; i++) {
        if (!next_request(sender, &wrs[i], &sges[i], i))
            return -1;
        wrs[i].next = i + 1 < count ? &wrs[i + 1] : NULL;
    }
    rc = ibv_post_send(sender->qp, wrs, &bad);
    if (rc)
        return refused(sender, rc);
    sender->sent += count;
    return 0;
}

static int join_dirty(Sender *sender)
{
    if (sender->dirty)
        return 0;
    if (table_mark_turn(sender->table))
        return -1;
    sender->dirty = 1;
    sender->next = sender->table->dirty;
    sender->table->dirty = sender;
    return 0;
}

/* --- sending ----------------------------------------------------------------------------------------- */

static bool may_send(const Sender *sender)
{
    const Ledger *ledger = sender->ledger;

    return sender->open && ledger && ledger->data_limit - ledger->data_sent > sender->reserved &&
           sender->in_flight < GROUP * GROUPS && !has_waiters(sender);
}

static void put_frame(Sender *sender, const void *data, uint32_t nbytes)
{
    unsigned char *frame = sender->frames + sender->queued * sender->stride;
    uint32_t credits[2], length = htonl(nbytes);

    ledger_stamp(sender->ledger, &credits[0], &credits[1]);
    credits[0] = htonl(credits[0]);
    credits[1] = htonl(credits[1]);
    memset(frame, 0, 4);
    frame[0] = FRAME_MESSAGE;
    memcpy(frame + 4, &length, 4);
    memcpy(frame + 8, credits, 8);
    memcpy(frame + HEADER_SIZE, data, nbytes);
    sender->lengths[sender->queued++] = HEADER_SIZE + nbytes;
}

static int send_message(Sender *sender, const void *data, uint32_t nbytes)
{
    bool first = sender->turn != sender->table->turn;

    if (ledger_send_data(sender->ledger))
        return -1;
    sender->in_flight++;
    sender->handed++;
    put_frame(sender, data, nbytes);
    if (!first && sender->queued < FRAMES)
        return join_dirty(sender);
    if (first) {
        if (table_mark_turn(sender->table))
            return -1;
        sender->turn = sender->table->turn;
    }
    return sender_flush(sender);
}

/* True: the message is on its way. False: it needs SendQueue.submit(), which also says what is wrong with it. */
static PyObject *send_now(PyObject *self, PyObject *data)
{
    Sender *sender = (Sender *)self;
    Py_buffer view;
    int rc;

    if (!may_send(sender))
        Py_RETURN_FALSE;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)) {
        PyErr_Clear();
        Py_RETURN_FALSE;
    }
    if ((size_t)view.len + HEADER_SIZE > sender->stride) {
        PyBuffer_Release(&view);
        Py_RETURN_FALSE;
    }
    rc = send_message(sender, view.buf, (uint32_t)view.len);
    PyBuffer_Release(&view);
    if (rc)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *flush(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (sender_flush((Sender *)self))
        return NULL;
    Py_RETURN_NONE;
}

/* The queue pair is gone: no completion comes any more. */
static PyObject *forget(PyObject *self, PyObject *unused)
{
    Sender *sender = (Sender *)self;

    (void)unused;
    sender->open = 0;
    leave_dirty(sender);
    for (int i = 0; i < GROUPS; i++)
        table_remove(sender->table, sender->groups[i]->wr_id, (PyObject *)sender->groups[i]);
    Py_RETURN_NONE;
}

static int make_groups(Sender *sender)
{
    for (int i = 0; i < GROUPS; i++) {
        Group *group = (Group *)PyType_GenericAlloc(group_type, 0);

        if (!group)
            return -1;
        group->sender = sender;
        sender->groups[i] = group;
    }
    return 0;
}

static int sender_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", "qp", "max_inline", "credit_queue", "slot_queue", NULL};
    Sender *sender = (Sender *)self;
    unsigned long long qp;
    unsigned long max_inline;
    PyObject *table, *credit_queue, *slot_queue;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KkOO", names, table_type, &table, &qp, &max_inline, &credit_queue,
                                     &slot_queue))
        return -1;
    if (sender->table) {
        PyErr_SetString(PyExc_ValueError, "a sender is made once");
        return -1;
    }
    if (make_groups(sender))
        return -1;
    if (max_inline >= HEADER_SIZE) {
        sender->frames = PyMem_Malloc(FRAMES * max_inline);
        if (!sender->frames) {
            PyErr_NoMemory();
            return -1;
        }
        sender->stride = max_inline;
    }
    sender->qp = (struct ibv_qp *)(uintptr_t)qp;
    sender->credit_queue = Py_NewRef(credit_queue);
    sender->slot_queue = Py_NewRef(slot_queue);
    sender->table = (Table *)Py_NewRef(table);
    return 0;
}

static int sender_traverse(PyObject *self, visitproc visit, void *arg)
{
    Sender *sender = (Sender *)self;

    Py_VISIT((PyObject *)sender->table);
    Py_VISIT((PyObject *)sender->ledger);
    Py_VISIT(sender->credit_queue);
    Py_VISIT(sender->slot_queue);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int sender_clear(PyObject *self)
{
    ((Sender *)self)->open = 0;
    Py_CLEAR(((Sender *)self)->ledger);
    return 0;
}

static void sender_dealloc(PyObject *self)
{
    Sender *sender = (Sender *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    if (sender->table)
        leave_dirty(sender);
    for (int i = 0; i < GROUPS; i++) {
        if (sender->groups[i])
            sender->groups[i]->sender = NULL;
        Py_CLEAR(sender->groups[i]);
    }
    Py_CLEAR(sender->ledger);
    Py_CLEAR(sender->credit_queue);
    Py_CLEAR(sender->slot_queue);
    Py_CLEAR(sender->table);
    PyMem_Free(sender->frames);
    free_object(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *get_ledger(PyObject *self, void *unused)
{
    Ledger *ledger = ((Sender *)self)->ledger;

    (void)unused;
    return Py_NewRef(ledger ? (PyObject *)ledger : Py_None);
}

static int set_ledger(PyObject *self, PyObject *value, void *unused)
{
    (void)unused;
    return assign_ledger(&((Sender *)self)->ledger, value);
}

static PyMethodDef sender_methods[] = {
    {"send_now", send_now, METH_O, "send_now(data): sends a small message, if nothing holds it up; else False."},
    {"flush", flush, METH_NOARGS, "Posts the messages of this turn that were not posted yet."},
    {"forget", forget, METH_NOARGS, "The queue pair is gone: no completion comes any more. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef sender_getset[] = {
    {"ledger", get_ledger, set_ledger, "The credits; None until the handshake is over.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef sender_members[] = {
    {"open", T_BOOL, offsetof(Sender, open), 0, "Messages may go this way."},
    {"queued", T_UINT, offsetof(Sender, queued), READONLY, "Messages that wait for flush()."},
    {"reserved", T_LONGLONG, offsetof(Sender, reserved), 0, "Credits promised to operations that wait for a slot."},
    {"wanted_back", T_LONGLONG, offsetof(Sender, wanted_back), 0, "Data credits the peer would like to have back."},
    {"sent", T_LONGLONG, offsetof(Sender, sent), 0, "Work requests that were posted."},
    {"handed", T_LONGLONG, offsetof(Sender, handed), 0, "Messages that were handed to the device, since the start."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot sender_slots[] = {
    {Py_tp_init, sender_init},       {Py_tp_dealloc, sender_dealloc}, {Py_tp_traverse, sender_traverse},
    {Py_tp_clear, sender_clear},     {Py_tp_methods, sender_methods}, {Py_tp_members, sender_members},
    {Py_tp_getset, sender_getset},
    {Py_tp_doc, "Sender(table, qp, max_inline, credit_queue, slot_queue): small messages on their way out."},
    {0, NULL},
};

PyType_Spec sender_spec = {
    .name = "aiordma._native._datapath.Sender",
    .basicsize = sizeof(Sender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = sender_slots,
};
