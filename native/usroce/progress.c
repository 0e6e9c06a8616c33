/* Who drives the device, and when: packets in, timers, packets out.
 *
 * One pass (`drive`) does everything that can be done without waiting. Two kinds of thread run it:
 *
 * - An application thread that polls a completion queue and finds nothing. So polled operation has no hop between
 *   threads. After a few polls in a row it has claimed the device, and the device thread stays out: it wakes once in a
 *   while (`grace`) to see whether the polling goes on.
 * - The device thread, when nobody polls: when the application armed a queue to sleep on its channel, or computes,
 *   or sleeps. It watches the links and serves the peer's one-sided requests then. With nothing to do it sleeps
 *   without a timeout.
 *
 * `grace` adapts: when a claim turns out to be abandoned with packets waiting (a program that polls memory instead
 * of its queue), the thread looks sooner the next time.
 *
 * Acknowledgements are owed rather than sent: all packets of a pass are acknowledged by one. In a
 * claimed device, a pass that found the application a completion leaves them until it has posted (an answer,
 * usually), and sends them behind that in the same system call; the next poll, an arm or the device thread sends
 * them otherwise, and the end of the program. */
#define _GNU_SOURCE /* ppoll */
#include "usroce.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "icrc.h"

enum {
    BURST = 128,           /* packets a queue pair may send in one pass, before the others had their turn */
    CLAIM_AFTER = 8,       /* polls in a row, without arming a queue in between */
    GRACE_MIN = 50 * 1000, /* ns */
    GRACE_MAX = 1000 * 1000,
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

static void kick(struct context *ctx)
{
    uint64_t one = 1;
    ssize_t rc = write(ctx->kick, &one, sizeof(one));

    (void)rc; /* the counter is full: the thread is woken anyway */
}

/* The device thread must not sleep beyond `deadline`. */
static void wake_by(struct context *ctx, uint64_t deadline)
{
    if (ctx->thread_state == THREAD_WATCHING && deadline < ctx->wake_at) {
        ctx->wake_at = deadline;
        kick(ctx);
    }
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
    wake_by(ctx, deadline);
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
    if (!qp || !admits(qp, slot, &packet, view)) {
        ctx->counters.unknown_qp++;
        return;
    }
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
    wake_by(ctx, 0); /* a device thread that sleeps did not ask to be woken for room */
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

static uint64_t links_deadline(const struct context *ctx)
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

/* What a passing application thread leaves: the device thread sees to it, should nobody else come. */
static void leave_rest(struct context *ctx)
{
    if (ctx->thread_state != THREAD_WATCHING)
        return; /* it looks by itself, soon */
    if (!list_empty(&ctx->tx_ready))
        wake_by(ctx, 0);
    else
        wake_by(ctx, links_deadline(ctx));
}

void progress_posted(struct context *ctx, struct qp *qp)
{
    req_transmit(ctx, qp, BURST);
    send_acks(ctx);
    tx_flush(ctx);
    leave_rest(ctx);
}

/* --- the pass --------------------------------------------------------------------------------------------------- */

/* One pass; returns how many frames came in. `polled`: a polling thread runs it. */
static int drive(struct context *ctx, bool polled)
{
    int received;

    if (polled && !list_empty(&ctx->acks)) {
        send_acks(ctx); /* the application did not post anything that they could have gone with */
        tx_flush(ctx);
    }
    ctx->delivered = false;
    received = receive_all(ctx);
    retry_starved(ctx);
    if (ctx->timers.count)
        run_timers(ctx, now_ns());
    transmit_all(ctx);
    if (!ctx->claimed || !ctx->delivered)
        send_acks(ctx);
    tx_flush(ctx);
    if (links_deadline(ctx) != NEVER)
        flush_due_links(ctx, now_ns());
    return received;
}

void progress_poll(struct context *ctx, bool claim)
{
    ctx->polls++;
    ctx->counters.polls++;
    drive(ctx, true);
    if (claim && !ctx->claimed && ++ctx->polls_in_a_row >= CLAIM_AFTER) {
        ctx->claimed = true;
        wake_by(ctx, 0); /* to stay out from now on, and look after what is left when the polling ends */
    }
    leave_rest(ctx);
}

void progress_hand_over(struct context *ctx)
{
    ctx->claimed = false;
    ctx->polls_in_a_row = 0;
    if (!list_empty(&ctx->acks)) {
        send_acks(ctx);
        tx_flush(ctx);
    }
    leave_rest(ctx);
    if (ctx->thread_state == THREAD_STAYING_OUT)
        kick(ctx);
}

void progress_links_changed(struct context *ctx)
{
    if (ctx->thread_state == THREAD_WATCHING)
        kick(ctx);
}

/* --- the device thread ---------------------------------------------------------------------------------------- */

static struct timespec *until(uint64_t deadline, struct timespec *ts)
{
    uint64_t now, left;

    if (deadline == NEVER)
        return NULL;
    now = now_ns();
    left = deadline > now ? deadline - now : 0;
    ts->tv_sec = (time_t)(left / 1000000000u);
    ts->tv_nsec = (long)(left % 1000000000u);
    return ts;
}

/* Sleeps until one of the descriptors is readable or the deadline has come. Gives the lock back meanwhile. */
static void sleep_on(struct context *ctx, struct pollfd *fds, nfds_t count, uint64_t deadline)
{
    struct timespec ts;
    uint64_t kicks;

    pthread_mutex_unlock(&ctx->lock);
    ppoll(fds, count, until(deadline, &ts), NULL);
    pthread_mutex_lock(&ctx->lock);
    ctx->thread_state = THREAD_BUSY;
    ctx->counters.thread_wakeups++;
    if (fds[0].revents && read(ctx->kick, &kicks, sizeof(kicks)) < 0)
        return; /* somebody else's wake-up was read already */
}

static void stay_out(struct context *ctx)
{
    struct pollfd fd = {.fd = ctx->kick, .events = POLLIN};
    uint64_t seen = ctx->polls;

    ctx->thread_state = THREAD_STAYING_OUT;
    sleep_on(ctx, &fd, 1, now_ns() + ctx->grace);
    if (ctx->polls != seen) {
        ctx->grace = ctx->grace * 2 < GRACE_MAX ? ctx->grace * 2 : GRACE_MAX;
    } else if (ctx->claimed) {
        ctx->claimed = false; /* abandoned */
        if (drive(ctx, false))
            ctx->grace = ctx->grace / 4 > GRACE_MIN ? ctx->grace / 4 : GRACE_MIN;
    }
}

/* Nobody will look at the links in use for a while. False: somebody should, now. */
static bool links_sleep(struct context *ctx)
{
    bool may = true;

    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *ground = link_ground(ctx->gids[i].link);

        if (ctx->gids[i].users && ground->ops->sleep && !ground->ops->sleep(ground))
            may = false;
    }
    return may;
}

static void links_wake(struct context *ctx)
{
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *ground = link_ground(ctx->gids[i].link);

        if (ground->ops->wake)
            ground->ops->wake(ground);
    }
}

static void watch(struct context *ctx)
{
    struct pollfd fds[1 + MAX_GIDS] = {{.fd = ctx->kick, .events = POLLIN}};
    nfds_t count = 1;
    uint64_t links = links_deadline(ctx);

    for (int i = 0; i < ctx->num_gids; i++)
        if (ctx->gids[i].users)
            fds[count++] = (struct pollfd){.fd = ctx->gids[i].link->fd, .events = POLLIN};
    ctx->wake_at = ctx->timers.count ? ctx->timers.heap[1]->heap_key : NEVER;
    if (links < ctx->wake_at)
        ctx->wake_at = links;
    if (links_sleep(ctx)) {
        ctx->thread_state = THREAD_WATCHING;
        sleep_on(ctx, fds, count, ctx->wake_at);
    }
    links_wake(ctx);
}

static void *device_thread(void *arg)
{
    struct context *ctx = arg;

    pthread_mutex_lock(&ctx->lock);
    while (!ctx->stopping) {
        if (ctx->claimed) {
            stay_out(ctx);
        } else if (!drive(ctx, false) && list_empty(&ctx->tx_ready)) {
            watch(ctx);
        } else {
            /* There may be more; but let those in who wait for the lock. */
            pthread_mutex_unlock(&ctx->lock);
            sched_yield();
            pthread_mutex_lock(&ctx->lock);
        }
    }
    pthread_mutex_unlock(&ctx->lock);
    return NULL;
}

int progress_start_thread(struct context *ctx)
{
    sigset_t all, before;
    int rc;

    if (ctx->thread_running)
        return 0;
    sigfillset(&all); /* signals are the application's business */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&ctx->thread, NULL, device_thread, ctx);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    ctx->thread_running = rc == 0;
    return rc;
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
    ctx->grace = GRACE_MAX;
    ctx->views = calloc(LINK_MAX_VIEWS, sizeof(*ctx->views));
    if (!ctx->views)
        return ENOMEM;
    ctx->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ctx->kick < 0) {
        int rc = errno;

        free(ctx->views);
        ctx->views = NULL;
        return rc;
    }
    pthread_mutex_lock(&process_lock);
    list_add_tail(&opened, &ctx->in_process);
    pthread_mutex_unlock(&process_lock);
    return 0;
}

void progress_stop(struct context *ctx)
{
    if (!ctx->thread_running)
        return;
    pthread_mutex_lock(&ctx->lock);
    ctx->stopping = true;
    kick(ctx);
    pthread_mutex_unlock(&ctx->lock);
    pthread_join(ctx->thread, NULL);
    ctx->thread_running = false;
}

void progress_free(struct context *ctx)
{
    pthread_mutex_lock(&process_lock);
    list_del(&ctx->in_process);
    pthread_mutex_unlock(&process_lock);
    close(ctx->kick);
    free(ctx->views);
    free(ctx->timers.heap);
}
