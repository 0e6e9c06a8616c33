/* Driving the device: packets in, timers, packets out.
 *
 * One pass (progress_drive) does everything that can be done without waiting. An application thread runs it that polls
 * a completion queue and finds nothing, so polled operation has no hop between threads; and whoever wakes for packets,
 * see sleep.c.
 *
 * Acknowledgements are owed rather than sent: all packets of a pass are acknowledged by one. In a
 * claimed device, a pass that found the application a completion leaves them until it has posted (an answer,
 * usually), and sends them behind that in the same system call; the next poll, an arm or the device thread sends
 * them otherwise, and the end of the program. */
#include "usroce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "icrc.h"

enum {
    BURST = 128, /* packets a queue pair may send in one pass, before the others had their turn */
};

/* --- timers: a heap of queue pairs, by the earliest time at which they want to be looked at ----------------- */

static void heap_place(struct timers *timers, struct qp *qp, uint32_t index)
{
    timers->heap[index] = qp;
    qp->heap_index = index;
}

static void heap_up(struct timers *timers, uint32_t index)
{
    struct qp *qp = timers->heap[index];

    while (index > 1 && timers->heap[index / 2]->heap_key > qp->heap_key) {
        heap_place(timers, timers->heap[index / 2], index);
        index /= 2;
    }
    heap_place(timers, qp, index);
}

static void heap_down(struct timers *timers, uint32_t index)
{
    struct qp *qp = timers->heap[index];

    for (;;) {
        uint32_t child = 2 * index;

        if (child > timers->count)
            break;
        if (child < timers->count && timers->heap[child + 1]->heap_key < timers->heap[child]->heap_key)
            child++;
        if (timers->heap[child]->heap_key >= qp->heap_key)
            break;
        heap_place(timers, timers->heap[child], index);
        index = child;
    }
    heap_place(timers, qp, index);
}

static void heap_remove(struct timers *timers, struct qp *qp)
{
    uint32_t index = qp->heap_index;
    struct qp *last = timers->heap[timers->count--];

    qp->heap_index = 0;
    if (last == qp)
        return;
    heap_place(timers, last, index);
    heap_up(timers, index);
    heap_down(timers, last->heap_index);
}

/* There is always room: qp.c reserves it when the queue pair is made. */
static void heap_add(struct timers *timers, struct qp *qp)
{
    timers->count++;
    heap_place(timers, qp, timers->count);
    heap_up(timers, timers->count);
}

int timers_reserve(struct timers *timers, uint32_t count)
{
    uint32_t capacity = timers->capacity ? timers->capacity : 16;
    struct qp **heap;

    while (capacity < count)
        capacity *= 2;
    if (capacity == timers->capacity)
        return 0;
    heap = realloc(timers->heap, (capacity + 1) * sizeof(struct qp *));
    if (!heap)
        return ENOMEM;
    timers->heap = heap;
    timers->capacity = capacity;
    return 0;
}

void timer_set(struct context *ctx, struct qp *qp, uint64_t deadline)
{
    qp->deadline = deadline;
    if (deadline == NEVER)
        return; /* it leaves the heap when its time comes */
    if (!qp->heap_index) {
        qp->heap_key = deadline;
        heap_add(&ctx->timers, qp);
    } else if (deadline < qp->heap_key) {
        qp->heap_key = deadline;
        heap_up(&ctx->timers, qp->heap_index);
    }
    thread_wake_by(ctx, deadline);
}

void timer_forget(struct context *ctx, struct qp *qp)
{
    qp->deadline = NEVER;
    if (qp->heap_index)
        heap_remove(&ctx->timers, qp);
}

static void run_timers(struct context *ctx, uint64_t now)
{
    struct timers *timers = &ctx->timers;

    while (timers->count && timers->heap[1]->heap_key <= now) {
        struct qp *qp = timers->heap[1];
        bool due = qp->deadline <= now;

        if (due || qp->deadline == NEVER) {
            heap_remove(timers, qp);
            qp->deadline = NEVER;
        } else {
            qp->heap_key = qp->deadline;
            heap_down(timers, 1);
        }
        if (due)
            req_timer(ctx, qp, now);
    }
}

/* --- packets in -------------------------------------------------------------------------------------------- */

static bool service_matches(const struct qp *qp, uint8_t opcode)
{
    switch (qp->base.qp_type) {
    case IBV_QPT_RC:
        return WIRE_SERVICE(opcode) == WIRE_RC;
    case IBV_QPT_UC:
        return WIRE_SERVICE(opcode) == WIRE_UC;
    case IBV_QPT_UD:
        return WIRE_SERVICE(opcode) == WIRE_UD;
    default:
        return false;
    }
}

/* Whether the queue pair takes packets of this kind from there: its state, its service, the peer's address. */
static bool admits(const struct qp *qp, const struct gid_slot *slot, const struct packet *packet,
                   const struct view *view)
{
    enum ibv_qp_state state = qp->base.state;

    if (!service_matches(qp, packet->opcode))
        return false;
    if (state != IBV_QPS_RTR && state != IBV_QPS_RTS && state != IBV_QPS_SQD && state != IBV_QPS_SQE)
        return false;
    if (packet->traits & WIRE_RESPONSE && state == IBV_QPS_RTR)
        return false;
    if (qp->base.qp_type == IBV_QPT_UD)
        return packet->qkey == qp->attr.qkey;
    /* A peer that published its UDP port sends from it; so nobody else on its host can speak for it. */
    if (!qp->any_ip_id && qp->remote.port != view->from.port)
        return false;
    return qp->slot == slot && memcmp(&qp->remote.gid, &view->from.gid, sizeof(view->from.gid)) == 0;
}

void progress_receive(struct context *ctx, struct gid_slot *slot, const struct view *view)
{
    struct packet packet;
    struct qp *qp;

    if (!wire_parse(view->data, view->size, &packet)) {
        ctx->counters.malformed++;
        return;
    }
    qp = idmap_find(&ctx->qps, packet.dest_qp);
    if (qp)
        qp_prefetch(qp);
    if (!qp || !admits(qp, slot, &packet, view)) {
        ctx->counters.unknown_qp++;
        return;
    }
    if (!(packet.traits & WIRE_RESPONSE))
        sq_prefetch(&qp->sq);
    if (!view->unsealed && !icrc_check(view, &slot->link->local, qp->any_ip_id)) {
        ctx->counters.bad_icrc++;
        return;
    }
    if (!qp->comm_established && qp->base.state == IBV_QPS_RTR) {
        qp->comm_established = true;
        async_post(ctx, IBV_EVENT_COMM_EST, EVENT_QP, qp);
    }
    if (packet.traits & WIRE_RESPONSE)
        req_receive(ctx, qp, &packet);
    else
        resp_receive(ctx, qp, &packet, slot, view);
}

static int receive_all(struct context *ctx)
{
    int total = 0;

    for (int i = 0; i < ctx->num_gids; i++) {
        struct gid_slot *slot = &ctx->gids[i];
        int count;

        if (!slot->users)
            continue;
        count = slot->link->ops->receive(slot->link, ctx->views, LINK_MAX_VIEWS);
        for (int k = 0; k < count; k++)
            progress_receive(ctx, slot, &ctx->views[k]);
        total += count;
    }
    return total;
}

/* --- packets out ---------------------------------------------------------------------------------------------- */

void progress_tx_ready(struct context *ctx, struct qp *qp)
{
    if (list_empty(&qp->in_tx))
        list_add_tail(&ctx->tx_ready, &qp->in_tx);
}

void progress_owe_ack(struct context *ctx, struct qp *qp)
{
    if (list_empty(&qp->in_acks))
        list_add_tail(&ctx->acks, &qp->in_acks);
}

void progress_starved(struct context *ctx, struct qp *qp)
{
    list_del(&qp->in_tx);
    list_add_tail(&ctx->starved, &qp->in_tx);
    thread_wake_for_room(ctx); /* who sleeps did not ask to be woken for that */
}

/* Those that wait for room and have it now get their turn. */
static void retry_starved(struct context *ctx)
{
    struct list waiting, *entry;

    if (list_empty(&ctx->starved))
        return;
    list_take(&waiting, &ctx->starved);
    while ((entry = list_pop(&waiting))) {
        struct qp *qp = list_entry(entry, struct qp, in_tx);

        if (req_has_room(qp))
            progress_tx_ready(ctx, qp);
        else
            list_add_tail(&ctx->starved, entry);
    }
}

static void send_acks(struct context *ctx)
{
    struct list *entry;

    while ((entry = list_pop(&ctx->acks)))
        resp_send_ack(ctx, list_entry(entry, struct qp, in_acks));
}

static void transmit(struct context *ctx, struct qp *qp)
{
    if (resp_transmit(ctx, qp, BURST))
        progress_tx_ready(ctx, qp);
    req_transmit(ctx, qp, BURST);
}

/* Each queue pair that has something to send gets one turn. */
static void transmit_all(struct context *ctx)
{
    struct list turn, *entry;

    if (list_empty(&ctx->tx_ready))
        return;
    list_take(&turn, &ctx->tx_ready); /* those that come back for more join the new list */
    while ((entry = list_pop(&turn)))
        transmit(ctx, list_entry(entry, struct qp, in_tx));
}

uint64_t progress_deadline_links(const struct context *ctx)
{
    uint64_t earliest = NEVER;

    for (int i = 0; i < ctx->num_gids; i++) {
        uint64_t deadline = ctx->gids[i].link->ops->deadline(ctx->gids[i].link);

        if (deadline < earliest)
            earliest = deadline;
    }
    return earliest;
}

static void flush_due_links(struct context *ctx, uint64_t now)
{
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *link = ctx->gids[i].link;

        if (link->ops->deadline(link) <= now)
            link->ops->flush(link);
    }
}

void progress_leave_rest(struct context *ctx)
{
    if (!list_empty(&ctx->tx_ready))
        thread_wake_by(ctx, 0);
    else
        thread_wake_by(ctx, progress_deadline_links(ctx));
}

void progress_posted(struct context *ctx, struct qp *qp)
{
    req_transmit(ctx, qp, BURST);
    send_acks(ctx);
    tx_flush(ctx);
    progress_leave_rest(ctx);
    rq_prefetch(&qp->rq); /* the peer may answer */
}

/* --- the pass --------------------------------------------------------------------------------------------------- */

/* One pass; returns how many frames came in. `polled`: a polling thread runs it. */
int progress_drive(struct context *ctx, bool polled)
{
    int received;

    if (polled)
        progress_flush_acks(ctx); /* the application did not post anything that they could have gone with */
    ctx->delivered = false;
    received = receive_all(ctx);
    retry_starved(ctx);
    if (ctx->timers.count)
        run_timers(ctx, now_ns());
    transmit_all(ctx);
    if (!ctx->claimed || !ctx->delivered)
        send_acks(ctx);
    tx_flush(ctx);
    if (progress_deadline_links(ctx) != NEVER)
        flush_due_links(ctx, now_ns());
    return received;
}

void progress_poll(struct context *ctx, bool claim)
{
    count_poll(ctx);
    ctx->counters.polls++;
    if (claim)
        thread_polled(ctx);
    progress_drive(ctx, true);
    progress_leave_rest(ctx);
}

void progress_flush_acks(struct context *ctx)
{
    if (list_empty(&ctx->acks))
        return;
    send_acks(ctx);
    tx_flush(ctx);
}

uint64_t progress_deadline(const struct context *ctx)
{
    uint64_t links = progress_deadline_links(ctx);
    uint64_t timer = ctx->timers.count ? ctx->timers.heap[1]->heap_key : NEVER;

    return links < timer ? links : timer;
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static struct list opened = {&opened, &opened};

/* The last completion was taken, and the program returns from main() without another word. */
__attribute__((destructor)) static void send_last_acks(void)
{
    struct list *entry;

    if (pthread_mutex_trylock(&process_lock))
        return;
    for (entry = opened.next; entry != &opened; entry = entry->next) {
        struct context *ctx = list_entry(entry, struct context, in_process);

        if (context_is_foreign(ctx) || pthread_mutex_trylock(&ctx->lock))
            continue;
        send_acks(ctx);
        tx_flush(ctx);
        pthread_mutex_unlock(&ctx->lock);
    }
    pthread_mutex_unlock(&process_lock);
}

int progress_init(struct context *ctx)
{
    list_init(&ctx->in_process);
    list_init(&ctx->tx_ready);
    list_init(&ctx->starved);
    list_init(&ctx->acks);
    ctx->views = calloc(LINK_MAX_VIEWS, sizeof(*ctx->views));
    if (!ctx->views)
        return ENOMEM;
    pthread_mutex_lock(&process_lock);
    list_add_tail(&opened, &ctx->in_process);
    pthread_mutex_unlock(&process_lock);
    return 0;
}

void progress_free(struct context *ctx)
{
    pthread_mutex_lock(&process_lock);
    list_del(&ctx->in_process);
    pthread_mutex_unlock(&process_lock);
    free(ctx->views);
    free(ctx->timers.heap);
}
