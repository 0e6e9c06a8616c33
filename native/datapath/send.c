/* Messages that are copied, and small one-sided operations, on their way out.
 *
 * A message that fits the inline data of the device and finds its credit is copied here and is the device's: it
 * needs no slot, no registered memory and no completion of its own. The first one of a turn of the loop leaves at
 * once, and one that finds nothing under way; the others share a doorbell, at the end of the turn or when somebody
 * polls. Of GROUP messages the last is signaled, and up to MESSAGES are in flight; an error completes any of them, and
 * ends the connection.
 *
 * A larger one, up to what the peer's buffers hold, is copied to a staging buffer (staging.py), which is lent until
 * the completion of its group; so that it is not kept for long, each doorbell with such a message ends a group.
 *
 * Everything else goes through SendQueue, which derives from Sender: it posts after flush(), never before, and
 * nothing here passes who waits in its queues. Called back there: pump(), send_control(), message_failed(status,
 * vendor_err), one_sided_failed(operation, status, vendor_err), message_refused(errno), idle(). */
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

/* StagingPool.take(): None when there is none. NULL and an exception. */
static PyObject *take_staging(Sender *sender)
{
    Py_ssize_t count = PyList_Size(sender->staging_free);
    PyObject *buffer;

    if (!count || PyDict_Size(sender->staging_line))
        return PyObject_CallMethodObjArgs(sender->staging, name_take, (PyObject *)sender, NULL);
    buffer = Py_NewRef(PyList_GetItem(sender->staging_free, count - 1));
    if (PyList_SetSlice(sender->staging_free, count - 1, count, NULL))
        Py_CLEAR(buffer);
    return buffer;
}

static int give_staging(Sender *sender, PyObject *buffer)
{
    PyObject *result;

    if (PyList_Size(sender->staging_free) < sender->staging_keep && !PyDict_Size(sender->staging_line))
        return PyList_Append(sender->staging_free, buffer);
    result = PyObject_CallMethodObjArgs(sender->staging, name_give, buffer, NULL);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

void sender_give(Sender *sender, PyObject *buffer)
{
    PyObject *type, *value, *traceback;

    PyErr_Fetch(&type, &value, &traceback);
    if (give_staging(sender, buffer))
        table_unraisable(sender->table);
    Py_DECREF(buffer);
    PyErr_Restore(type, value, traceback);
}

/* The first `count` that we hold. */
static void give_back(Sender *sender, Py_ssize_t count)
{
    PyObject *buffer;

    while (count-- && (buffer = objects_pop(&sender->staged)))
        sender_give(sender, buffer);
}

int group_completed(Group *group, const struct glue_wc *wc)
{
    Sender *sender = group->sender;
    int rc = 0, staged = group->staged;

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
    Group *group = sender->groups[sender->group];

    wr->send_flags |= IBV_SEND_SIGNALED;
    group->count = sender->filling.count;
    group->staged = sender->filling.staged;
    sender->filling.count = sender->filling.staged = 0;
    sender->closed++;
    sender->group = (sender->group + 1) % GROUPS;
}

/* The next message of a group. -1 and MemoryError. */
static int message_posting(Sender *sender, const struct frame *frame, struct ibv_send_wr *wr)
{
    if (!sender->filling.count) {
        Group *group = sender->groups[sender->group];

        if (table_add(sender->table, (PyObject *)group, &group->wr_id))
            return -1;
        sender->filling.wr_id = group->wr_id;
    }
    wr->wr_id = sender->filling.wr_id;
    wr->opcode = IBV_WR_SEND;
    sender->filling.staged += frame->staged;
    if (++sender->filling.count == GROUP)
        close_group(sender, wr);
    return 0;
}

static bool is_atomic(enum ibv_wr_opcode opcode)
{
    return opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
}

/* The work request of a frame. -1 and an exception. */
static int make_request(Sender *sender, struct frame *frame, struct ibv_send_wr *wr, struct ibv_sge *sge)
{
    memset(wr, 0, sizeof(*wr));
    if (frame->length) {
        sge->addr = frame->address;
        sge->length = frame->length;
        sge->lkey = frame->lkey;
        wr->sg_list = sge;
        wr->num_sge = 1;
        wr->send_flags = frame->staged ? 0 : IBV_SEND_INLINE;
    }
    if (!frame->op)
        return message_posting(sender, frame, wr);
    wr->opcode = frame->op->opcode;
    wr->imm_data = htonl(frame->op->notify);
    if (is_atomic(wr->opcode)) {
        wr->wr.atomic.remote_addr = frame->remote;
        wr->wr.atomic.rkey = frame->rkey;
        wr->wr.atomic.compare_add = frame->op->compare_add;
        wr->wr.atomic.swap = frame->op->swap;
    } else {
        wr->wr.rdma.remote_addr = frame->remote;
        wr->wr.rdma.rkey = frame->rkey;
    }
    if (one_sided_posting(frame->op, wr))
        return -1;
    Py_CLEAR(frame->op);
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

/* The device did not take requests, the last `listed` operations in the list among them, or there was no memory to make
 * them: nothing may be posted behind the gap, and their operations, like those still in a frame, end with the error. */
static int refused(Sender *sender, struct frame *frames, unsigned int count, int rc, unsigned int listed)
{
    PyObject *error;

    sender->open = 0;
    error = PyObject_CallMethod((PyObject *)sender, "message_refused", "i", rc);
    if (!error)
        return -1;
    for (unsigned int i = 0; i < count; i++) {
        if (!frames[i].op)
            continue;
        sender->one_sided--;
        one_sided_refused(frames[i].op, error);
        one_sided_give_back(frames[i].op);
        Py_CLEAR(frames[i].op);
    }
    one_sided_drop_last(sender, listed, error);
    Py_DECREF(error);
    return 0;
}

/* At most FRAMES, with one doorbell. Runs no code of others unless the device refuses. -1 and an exception of a
 * callback. */
static int post(Sender *sender, struct frame *frames, unsigned int count)
{
    struct ibv_send_wr wrs[FRAMES], *bad = NULL;
    struct ibv_sge sges[FRAMES];
    unsigned int missed = 0;
    struct ibv_send_wr *last_op = NULL, *last_message = NULL;
    bool staged = false;
    long long now = 0;
    int rc;

    for (unsigned int i = 0; i < count; i++) {
        OneSided *op = frames[i].op;

        if (op) {
            last_op = &wrs[i];
            if (sender->governor)
                op->started_ns = now = now ? now : now_ns();
        }
        if (make_request(sender, &frames[i], &wrs[i], &sges[i])) {
            PyErr_Clear();
            return refused(sender, frames, count, ENOMEM, missed);
        }
        missed += op != NULL;
        if (!op) {
            last_message = &wrs[i];
            staged |= frames[i].staged;
        }
        wrs[i].next = i + 1 < count ? &wrs[i + 1] : NULL;
    }
    if (last_op)
        last_op->send_flags |= IBV_SEND_SIGNALED;
    if (staged && !(last_message->send_flags & IBV_SEND_SIGNALED))
        close_group(sender, last_message);
    rc = ibv_post_send(sender->qp, wrs, &bad);
    if (!rc) {
        sender->sent += count;
        return 0;
    }
    for (missed = 0; bad; bad = bad->next)
        missed += bad->opcode != IBV_WR_SEND;
    return refused(sender, frames, count, rc, missed);
}

int sender_flush(Sender *sender)
{
    unsigned int count = sender->queued;

    leave_dirty(sender);
    sender->queued = 0;
    return count ? post(sender, sender->gathered->frame, count) : 0;
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

/* Whether the next frame goes out at once: the first of this turn of the loop does, and one that finds nothing under
 * way, for it would share its doorbell with none. Runs code of others. */
static bool begins_turn(Sender *sender)
{
    if (sender->queued || (sent_in_turn(sender) && (sender->in_flight || sender->one_sided)))
        return false;
    if (table_mark_turn(sender->table))
        PyErr_Clear(); /* the loop is closed */
    return true;
}

/* What has run since may have gathered a frame. */
static bool still_begins(const Sender *sender, bool at_once)
{
    return at_once && !sender->queued;
}

/* Bytes of inline data that are put together on the stack, which is in the cache, when they go out at once. */
#define AT_ONCE 1024

/* Whether there is a place to put a frame together, and its inline data. Most connections of a server are idle, and
 * many have one message a turn: they have no memory for frames until one gathers some. */
static bool has_place(Sender *sender, bool at_once)
{
    if (at_once && sender->stride <= AT_ONCE)
        return true;
    if (!sender->gathered)
        sender->gathered = PyMem_Calloc(1, sizeof(*sender->gathered) + FRAMES * sender->stride);
    return sender->gathered != NULL;
}

/* Of inline data, in that place; `here` has AT_ONCE bytes. */
static unsigned char *inline_room(Sender *sender, unsigned char *here, bool at_once)
{
    return at_once && sender->stride <= AT_ONCE ? here : sender->gathered->data + sender->queued * sender->stride;
}

static void gather(Sender *sender, const struct frame *frame)
{
    sender->gathered->frame[sender->queued++] = *frame;
}

/* What has been put together goes out, at once or with others. */
static int go_out(Sender *sender, struct frame *frame, bool at_once)
{
    if (at_once) {
        /* Where nobody would say that the turn is over, the next one is the first again. */
        sender->turn = sender->table->turn_marked ? sender->table->turn : 0;
        return post(sender, frame, 1);
    }
    gather(sender, frame);
    return sender->queued < FRAMES ? join_dirty(sender) : sender_flush(sender);
}

/* --- messages ---------------------------------------------------------------------------------------- */

/* What is gathered fills at most the rest of a group, and FRAMES / GROUP more. */
#define CLOSED (GROUPS - FRAMES / GROUP - 1)

/* For what takes a receive of the peer's, and goes behind all who wait for one. */
static bool has_credit(Sender *sender)
{
    const Ledger *ledger = sender->ledger;

    return ledger && ledger->data_limit - ledger->data_sent > sender->reserved && !has_waiters(sender);
}

static bool may_send(Sender *sender)
{
    return sender->open && sender->in_flight < MESSAGES && sender->closed <= CLOSED && has_credit(sender);
}

/* Where a staging buffer is. -1 and an exception. */
static int locate(PyObject *buffer, struct frame *frame)
{
    PyObject *address = PyObject_GetAttr(buffer, name_address), *lkey = PyObject_GetAttr(buffer, name_lkey);

    if (address && lkey) {
        frame->staged = true;
        frame->address = PyLong_AsUnsignedLongLong(address);
        frame->lkey = (uint32_t)PyLong_AsUnsignedLong(lkey);
    }
    Py_XDECREF(address);
    Py_XDECREF(lkey);
    return PyErr_Occurred() ? -1 : 0;
}

/* A staging buffer for a frame. 1: it is at frame->address; 0: there is none; -1 and an exception. May have collected
 * garbage, and so run anything. */
static int borrow(Sender *sender, struct frame *frame, PyObject **buffer)
{
    *buffer = take_staging(sender);
    if (!*buffer)
        return -1;
    if (*buffer == Py_None) {
        Py_CLEAR(*buffer);
        return 0;
    }
    if (!locate(*buffer, frame))
        return 1;
    sender_give(sender, *buffer);
    *buffer = NULL;
    return -1;
}

/* For the next message: it is the last of `staged` then. 0 also when the message may not go any more. */
static int take_buffer(Sender *sender, struct frame *frame)
{
    PyObject *buffer;
    int rc = borrow(sender, frame, &buffer);

    if (rc <= 0)
        return rc;
    rc = may_send(sender);
    if (rc > 0 && objects_append(&sender->staged, buffer))
        rc = -1;
    if (rc > 0)
        Py_DECREF(buffer);
    else
        sender_give(sender, buffer);
    return rc;
}

/* The frame has a staging buffer, or is empty. Runs no code of others before the message has left. */
static int send_message(Sender *sender, struct frame *frame, const Py_buffer *data, bool at_once)
{
    unsigned char here[AT_ONCE], *at;
    uint32_t credits[2], nbytes = (uint32_t)data->len, length = htonl(nbytes);

    if (ledger_send_data(sender->ledger))
        return -1;
    sender->in_flight++;
    sender->handed++;
    ledger_stamp(sender->ledger, &credits[0], &credits[1]);
    credits[0] = htonl(credits[0]);
    credits[1] = htonl(credits[1]);
    at = frame->staged ? (unsigned char *)(uintptr_t)frame->address : inline_room(sender, here, at_once);
    memset(at, 0, 4);
    at[0] = FRAME_MESSAGE;
    memcpy(at + 4, &length, 4);
    memcpy(at + 8, credits, 8);
    memcpy(at + HEADER_SIZE, data->buf, nbytes);
    frame->address = (uintptr_t)at;
    frame->length = HEADER_SIZE + nbytes;
    return go_out(sender, frame, at_once);
}

static bool is_usable(const Sender *sender)
{
    return sender->open && table_here(sender->table);
}

/* -1 and an exception: not bytes, or the like. */
static int view_bytes(PyObject *data, Py_buffer *view)
{
    if (!PyBytes_CheckExact(data))
        return PyObject_GetBuffer(data, view, PyBUF_SIMPLE);
    view->obj = NULL; /* the caller has a reference */
    view->buf = PyBytes_AsString(data);
    view->len = PyBytes_Size(data);
    return 0;
}

int sender_send(Sender *sender, PyObject *data)
{
    struct frame frame = {0};
    Py_buffer view;
    bool at_once;
    int goes;

    if (!is_usable(sender))
        return 0;
    if (view_bytes(data, &view)) {
        PyErr_Clear();
        return 0;
    }
    at_once = begins_turn(sender);
    goes = may_send(sender) && (size_t)view.len <= sender->eager && has_place(sender, at_once);
    if (goes && (size_t)view.len + HEADER_SIZE > sender->stride)
        goes = take_buffer(sender, &frame);
    at_once = still_begins(sender, at_once);
    if (goes > 0 && send_message(sender, &frame, &view, at_once))
        goes = -1;
    PyBuffer_Release(&view);
    return goes;
}

static PyObject *send_first(PyObject *self, PyObject *data)
{
    Sender *sender = (Sender *)self;
    int goes;

    sender_fetch(sender, sender->ledger, sender->qp);
    goes = sent_in_turn(sender) ? 0 : sender_send(sender, data);
    return goes < 0 ? NULL : PyBool_FromLong(goes);
}

/* --- one-sided operations ---------------------------------------------------------------------------- */

/* Nothing passes an operation that was issued before, but what waits for a credit is passed, and so is what a batch
 * has not posted yet. */
static bool may_post(Sender *sender, bool at_once)
{
    return sender->open && sender->one_sided < ONE_SIDED &&
           !(in_queues(sender) && PyObject_Size(sender->slot_queue) > 0) && has_place(sender, at_once);
}

/* Whether a write of this object goes this way; its buffer, which the caller releases. */
static bool fits(const Sender *sender, PyObject *data, const Region *region, Py_buffer *view)
{
    if (view_bytes(data, view)) {
        PyErr_Clear();
        return false;
    }
    if (((size_t)view->len <= sender->stride || (size_t)view->len <= sender->staging_size) &&
        region_allows(region, sender, (size_t)view->len, IBV_ACCESS_REMOTE_WRITE))
        return true;
    PyBuffer_Release(view);
    return false;
}

/* Between so many bytes at the frame's address and the region. 1; -1 and an exception. */
static int post_frame(Sender *sender, OneSided *op, const Region *region, struct frame *frame, uint32_t length,
                      bool at_once)
{
    frame->length = length;
    frame->remote = region->grant->address + region->offset;
    frame->rkey = region->grant->rkey;
    frame->op = (OneSided *)Py_NewRef((PyObject *)op);
    sender->one_sided++;
    return go_out(sender, frame, at_once) ? -1 : 1;
}

/* Puts a write together, inline or in a staging buffer, and on its way. 1: it is; 0: it has to wait, or was cancelled
 * just now; -1 and an exception. */
static int post_write(Sender *sender, OneSided *write, const Region *region, const Py_buffer *view, bool at_once)
{
    unsigned char here[AT_ONCE];
    struct frame frame = {0};
    bool notifies = write->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
    int goes = 1;

    if ((size_t)view->len > sender->stride)
        goes = borrow(sender, &frame, &write->landing);
    if (goes <= 0)
        return goes;
    at_once = still_begins(sender, at_once);
    goes = write->state == OP_NEW && may_post(sender, at_once) && (!notifies || has_credit(sender)) &&
           (!frame.staged || region_allows(region, sender, (size_t)view->len, IBV_ACCESS_REMOTE_WRITE));
    if (goes && notifies && ledger_send_data(sender->ledger))
        goes = -1;
    if (goes <= 0) {
        one_sided_give_back(write);
        return goes;
    }
    if (!frame.staged)
        frame.address = (uintptr_t)inline_room(sender, here, at_once);
    memcpy((void *)(uintptr_t)frame.address, view->buf, (size_t)view->len);
    return post_frame(sender, write, region, &frame, (uint32_t)view->len, at_once);
}

/* A write, with `notify` as it was given. NULL and no exception: others say what is wrong. */
static OneSided *new_write(Sender *sender, PyObject *notify)
{
    uint64_t value = 0;
    OneSided *write;

    if (notify == Py_None)
        return one_sided_new(sender, IBV_WR_RDMA_WRITE);
    if (!sender_word(notify, &value) || value > UINT32_MAX)
        return NULL;
    write = one_sided_new(sender, IBV_WR_RDMA_WRITE_WITH_IMM);
    if (write)
        write->notify = (uint32_t)value;
    return write;
}

OneSided *sender_write(Sender *sender, PyObject *data, PyObject *region, PyObject *notify)
{
    Py_buffer view;
    OneSided *write;
    bool at_once;

    if (!is_usable(sender) || !PyObject_TypeCheck(region, region_type) ||
        !fits(sender, data, (Region *)region, &view))
        return NULL;
    at_once = begins_turn(sender);
    write = may_post(sender, at_once) ? new_write(sender, notify) : NULL;
    if (write && post_write(sender, write, (Region *)region, &view, at_once) <= 0)
        Py_CLEAR(write);
    PyBuffer_Release(&view);
    return write;
}

/* -2**63 to 2**64 - 1, modulo 2**64. False: it is something else, and others say what is wrong. */
bool sender_word(PyObject *value, uint64_t *word)
{
    int overflow;
    long long small;

    if (!PyLong_CheckExact(value))
        return false;
    small = PyLong_AsLongLongAndOverflow(value, &overflow);
    *word = overflow > 0 ? PyLong_AsUnsignedLongLong(value) : (uint64_t)small;
    if (!PyErr_Occurred())
        return overflow >= 0;
    PyErr_Clear();
    return false;
}

/* Whether what is asked for goes this way. */
static bool answer_fits(const Sender *sender, const Region *region, enum ibv_wr_opcode opcode)
{
    uint64_t nbytes = region->length;

    if (is_atomic(opcode)) {
        if (!sender->atomics || nbytes != 8 || (region->grant->address + region->offset) % 8 ||
            !region_allows(region, sender, 8, IBV_ACCESS_REMOTE_ATOMIC))
            return false;
    } else if (!nbytes || !region_allows(region, sender, nbytes, IBV_ACCESS_REMOTE_READ)) {
        return false;
    }
    return nbytes <= sender->staging_size;
}

static bool may_ask(Sender *sender, const Region *region, enum ibv_wr_opcode opcode, bool at_once)
{
    return answer_fits(sender, region, opcode) && may_post(sender, at_once);
}

/* 1: it is on its way; 0: it does not go this way; -1 and an exception. */
static int post_ask(Sender *sender, OneSided *op, const Region *region, bool at_once)
{
    struct frame frame = {0};
    int goes = borrow(sender, &frame, &op->landing);

    if (goes <= 0)
        return goes;
    at_once = still_begins(sender, at_once);
    if (op->state != OP_NEW || !may_ask(sender, region, op->opcode, at_once)) { /* any more */
        one_sided_give_back(op);
        return 0;
    }
    op->address = frame.address;
    op->nbytes = (uint32_t)region->length;
    return post_frame(sender, op, region, &frame, op->nbytes, at_once);
}

/* Posts what was made, and else lets go of it. NULL: it has to wait, or there is an exception. */
static OneSided *asked(Sender *sender, OneSided *op, const Region *region)
{
    bool at_once = begins_turn(sender);

    if (!may_post(sender, at_once) || post_ask(sender, op, region, at_once) <= 0)
        Py_CLEAR(op);
    return op;
}

static OneSided *make_ask(Sender *sender, PyObject *region, enum ibv_wr_opcode opcode, uint64_t compare_add,
                          uint64_t swap)
{
    OneSided *op;

    if (!is_usable(sender) || !PyObject_TypeCheck(region, region_type) ||
        !answer_fits(sender, (Region *)region, opcode))
        return NULL;
    op = one_sided_new(sender, opcode);
    if (op) {
        op->compare_add = compare_add;
        op->swap = swap;
    }
    return op;
}

OneSided *sender_ask(Sender *sender, PyObject *region, enum ibv_wr_opcode opcode, uint64_t compare_add, uint64_t swap)
{
    OneSided *op = make_ask(sender, region, opcode, compare_add, swap);

    return op ? asked(sender, op, (Region *)region) : NULL;
}

/* A view of a buffer with room for so much. NULL: it is no such buffer. */
static PyObject *view_into(PyObject *buffer, uint64_t nbytes)
{
    PyObject *memory = PyMemoryView_FromObject(buffer);
    Py_buffer view;
    bool room = memory && !PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE);

    if (room) {
        room = (uint64_t)view.len >= nbytes;
        PyBuffer_Release(&view);
    }
    if (room)
        return memory;
    PyErr_Clear();
    Py_XDECREF(memory);
    return NULL;
}

/* Not posted. NULL: it does not go this way, or there is an exception. */
static OneSided *make_read_into(Sender *sender, PyObject *region, PyObject *buffer)
{
    OneSided *op = make_ask(sender, region, IBV_WR_RDMA_READ, 0, 0);

    if (op && !(op->data = view_into(buffer, ((Region *)region)->length)))
        Py_CLEAR(op);
    if (op)
        op->into = 1;
    return op;
}

OneSided *sender_read_into(Sender *sender, PyObject *region, PyObject *buffer)
{
    OneSided *op = make_read_into(sender, region, buffer);

    return op ? asked(sender, op, (Region *)region) : NULL;
}

/* --- operations of a batch --------------------------------------------------------------------------- */

/* To be posted there. None for what does not go this way; NULL and an exception. */
static PyObject *prepared(OneSided *op, PyObject *region)
{
    if (op)
        op->region = (Region *)Py_NewRef(region);
    else if (!PyErr_Occurred())
        Py_RETURN_NONE;
    return (PyObject *)op;
}

static PyObject *prepare_write(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Sender *sender = (Sender *)self;
    Py_buffer view;
    OneSided *write;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "prepare_write() takes data, region and notify");
    if (!is_usable(sender) || !PyObject_TypeCheck(args[1], region_type) ||
        !fits(sender, args[0], (Region *)args[1], &view))
        Py_RETURN_NONE;
    PyBuffer_Release(&view);
    write = new_write(sender, args[2]);
    if (write)
        write->data = Py_NewRef(args[0]);
    return prepared(write, args[1]);
}

static PyObject *prepare_ask(PyObject *self, PyObject *args)
{
    PyObject *region, *compare_add = NULL, *swap = NULL;
    uint64_t words[2] = {0, 0};
    int opcode;

    if (!PyArg_ParseTuple(args, "iO|OO", &opcode, &region, &compare_add, &swap))
        return NULL;
    if ((compare_add && !sender_word(compare_add, &words[0])) || (swap && !sender_word(swap, &words[1])))
        Py_RETURN_NONE;
    return prepared(make_ask((Sender *)self, region, opcode, words[0], words[1]), region);
}

static PyObject *prepare_read_into(PyObject *self, PyObject *args)
{
    PyObject *region, *buffer;

    if (!PyArg_ParseTuple(args, "OO", &region, &buffer))
        return NULL;
    return prepared(make_read_into((Sender *)self, region, buffer), region);
}

/* 1: gathered; 0: it has to wait, or was cancelled just now; -1 and an exception. */
static int post_one(Sender *sender, OneSided *op)
{
    Region *region = (Region *)Py_NewRef((PyObject *)op->region);
    PyObject *data = op->data ? Py_NewRef(op->data) : NULL;
    Py_buffer view;
    int goes = 0;

    if (op->opcode != IBV_WR_RDMA_WRITE && op->opcode != IBV_WR_RDMA_WRITE_WITH_IMM) {
        if (may_ask(sender, region, op->opcode, false))
            goes = post_ask(sender, op, region, false);
    } else if (fits(sender, data, region, &view)) {
        if (may_post(sender, false))
            goes = post_write(sender, op, region, &view, false);
        PyBuffer_Release(&view);
    }
    Py_XDECREF(data);
    Py_DECREF((PyObject *)region);
    return goes;
}

/* Posts from the first of a list on; how many, up to the first that needs SendQueue.submit(). */
static PyObject *post_prepared(PyObject *self, PyObject *args)
{
    Sender *sender = (Sender *)self;
    PyObject *list;
    Py_ssize_t at;

    if (!PyArg_ParseTuple(args, "O!n", &PyList_Type, &list, &at))
        return NULL;
    for (; at < PyList_Size(list) && is_usable(sender); at++) {
        PyObject *item = PyList_GetItem(list, at);
        int goes = 1;

        if (Py_TYPE(item) != one_sided_type)
            break;
        Py_INCREF(item);
        if (((OneSided *)item)->state == OP_NEW) /* else cancelled in the meantime */
            goes = post_one(sender, (OneSided *)item);
        Py_DECREF(item);
        if (goes < 0)
            return NULL;
        if (!goes)
            break;
    }
    if (sender_flush(sender))
        return NULL;
    return PyLong_FromSsize_t(at);
}

/* --- the type ---------------------------------------------------------------------------------------- */

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
        Py_CLEAR(sender->gathered->frame[i].op);
    sender->queued = 0;
}

static void give_back_frames(Sender *sender)
{
    for (unsigned int i = 0; i < sender->queued; i++)
        if (sender->gathered->frame[i].op)
            one_sided_give_back(sender->gathered->frame[i].op);
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
    give_back_frames(sender);
    drop_frames(sender);
    one_sided_give_back_all(sender);
    one_sided_forget_all(sender);
    for (int i = 0; i < GROUPS; i++)
        table_remove(sender->table, sender->groups[i]->wr_id, (PyObject *)sender->groups[i]);
    give_back(sender, sender->staged.count);
    Py_RETURN_NONE;
}

static PyObject *fail_one_sided(PyObject *self, PyObject *make_error)
{
    if (one_sided_fail_all((Sender *)self, make_error))
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

static Py_ssize_t number_of(PyObject *object, const char *name) /* -1 and an exception */
{
    PyObject *value = PyObject_GetAttrString(object, name);
    Py_ssize_t number = value ? PyLong_AsSsize_t(value) : -1;

    Py_XDECREF(value);
    return number;
}

static int set_staging(Sender *sender, PyObject *staging)
{
    Py_ssize_t size = number_of(staging, "size");

    if (size < 0)
        return -1;
    sender->staging = Py_NewRef(staging);
    sender->staging_size = (size_t)size;
    sender->staging_keep = number_of(staging, "keep");
    if (sender->staging_keep < 0)
        return -1;
    sender->staging_free = PyObject_GetAttrString(staging, "free");
    if (!sender->staging_free)
        return -1;
    sender->staging_line = PyObject_GetAttrString(staging, "line");
    if (!sender->staging_line)
        return -1;
    if (PyList_Check(sender->staging_free) && PyDict_Check(sender->staging_line))
        return 0;
    PyErr_SetString(PyExc_TypeError, "staging: free is a list, and line a dict");
    return -1;
}

static int sender_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table",        "qp",         "cq",       "max_inline", "credit_queue",
                            "slot_queue",   "staging",    "connection", "loop",     "governor",   "spins",
                            "atomics",      NULL};
    Sender *sender = (Sender *)self;
    unsigned long long qp, cq;
    unsigned long max_inline;
    PyObject *table, *credit_queue, *slot_queue, *staging, *connection, *loop, *value;
    Governor *governor;
    int spins, atomics;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!KKkOOOOOOpp", names, table_type, &table, &qp, &cq, &max_inline,
                                     &credit_queue, &slot_queue, &staging, &connection, &loop, &value, &spins, &atomics))
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
    sender->atomics = (char)atomics;
    sender->credit_queue = Py_NewRef(credit_queue);
    sender->slot_queue = Py_NewRef(slot_queue);
    if (set_staging(sender, staging))
        return -1;
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
    Py_VISIT(sender->staging_free);
    Py_VISIT(sender->staging_line);
    Py_VISIT(sender->connection);
    Py_VISIT(sender->loop);
    Py_VISIT((PyObject *)sender->governor);
    for (OneSided *op = sender->first; op; op = op->next)
        Py_VISIT((PyObject *)op);
    for (unsigned int i = 0; i < sender->queued; i++)
        Py_VISIT((PyObject *)sender->gathered->frame[i].op);
    Py_VISIT((PyObject *)Py_TYPE(self));
    return 0;
}

static int sender_clear(PyObject *self)
{
    Sender *sender = (Sender *)self;

    sender->open = 0;
    drop_frames(sender);
    if (sender->table)
        one_sided_forget_all(sender);
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
    Py_CLEAR(sender->staging_free);
    Py_CLEAR(sender->staging_line);
    Py_CLEAR(sender->table);
    PyMem_Free(sender->gathered);
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
    {"prepare_write", (PyCFunction)(void (*)(void))prepare_write, METH_FASTCALL,
     "prepare_write(data, region, notify): a small write for post_prepared(); None for what does not go this way."},
    {"prepare_ask", prepare_ask, METH_VARARGS,
     "prepare_ask(opcode, region, compare_add=0, swap=0): likewise a small read or an atomic operation."},
    {"prepare_read_into", prepare_read_into, METH_VARARGS,
     "prepare_read_into(region, buffer): likewise a small read into a buffer."},
    {"post_prepared", post_prepared, METH_VARARGS,
     "post_prepared(list, first): posts prepared operations together, up to the first that has to wait, or the first\n"
     "other object; returns where that is."},
    {"fail_one_sided", fail_one_sided, METH_O, "fail_one_sided(make_error): ends the wait for those that are posted."},
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
    {"one_sided", T_UINT, offsetof(Sender, one_sided), READONLY, "Small one-sided operations under way."},
    {"loop", T_OBJECT, offsetof(Sender, loop), READONLY, "The event loop."},
    {"sent", T_LONGLONG, offsetof(Sender, sent), 0, "Work requests that were posted."},
    {"handed", T_LONGLONG, offsetof(Sender, handed), 0, "Messages that were handed to the device, since the start."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot sender_slots[] = {
    {Py_tp_init, sender_init},       {Py_tp_dealloc, sender_dealloc}, {Py_tp_traverse, sender_traverse},
    {Py_tp_clear, sender_clear},     {Py_tp_methods, sender_methods}, {Py_tp_members, sender_members},
    {Py_tp_getset, sender_getset},
    {Py_tp_doc, "Sender(table, qp, cq, max_inline, ...): messages that are copied, and small one-sided operations, on their\n"
     "way out."},
    {0, NULL},
};

PyType_Spec sender_spec = {
    .name = "aiordma._native._datapath.Sender",
    .basicsize = sizeof(Sender),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = sender_slots,
};
