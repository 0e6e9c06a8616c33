/* Messages that are copied, and small writes, on their way out.
 *
 * A message that fits the inline data of the device and finds its credit is copied here and is the device's: it
 * needs no slot, no registered memory and no completion of its own. The first one of a turn of the loop leaves at
 * once; those behind it share a doorbell, at the end of the turn or when somebody polls. Of GROUP messages the last
 * is signaled, and up to MESSAGES are in flight; an error completes any of them, and ends the connection.
 *
 * A larger one, up to what the peer's buffers hold, is copied to a staging buffer (staging.py), which is lent until
 * the completion of its group; so that it is not kept for long, each doorbell with such a message ends a group.
 *
 * Everything else goes through SendQueue, which derives from Sender: it posts after flush(), never before, and
 * nothing here passes who waits in its queues. Called back there: pump(), send_control(), message_failed(status,
 * vendor_err), write_failed(write, status, vendor_err), message_refused(errno), idle(). */
#include "datapath.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

/* --- Group ------------------------------------------------------------------------------------------- */

/* Whoever begins to wait says so: empty queues, which are cold ones, are not looked at for every message. */
static bool in_queues(Sender *sender)
{
    if (sender->may_wait)
        sender->may_wait = PyObject_Size(sender->credit_queue) > 0 || PyObject_Size(sender->slot_queue) > 0;
    return sender->may_wait;
}

static bool has_waiters(Sender *sender)
{
    return sender->wanted_back > 0 || in_queues(sender);
}

int sender_pump(Sender *sender)
{
    return has_waiters(sender) ? call_none((PyObject *)sender, name_pump) : 0;
}

int sender_control(Sender *sender)
{
    return call_none((PyObject *)sender, name_send_control);
}

/* A staging buffer is not needed any more; that may call others who wait for one. */
static void give_buffer(Sender *sender, PyObject *buffer)
{
    PyObject *result = PyObject_CallMethodObjArgs(sender->staging, name_give, buffer, NULL);

    if (!result)
        table_unraisable(sender->table);
    Py_XDECREF(result);
    Py_DECREF(buffer);
}

/* The first `count` that we hold. */
static void give_back(Sender *sender, Py_ssize_t count)
{
    PyObject *buffer;

    while (count-- && (buffer = objects_pop(&sender->staged)))
        give_buffer(sender, buffer);
}

int group_completed(Group *group, const struct glue_wc *wc)
{
    Sender *sender = group->sender;
    int rc = 0, staged = group->staged;

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
        sender->closed--;
        group->count = group->staged = 0;
        give_back(sender, staged);
        rc = sender_pump(sender);
    }
    Py_DECREF((PyObject *)sender);
    return rc;
}

static PyType_Slot group_slots[] = {
    {Py_tp_dealloc, object_free},
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

/* This is the last message of its group. */
static void close_group(Sender *sender, struct ibv_send_wr *wr)
{
    wr->send_flags |= IBV_SEND_SIGNALED;
    sender->closed++;
    sender->group = (sender->group + 1) % GROUPS;
}

/* The next message of a group. -1 and MemoryError. */
static int message_posting(Sender *sender, const struct frame *frame, struct ibv_send_wr *wr)
{
    Group *group = sender->groups[sender->group];

    if (!group->entered) {
        if (table_add(sender->table, (PyObject *)group, &group->wr_id))
            return -1;
        group->entered = 1;
    }
    wr->wr_id = group->wr_id;
    wr->opcode = IBV_WR_SEND;
    group->staged += frame->address != 0;
    if (++group->count == GROUP)
        close_group(sender, wr);
    return 0;
}

/* The work request of what is gathered at `i`. -1 and an exception. */
static int make_request(Sender *sender, unsigned int i, struct ibv_send_wr *wr, struct ibv_sge *sge)
{
    struct frame *frame = &sender->frame[i];

    memset(wr, 0, sizeof(*wr));
    if (frame->length) {
        sge->addr = frame->address ? frame->address : (uintptr_t)(sender->frames + i * sender->stride);
        sge->length = frame->length;
        sge->lkey = frame->lkey;
        wr->sg_list = sge;
        wr->num_sge = 1;
        wr->send_flags = frame->address ? 0 : IBV_SEND_INLINE;
    }
    if (!frame->write)
        return message_posting(sender, frame, wr);
    wr->opcode = IBV_WR_RDMA_WRITE;
    wr->wr.rdma.remote_addr = frame->remote;
    wr->wr.rdma.rkey = frame->rkey;
    if (write_posting(frame->write, wr))
        return -1;
    Py_CLEAR(frame->write);
    return 0;
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

/* The device did not take requests, the last `writes` writes in the list among them, or there was no memory to make
 * them: nothing may be posted behind the gap, and their writes, like those still gathered, end with the error. */
static int refused(Sender *sender, int rc, unsigned int writes)
{
    PyObject *error;

    sender->open = 0;
    error = PyObject_CallMethod((PyObject *)sender, "message_refused", "i", rc);
    if (!error)
        return -1;
    for (int i = 0; i < FRAMES; i++) {
        if (!sender->frame[i].write)
            continue;
        sender->writes--;
        write_refused(sender->frame[i].write, error);
        Py_CLEAR(sender->frame[i].write);
    }
    writes_drop(sender, writes, error);
    Py_DECREF(error);
    return 0;
}

int sender_flush(Sender *sender)
{
    struct ibv_send_wr wrs[FRAMES], *bad = NULL;
    struct ibv_sge sges[FRAMES];
    unsigned int count = sender->queued, missed = 0;
    struct ibv_send_wr *last_write = NULL, *last_message = NULL;
    bool staged = false;
    long long now = 0;
    int rc;

    leave_dirty(sender);
    sender->queued = 0;
    if (!count)
        return 0;
    for (unsigned int i = 0; i < count; i++) {
        Write *write = sender->frame[i].write;

        if (write) {
            last_write = &wrs[i];
            if (sender->governor)
                write->started_ns = now = now ? now : now_ns();
        }
        if (make_request(sender, i, &wrs[i], &sges[i])) {
            PyErr_Clear();
            return refused(sender, ENOMEM, missed);
        }
        missed += write != NULL;
        if (!write) {
            last_message = &wrs[i];
            staged |= sender->frame[i].address != 0;
        }
        wrs[i].next = i + 1 < count ? &wrs[i + 1] : NULL;
    }
    if (last_write)
        last_write->send_flags |= IBV_SEND_SIGNALED;
    if (staged && !(last_message->send_flags & IBV_SEND_SIGNALED))
        close_group(sender, last_message);
    rc = ibv_post_send(sender->qp, wrs, &bad);
    if (!rc) {
        sender->sent += count;
        return 0;
    }
    for (missed = 0; bad; bad = bad->next)
        missed += bad->opcode == IBV_WR_RDMA_WRITE;
    return refused(sender, rc, missed);
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

/* --- gathering --------------------------------------------------------------------------------------- */

static bool sent_in_turn(const Sender *sender)
{
    return sender->turn == sender->table->turn;
}

/* What has been gathered goes out: at once if it is the first of this turn of the loop, else with others. */
static int go_out(Sender *sender)
{
    bool first = !sent_in_turn(sender);

    if (!first && sender->queued < FRAMES)
        return join_dirty(sender);
    sender->turn = sender->table->turn;
    if (first && table_mark_turn(sender->table)) {
        sender->turn = 0; /* the loop is closed: nobody would say that the turn is over */
        PyErr_Clear();
    }
    return sender_flush(sender);
}

/* Where inline data is gathered. Most connections of a server are idle, and some never send: none until one does. */
static bool has_frames(Sender *sender)
{
    if (!sender->frames && sender->stride)
        sender->frames = PyMem_Malloc(FRAMES * sender->stride);
    return sender->frames || !sender->stride;
}

/* What is gathered fills at most the rest of a group, and FRAMES / GROUP more. */
#define CLOSED (GROUPS - FRAMES / GROUP - 1)

static bool may_send(Sender *sender)
{
    const Ledger *ledger = sender->ledger;

    return sender->open && ledger && ledger->data_limit - ledger->data_sent > sender->reserved &&
           sender->in_flight < MESSAGES && sender->closed <= CLOSED && !has_waiters(sender) &&
           table_here(sender->table) && has_frames(sender);
}

/* Where a staging buffer is. -1 and an exception. */
static int locate(PyObject *buffer, struct frame *frame)
{
    PyObject *address = PyObject_GetAttr(buffer, name_address), *lkey = PyObject_GetAttr(buffer, name_lkey);

    if (address && lkey) {
        frame->address = PyLong_AsUnsignedLongLong(address);
        frame->lkey = (uint32_t)PyLong_AsUnsignedLong(lkey);
    }
    Py_XDECREF(address);
    Py_XDECREF(lkey);
    return PyErr_Occurred() ? -1 : 0;
}

/* A staging buffer for the next message, the last of `staged` then. 1: it is at frame->address; 0: there is none, or
 * the message may not go any more; -1 and an exception. */
static int take_buffer(Sender *sender, struct frame *frame)
{
    PyObject *buffer = PyObject_CallMethodObjArgs(sender->staging, name_take, (PyObject *)sender, NULL);
    PyObject *type, *value, *traceback;
    int rc;

    if (!buffer)
        return -1;
    if (buffer == Py_None) {
        Py_DECREF(buffer);
        return 0;
    }
    /* Taking it may have collected garbage, and so run anything. */
    rc = locate(buffer, frame) ? -1 : may_send(sender);
    if (rc > 0 && objects_append(&sender->staged, buffer))
        rc = -1;
    if (rc > 0) {
        Py_DECREF(buffer);
        return rc;
    }
    PyErr_Fetch(&type, &value, &traceback);
    give_buffer(sender, buffer);
    PyErr_Restore(type, value, traceback);
    return rc;
}

/* `place` has the address and key of a staging buffer, or none. Runs no code of others before the message is in its
 * place in the queue. */
static int send_message(Sender *sender, const struct frame *place, const Py_buffer *data)
{
    struct frame *frame = &sender->frame[sender->queued];
    unsigned char *at = place->address ? (unsigned char *)(uintptr_t)place->address
                                       : sender->frames + sender->queued * sender->stride;
    uint32_t credits[2], nbytes = (uint32_t)data->len, length = htonl(nbytes);

    if (ledger_send_data(sender->ledger))
        return -1;
    sender->in_flight++;
    sender->handed++;
    ledger_stamp(sender->ledger, &credits[0], &credits[1]);
    credits[0] = htonl(credits[0]);
    credits[1] = htonl(credits[1]);
    memset(at, 0, 4);
    at[0] = FRAME_MESSAGE;
    memcpy(at + 4, &length, 4);
    memcpy(at + 8, credits, 8);
    memcpy(at + HEADER_SIZE, data->buf, nbytes);
    *frame = *place;
    frame->length = HEADER_SIZE + nbytes;
    sender->queued++;
    return go_out(sender);
}

int sender_send(Sender *sender, PyObject *data)
{
    struct frame place = {0};
    Py_buffer view;
    int goes = 1;

    for (size_t at = offsetof(Sender, table); at < offsetof(Sender, frame[1]); at += 64)
        __builtin_prefetch((const char *)sender + at);
    if (!may_send(sender))
        return 0;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)) {
        PyErr_Clear();
        return 0;
    }
    if ((size_t)view.len > sender->eager)
        goes = 0;
    else if ((size_t)view.len + HEADER_SIZE > sender->stride)
        goes = take_buffer(sender, &place);
    if (goes > 0 && send_message(sender, &place, &view))
        goes = -1;
    PyBuffer_Release(&view);
    return goes;
}

static PyObject *send_first(PyObject *self, PyObject *data)
{
    Sender *sender = (Sender *)self;
    int goes = sent_in_turn(sender) ? 0 : sender_send(sender, data);

    return goes < 0 ? NULL : PyBool_FromLong(goes);
}

/* Nothing passes a write that was issued before; messages that wait for a credit are passed. */
static bool has_room(Sender *sender)
{
    return sender->open && sender->writes < WRITES &&
           !(in_queues(sender) && PyObject_Size(sender->slot_queue) > 0) && has_frames(sender);
}

static bool may_write(Sender *sender, PyObject *region)
{
    return has_room(sender) && PyObject_TypeCheck(region, region_type) && table_here(sender->table);
}

/* Whether a write of this object goes this way; its buffer, which the caller releases. */
static bool fits(const Sender *sender, PyObject *data, const Region *region, Py_buffer *view)
{
    if (PyObject_GetBuffer(data, view, PyBUF_SIMPLE)) {
        PyErr_Clear();
        return false;
    }
    if ((size_t)view->len <= sender->stride && region_allows(region, sender, (size_t)view->len))
        return true;
    PyBuffer_Release(view);
    return false;
}

/* Gathers a write. Runs no code of others between the copy and its place in the queue. */
static void put_write(Sender *sender, Write *write, const Region *region, const Py_buffer *view)
{
    struct frame *frame = &sender->frame[sender->queued];

    memcpy(sender->frames + sender->queued * sender->stride, view->buf, (size_t)view->len);
    memset(frame, 0, sizeof(*frame));
    frame->length = (uint32_t)view->len;
    frame->remote = region->grant->address + region->offset;
    frame->rkey = region->grant->rkey;
    frame->write = (Write *)Py_NewRef((PyObject *)write);
    sender->writes++;
    sender->queued++;
}

Write *sender_write(Sender *sender, PyObject *data, PyObject *region)
{
    Py_buffer view;
    Write *write;
    int rc = 0;

    if (!may_write(sender, region) || !fits(sender, data, (Region *)region, &view))
        return NULL;
    write = write_new(sender);
    if (write && has_room(sender)) { /* making it may have collected garbage, and so run anything */
        put_write(sender, write, (Region *)region, &view);
        rc = go_out(sender);
    } else if (write) {
        Py_CLEAR(write);
    }
    PyBuffer_Release(&view);
    if (rc)
        Py_CLEAR(write);
    return write;
}

/* A write for later: True when it would go this way now. */
static PyObject *prepare_write(PyObject *self, PyObject *args)
{
    Sender *sender = (Sender *)self;
    PyObject *data, *region;
    Py_buffer view;
    Write *write;

    if (!PyArg_ParseTuple(args, "OO", &data, &region))
        return NULL;
    if (!sender->open || !table_here(sender->table) || !PyObject_TypeCheck(region, region_type) ||
        !fits(sender, data, (Region *)region, &view))
        Py_RETURN_NONE;
    PyBuffer_Release(&view);
    write = write_new(sender);
    if (!write)
        return NULL;
    write->data = Py_NewRef(data);
    write->region = (Region *)Py_NewRef(region);
    return (PyObject *)write;
}

/* Gathers prepared writes, from the first of a list on; how many, up to the first that needs SendQueue.submit(). */
static PyObject *post_prepared(PyObject *self, PyObject *args)
{
    Sender *sender = (Sender *)self;
    PyObject *list;
    Py_ssize_t at;
    Py_buffer view;

    if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &at))
        return NULL;
    for (; at < PyList_Size(list); at++) {
        PyObject *item = PyList_GetItem(list, at);
        Write *write = (Write *)item;

        if (Py_TYPE(item) != write_type)
            break;
        if (write->state != WRITE_NEW) /* cancelled in the meantime */
            continue;
        if (!may_write(sender, (PyObject *)write->region) || !fits(sender, write->data, write->region, &view))
            break;
        put_write(sender, write, write->region, &view);
        PyBuffer_Release(&view);
        if (sender->queued == FRAMES && sender_flush(sender))
            return NULL;
    }
    if (sender_flush(sender))
        return NULL;
    return PyLong_FromSsize_t(at);
}

static PyObject *flush(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (sender_flush((Sender *)self))
        return NULL;
    Py_RETURN_NONE;
}

static void drop_frames(Sender *sender)
{
    for (unsigned int i = 0; i < sender->queued; i++)
        Py_CLEAR(sender->frame[i].write);
    sender->queued = 0;
}

/* The queue pair is gone: no completion comes any more. */
static PyObject *forget(PyObject *self, PyObject *unused)
{
    Sender *sender = (Sender *)self;

    (void)unused;
    sender->open = 0;
    if (!sender->table)
        Py_RETURN_NONE;
    leave_dirty(sender);
    drop_frames(sender);
    writes_forget(sender);
    for (int i = 0; i < GROUPS; i++)
        table_remove(sender->table, sender->groups[i]->wr_id, (PyObject *)sender->groups[i]);
    give_back(sender, sender->staged.count);
    Py_RETURN_NONE;
}

static PyObject *fail_writes(PyObject *self, PyObject *make_error)
{
    if (writes_fail((Sender *)self, make_error))
        return NULL;
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
    static char *names[] = {"table",        "qp",         "cq",       "max_inline", "credit_queue",
                            "slot_queue",   "staging",    "connection", "loop",     "governor",   "spins", NULL};
    Sender *sender = (Sender *)self;
    unsigned long long qp, cq;
    unsigned long max_inline;
    PyObject *table, *credit_queue, *slot_queue, *staging, *connection, *loop, *value;
    Governor *governor;
    int spins;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KKkOOOOOOp", names, table_type, &table, &qp, &cq, &max_inline,
                                     &credit_queue, &slot_queue, &staging, &connection, &loop, &value, &spins))
        return -1;
    if (governor_of(value, &governor))
        return -1;
    if (sender->table) {
        PyErr_SetString(PyExc_ValueError, "a sender is made once");
        return -1;
    }
    if (make_groups(sender))
        return -1;
    if (max_inline >= HEADER_SIZE)
        sender->stride = max_inline;
    sender->qp = (struct ibv_qp *)(uintptr_t)qp;
    sender->cq = (struct ibv_cq *)(uintptr_t)cq;
    sender->connection = Py_NewRef(connection);
    sender->loop = Py_NewRef(loop);
    sender->governor = (Governor *)Py_XNewRef((PyObject *)governor);
    sender->spins = (char)spins;
    sender->credit_queue = Py_NewRef(credit_queue);
    sender->slot_queue = Py_NewRef(slot_queue);
    sender->staging = Py_NewRef(staging);
    sender->table = (Table *)Py_NewRef(table);
    return 0;
}

static int sender_traverse(PyObject *self, visitproc visit, void *arg)
{
    Sender *sender = (Sender *)self;
    int rc = objects_visit(&sender->staged, visit, arg);

    if (rc)
        return rc;
    Py_VISIT((PyObject *)sender->table);
    Py_VISIT((PyObject *)sender->ledger);
    Py_VISIT(sender->credit_queue);
    Py_VISIT(sender->slot_queue);
    Py_VISIT(sender->staging);
    Py_VISIT(sender->connection);
    Py_VISIT(sender->loop);
    Py_VISIT((PyObject *)sender->governor);
    for (Write *write = sender->first; write; write = write->next)
        Py_VISIT((PyObject *)write);
    for (unsigned int i = 0; i < sender->queued; i++)
        Py_VISIT((PyObject *)sender->frame[i].write);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int sender_clear(PyObject *self)
{
    Sender *sender = (Sender *)self;

    sender->open = 0;
    drop_frames(sender);
    if (sender->table)
        writes_forget(sender);
    objects_clear(&sender->staged);
    Py_CLEAR(sender->ledger);
    Py_CLEAR(sender->connection);
    return 0;
}

static void sender_dealloc(PyObject *self)
{
    Sender *sender = (Sender *)self;

    PyObject_GC_UnTrack(self);
    if (sender->table)
        leave_dirty(sender);
    sender_clear(self);
    Py_CLEAR(sender->loop);
    Py_CLEAR(sender->governor);
    for (int i = 0; i < GROUPS; i++) {
        if (sender->groups[i])
            sender->groups[i]->sender = NULL;
        Py_CLEAR(sender->groups[i]);
    }
    Py_CLEAR(sender->credit_queue);
    Py_CLEAR(sender->slot_queue);
    Py_CLEAR(sender->staging);
    Py_CLEAR(sender->table);
    PyMem_Free(sender->frames);
    object_free(self);
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
    {"send_first", send_first, METH_O,
     "send_first(data): sends a message, if it is to be copied, nothing holds it up, and nothing has gone out in this\n"
     "turn of the loop; else False."},
    {"prepare_write", prepare_write, METH_VARARGS,
     "prepare_write(data, region): a small write for post_prepared(); None for what does not go this way."},
    {"post_prepared", post_prepared, METH_VARARGS,
     "post_prepared(list, first): posts prepared writes together, up to the first that has to wait, or the first\n"
     "other object; returns where that is."},
    {"fail_writes", fail_writes, METH_O, "fail_writes(make_error): ends the wait for those that are posted."},
    {"flush", flush, METH_NOARGS, "Posts the messages of this turn that were not posted yet."},
    {"forget", forget, METH_NOARGS, "The queue pair is gone: no completion comes any more. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyObject *get_sent_in_turn(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(sent_in_turn((Sender *)self));
}

static PyGetSetDef sender_getset[] = {
    {"ledger", get_ledger, set_ledger, "The credits; None until the handshake is over.", NULL},
    {"sent_in_turn", get_sent_in_turn, NULL, "Whether something has gone out in this turn of the loop.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef sender_members[] = {
    {"open", T_BOOL, offsetof(Sender, open), 0, "Messages may go this way."},
    {"eager", T_UINT, offsetof(Sender, eager), 0, "Bytes of a message, at most; 0 until the handshake is over."},
    {"queued", T_UINT, offsetof(Sender, queued), READONLY, "Messages that wait for flush()."},
    {"reserved", T_LONGLONG, offsetof(Sender, reserved), 0, "Credits promised to operations that wait for a slot."},
    {"may_wait", T_BOOL, offsetof(Sender, may_wait), 0, "Set before somebody enters one of the queues."},
    {"wanted_back", T_LONGLONG, offsetof(Sender, wanted_back), 0, "Data credits the peer would like to have back."},
    {"posted", T_LONGLONG, offsetof(Sender, posted), 0, "Work requests the device has that get a completion."},
    {"writes", T_UINT, offsetof(Sender, writes), READONLY, "Small writes under way."},
    {"loop", T_OBJECT, offsetof(Sender, loop), READONLY, "The event loop."},
    {"sent", T_LONGLONG, offsetof(Sender, sent), 0, "Work requests that were posted."},
    {"handed", T_LONGLONG, offsetof(Sender, handed), 0, "Messages that were handed to the device, since the start."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot sender_slots[] = {
    {Py_tp_init, sender_init},       {Py_tp_dealloc, sender_dealloc}, {Py_tp_traverse, sender_traverse},
    {Py_tp_clear, sender_clear},     {Py_tp_methods, sender_methods}, {Py_tp_members, sender_members},
    {Py_tp_getset, sender_getset},
    {Py_tp_doc, "Sender(table, qp, cq, max_inline, ...): messages that are copied, and small writes, on their way out."},
    {0, NULL},
};

PyType_Spec sender_spec = {
    .name = "aiordma._native._datapath.Sender",
    .basicsize = sizeof(Sender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = sender_slots,
};
