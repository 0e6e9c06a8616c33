/* Who sleeps until packets come, and wakes to drive the device. Waking a thread is the dearest step of all, so the
 * one that waits for a completion should be the one that wakes for its packet, with no other in between:
 *
 * - A thread in a blocking ibv_get_cq_event() sleeps on the links as well as on its channel (one of them at a time:
 *   it leads), and drives the device when they are readable. The device thread stays out.
 * - An event loop that watches the descriptor of usroce_watch_channel() wakes for packets too and finds them in
 *   ibv_get_cq_event(). Whether it sleeps or computes cannot be seen. So the device thread wakes as well, but leaves
 *   the packets alone for a moment (DEFER); and once the loop has come in time again and again it stays out. A loop
 *   that wakes for packets of which it gets no event (those of one-sided operations) is left alone soon, until there
 *   is one.
 * - A thread that polls never sleeps. After a few polls in a row it has claimed the device.
 * - The device thread sees to all the rest: one-sided requests while the application computes, timers, channels that
 *   the application watches by poll(), which are readable for events only.
 *
 * Staying out. A device that is claimed is the application's; the device thread wakes once in a while (`grace`) to see
 * whether it is still looked after. If not, it does so this once: messages wait for the application anyway, so one
 * with long turns between its polls is disturbed no more than their senders need. The claim is abandoned, and the
 * thread watches the links again, if that is not enough: peers ask for what the application has no part in, or much is
 * on its way; or if nobody seems to come back. `grace` adapts: when a claim was abandoned and somebody had to wait for
 * it (the application polls memory instead of its queue), the thread looks sooner the next time; it looks later while
 * nobody could have waited. While somebody leads and nothing happens it rests, until a timer or the end of the leading.
 * With nothing to do no thread has a timeout. */
#define _GNU_SOURCE /* ppoll */
#include "usroce.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum {
    CLAIM_AFTER = 8,       /* polls in a row, without arming a queue in between; packets that a loop woke for */
    GRACE_MIN = 50 * 1000, /* ns */
    GRACE_MAX = 1000 * 1000, /* no longer than until the first retransmission */
    GRACE_CALM = 2000 * 1000, /* while nothing comes but messages through shared memory, where none is lost */
    DEFER = 100 * 1000,
    IN_TIME = 8000 * 1000, /* an event loop comes again so soon, if its turns are not too long */
    SLEEP_TRIES = 4,       /* passes until a thread that cannot sleep for all that comes leaves it to another one */
    STRAYS = 3,            /* wake-ups in a row without an event, until a loop is woken for events only */
    VISITS = 4,            /* graces in a row without a poll, until nobody is thought to come back */
    TRANSFER = 64 << 10,   /* bytes of a visit, in and out; what moves more should not wait for the next one */
};

/* --- waking ---------------------------------------------------------------------------------------------------- */

static void kick(int fd)
{
    uint64_t one = 1;
    ssize_t rc = write(fd, &one, sizeof(one));

    (void)rc; /* the counter is full: who sleeps there is woken anyway */
}

static void take_kicks(int fd)
{
    uint64_t count;
    ssize_t rc = read(fd, &count, sizeof(count));

    (void)rc; /* somebody else's wake-up was read already */
}

void thread_wake_by(struct context *ctx, uint64_t deadline)
{
    bool sleeps = ctx->thread_state == THREAD_WATCHING || ctx->thread_state == THREAD_RESTING ||
                  (ctx->thread_state == THREAD_STAYING_OUT && ctx->sleeper);

    if (sleeps && deadline < ctx->wake_at) {
        ctx->wake_at = deadline;
        kick(ctx->kick);
    }
}

void thread_wake_for_room(struct context *ctx)
{
    thread_wake_by(ctx, 0);
    if (ctx->leading)
        kick(ctx->lead_kick);
}

/* --- links that sleep ------------------------------------------------------------------------------------------ */

/* Nobody will look at the links in use until they are readable. False: somebody should, now. */
static bool links_sleep(struct context *ctx)
{
    bool may = true;

    ctx->links_asleep = true;
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *ground = link_ground(ctx->gids[i].link);

        if (ctx->gids[i].users && ground->ops->sleep && !ground->ops->sleep(ground))
            may = false;
    }
    return may;
}

static void links_wake(struct context *ctx)
{
    ctx->links_asleep = false;
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link *ground = link_ground(ctx->gids[i].link);

        if (ground->ops->wake)
            ground->ops->wake(ground);
    }
}

/* Drives until the links can sleep, as they do afterwards. False: too much comes for that. *received: frames. */
static bool drive_and_sleep(struct context *ctx, int *received)
{
    *received = 0;
    for (int i = 0; i < SLEEP_TRIES; i++) {
        links_wake(ctx);
        *received += progress_drive(ctx, true);
        if (links_sleep(ctx))
            return true;
    }
    return false;
}

/* Puts those in use behind fds[0]; returns how many there are then. */
static nfds_t add_links(const struct context *ctx, struct pollfd *fds, nfds_t count)
{
    for (int i = 0; i < ctx->num_gids; i++)
        if (ctx->gids[i].users)
            fds[count++] = (struct pollfd){.fd = ctx->gids[i].link->fd, .events = POLLIN};
    return count;
}

/* --- claims ------------------------------------------------------------------------------------------------------- */

static void claim(struct context *ctx)
{
    if (ctx->claimed)
        return;
    ctx->claimed = true;
    thread_wake_by(ctx, 0); /* to stay out from now on, and look after what is left when this ends */
}

void thread_polled(struct context *ctx)
{
    ctx->sleeper = false;
    if (!ctx->claimed && ++ctx->polls_in_a_row >= CLAIM_AFTER)
        claim(ctx);
    if (ctx->claimed && ctx->links_asleep && ctx->thread_state != THREAD_WATCHING)
        links_wake(ctx); /* who polls rings does not need the system calls that wake */
}

/* Who has claimed the device sleeps for packets from now on. The device thread may take it for one that polls, but
 * looks soon. */
static void sleeps(struct context *ctx)
{
    ctx->sleeper = true;
    if (ctx->thread_state == THREAD_STAYING_OUT && ctx->wake_at == NEVER)
        ctx->wake_at = now_ns() + GRACE_MAX;
}

static void hand_over(struct context *ctx)
{
    ctx->claimed = ctx->sleeper = false;
    ctx->polls_in_a_row = 0;
    progress_flush_acks(ctx);
    progress_leave_rest(ctx);
    if (ctx->thread_state == THREAD_STAYING_OUT)
        kick(ctx->kick);
}

/* An event loop is about to sleep on the links. False: there is too much left to do. */
static bool fall_asleep(struct context *ctx)
{
    int received;

    progress_flush_acks(ctx);
    return list_empty(&ctx->tx_ready) && (links_sleep(ctx) || drive_and_sleep(ctx, &received)) &&
           list_empty(&ctx->tx_ready);
}

void sleep_armed(struct context *ctx, const struct channel *channel)
{
    bool watched = channel && channel->watch_fd >= 0 && !channel->deaf;

    ctx->attended = watched;
    if (ctx->claimed && watched) {
        sleeps(ctx);
        if (fall_asleep(ctx))
            return;
    } else if (ctx->claimed && channel && channel->led == ctx->abandoned + 1) {
        sleeps(ctx); /* comes to sleep_blocking(), and what is owed goes with what it posts till then */
        return;
    }
    hand_over(ctx);
}

/* --- a thread in ibv_get_cq_event() --------------------------------------------------------------------------- */

/* poll(), the one place of ibv_get_cq_event() where the thread may be cancelled, if it may at all (`state`). */
static int poll_cancellable(struct pollfd *fds, nfds_t count, int state)
{
    int rc, error;

    pthread_setcancelstate(state, NULL);
    rc = poll(fds, count, -1);
    error = errno;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    errno = error;
    return rc;
}

static void stop_leading(void *arg)
{
    struct context *ctx = arg;

    pthread_mutex_lock(&ctx->lock);
    ctx->leading = false;
    if (ctx->thread_state == THREAD_RESTING)
        kick(ctx->kick); /* nothing says when this thread will come again */
}

/* Nobody leads any more. */
static void cancelled(void *arg)
{
    struct context *ctx = arg;

    stop_leading(ctx);
    pthread_mutex_unlock(&ctx->lock);
}

static int poll_leading(struct context *ctx, struct pollfd *fds, nfds_t count, int state)
{
    int rc, error;

    ctx->leading = true;
    pthread_mutex_unlock(&ctx->lock);
    pthread_cleanup_push(cancelled, ctx);
    rc = poll_cancellable(fds, count, state);
    error = errno;
    pthread_cleanup_pop(0);
    stop_leading(ctx);
    errno = error;
    return rc;
}

/* Somebody else leads: they raise the event. */
static int poll_following(struct context *ctx, int fd, int state)
{
    struct pollfd pfd = {.fd = fd, .events = POLLIN};
    int rc, error;

    pthread_mutex_unlock(&ctx->lock);
    rc = poll_cancellable(&pfd, 1, state);
    error = errno;
    pthread_mutex_lock(&ctx->lock);
    errno = error;
    return rc;
}

static int lead(struct context *ctx, struct channel *channel, int state)
{
    struct pollfd fds[2 + MAX_GIDS] = {{.fd = channel->base.fd, .events = POLLIN},
                                       {.fd = ctx->lead_kick, .events = POLLIN}};
    nfds_t count = add_links(ctx, fds, 2);
    int received, rc = 0;

    claim(ctx);
    sleeps(ctx);
    count_poll(ctx);
    channel->led = ctx->abandoned + 1;
    progress_flush_acks(ctx);
    if (list_empty(&ctx->tx_ready) && progress_deadline_links(ctx) == NEVER && links_sleep(ctx)) {
        rc = poll_leading(ctx, fds, count, state);
        if (rc < 0 || fds[0].revents)
            return rc;
        if (fds[1].revents)
            take_kicks(ctx->lead_kick);
    }
    count_poll(ctx);
    channel->taking = true;
    drive_and_sleep(ctx, &received);
    channel->taking = false;
    return 0;
}

bool sleep_blocking(struct context *ctx, struct channel *channel, int cancel_state)
{
    if (!ctx->thread_running || ctx->leading)
        return poll_following(ctx, channel->base.fd, cancel_state) > 0;
    while (list_empty(&channel->ready)) {
        int rc = lead(ctx, channel, cancel_state);

        if (rc)
            return rc > 0;
    }
    return true;
}

/* --- an event loop --------------------------------------------------------------------------------------------- */

/* The set holds the links in use, unless the loop is left alone. What cannot be added, the device thread serves. */
static void update_watch(struct context *ctx, struct channel *channel)
{
    for (int i = 0; i < ctx->num_gids; i++) {
        struct epoll_event event = {.events = EPOLLIN};
        uint32_t bit = 1u << i;
        bool wanted = ctx->gids[i].users && !channel->deaf;

        if (wanted && !(channel->watched & bit)) {
            if (!epoll_ctl(channel->watch_fd, EPOLL_CTL_ADD, ctx->gids[i].link->fd, &event))
                channel->watched |= bit;
        } else if (!wanted && channel->watched & bit) {
            epoll_ctl(channel->watch_fd, EPOLL_CTL_DEL, ctx->gids[i].link->fd, NULL);
            channel->watched &= ~bit;
        }
    }
}

int sleep_watch(struct context *ctx, struct channel *channel)
{
    struct epoll_event event = {.events = EPOLLIN};
    int fd = epoll_create1(EPOLL_CLOEXEC);

    if (fd < 0)
        return errno;
    if (epoll_ctl(fd, EPOLL_CTL_ADD, channel->base.fd, &event)) {
        int rc = errno;

        close(fd);
        return rc;
    }
    channel->watch_fd = fd;
    channel->deaf = true; /* until there is an event */
    list_add_tail(&ctx->watched, &channel->in_watched);
    update_watch(ctx, channel);
    return 0;
}

/* A forked child may have the set too, so it is emptied and not only closed. */
void sleep_unwatch(struct context *ctx, struct channel *channel)
{
    if (channel->watch_fd < 0)
        return;
    channel->deaf = true;
    update_watch(ctx, channel);
    list_del(&channel->in_watched);
    close(channel->watch_fd);
    channel->watch_fd = -1;
}

void sleep_unwatch_all(struct context *ctx)
{
    struct list *entry;

    for (entry = ctx->watched.next; entry != &ctx->watched; entry = entry->next) {
        struct channel *channel = list_entry(entry, struct channel, in_watched);

        channel->deaf = true;
        update_watch(ctx, channel);
    }
}

static void set_deaf(struct context *ctx, struct channel *channel, bool deaf)
{
    channel->deaf = deaf;
    channel->strays = 0;
    update_watch(ctx, channel);
}

void sleep_notified(struct context *ctx, struct channel *channel)
{
    channel->strays = 0;
    if (channel->deaf && channel->watch_fd >= 0)
        set_deaf(ctx, channel, false);
}

/* The loop woke for packets and came in time. */
static void came_in_time(struct context *ctx)
{
    uint64_t now = now_ns();

    ctx->in_time = now - ctx->came_at < IN_TIME ? ctx->in_time + 1 : 0;
    ctx->came_at = now;
    if (ctx->in_time < CLAIM_AFTER)
        return;
    claim(ctx);
    sleeps(ctx);
}

bool sleep_attend(struct context *ctx, struct channel *channel)
{
    int received;

    if (channel->watch_fd < 0 || channel->deaf)
        return false;
    if (channel->taken) { /* if there is more, the descriptor says so */
        channel->taken = false;
        return false;
    }
    count_poll(ctx);
    channel->taking = true;
    if (!drive_and_sleep(ctx, &received) || !list_empty(&ctx->tx_ready))
        thread_wake_by(ctx, 0);
    channel->taking = false;
    if (!received)
        return !list_empty(&channel->ready);
    came_in_time(ctx);
    if (!list_empty(&channel->ready))
        return true;
    if (++channel->strays >= STRAYS) {
        set_deaf(ctx, channel, true);
        hand_over(ctx);
    }
    return false;
}

/* --- the device thread ----------------------------------------------------------------------------------------- */

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

/* Of the device thread only, which may be without the lock: who reads the counters may be a moment behind. */
static void count_wakeup(struct context *ctx)
{
    __atomic_store_n(&ctx->counters.thread_wakeups, ctx->counters.thread_wakeups + 1, __ATOMIC_RELAXED);
}

/* Sleeps until one of the descriptors, the first of which is the kick, is readable or ctx->wake_at has come. Gives the
 * lock back meanwhile. */
static void sleep_on(struct context *ctx, int state, struct pollfd *fds, nfds_t count)
{
    uint64_t deadline = ctx->wake_at;
    struct timespec ts;

    ctx->thread_state = state;
    pthread_mutex_unlock(&ctx->lock);
    ppoll(fds, count, until(deadline, &ts), NULL);
    pthread_mutex_lock(&ctx->lock);
    ctx->thread_state = THREAD_BUSY;
    count_wakeup(ctx);
    if (fds[0].revents)
        take_kicks(ctx->kick);
}

/* Who leads sees to packets, but not to what has a time or is left over. */
static void rest(struct context *ctx)
{
    struct pollfd fd = {.fd = ctx->kick, .events = POLLIN};

    ctx->wake_at = list_empty(&ctx->tx_ready) ? progress_deadline(ctx) : 0;
    if (ctx->wake_at > now_ns())
        sleep_on(ctx, THREAD_RESTING, &fd, 1);
    else
        progress_drive(ctx, false);
}

static void abandon(struct context *ctx)
{
    ctx->claimed = ctx->sleeper = false;
    ctx->in_time = 0;
    ctx->visits = 0;
}

/* What peers may be waiting for: one-sided requests, and acknowledgements of what came through the network. The counters
 * may be a moment old. */
static bool is_calm(struct context *ctx)
{
    uint64_t urgent = __atomic_load_n(&ctx->one_sided, __ATOMIC_RELAXED) +
                      __atomic_load_n(&ctx->counters.received, __ATOMIC_RELAXED) -
                      __atomic_load_n(&ctx->counters.shm_received, __ATOMIC_RELAXED);
    bool calm = urgent == ctx->urgent;

    ctx->urgent = urgent;
    return calm;
}

static void longer_grace(struct context *ctx)
{
    uint64_t most = is_calm(ctx) ? GRACE_CALM : GRACE_MAX;

    ctx->grace = ctx->grace * 2 < most ? ctx->grace * 2 : most;
}

/* Nobody has come for a while. */
static void visit(struct context *ctx)
{
    uint64_t bytes = ctx->counters.received_bytes + ctx->counters.sent_bytes, one_sided = ctx->one_sided;
    bool much = false;
    int received;

    if (ctx->links_asleep)
        much = !drive_and_sleep(ctx, &received);
    else
        received = progress_drive(ctx, false);
    progress_flush_acks(ctx);
    bytes = ctx->counters.received_bytes + ctx->counters.sent_bytes - bytes;
    much = much || bytes > TRANSFER || !list_empty(&ctx->tx_ready) || progress_deadline_links(ctx) != NEVER;
    if (ctx->one_sided != one_sided || much) {
        abandon(ctx);
        ctx->abandoned++;
        ctx->grace = ctx->grace / 4 > GRACE_MIN ? ctx->grace / 4 : GRACE_MIN;
    } else if ((ctx->sleeper && !received) || ++ctx->visits == VISITS) {
        abandon(ctx);
    } else {
        longer_grace(ctx);
    }
}

/* Looks once each grace whether somebody still polls, without the lock, which who polls holds most of the time. True:
 * nobody did; false: there is something else to do. */
static bool polling_ends(struct context *ctx)
{
    struct pollfd fd = {.fd = ctx->kick, .events = POLLIN};
    uint64_t polls = ctx->polls, seen;
    struct timespec ts;
    int rc;

    ctx->thread_state = THREAD_STAYING_OUT;
    ctx->wake_at = NEVER; /* see sleeps() */
    pthread_mutex_unlock(&ctx->lock);
    do {
        seen = polls;
        rc = ppoll(&fd, 1, until(now_ns() + ctx->grace, &ts), NULL);
        count_wakeup(ctx);
        polls = __atomic_load_n(&ctx->polls, __ATOMIC_RELAXED);
        if (polls != seen)
            longer_grace(ctx);
    } while (!rc && polls != seen);
    pthread_mutex_lock(&ctx->lock);
    ctx->thread_state = THREAD_BUSY;
    if (fd.revents)
        take_kicks(ctx->kick);
    return !rc && ctx->polls == seen;
}

/* The same of one who sleeps for packets, and may have to be woken for what has a time. */
static bool sleeper_stays_away(struct context *ctx)
{
    struct pollfd fd = {.fd = ctx->kick, .events = POLLIN};
    uint64_t seen = ctx->polls;

    ctx->wake_at = now_ns() + (ctx->grace < GRACE_MAX ? ctx->grace : GRACE_MAX); /* else each post were a kick */
    sleep_on(ctx, THREAD_STAYING_OUT, &fd, 1);
    if (ctx->polls == seen)
        return true;
    longer_grace(ctx);
    return false;
}

static void stay_out(struct context *ctx)
{
    if (!(ctx->sleeper ? sleeper_stays_away(ctx) : polling_ends(ctx)))
        ctx->visits = 0;
    else if (ctx->leading)
        ctx->resting = true;
    else if (ctx->claimed)
        visit(ctx);
}

/* The links are readable, and a loop is thought to wake for that: it gets a moment. */
static void defer(struct context *ctx)
{
    struct pollfd fd = {.fd = ctx->kick, .events = POLLIN};
    uint64_t seen = ctx->polls;

    ctx->wake_at = now_ns() + DEFER;
    sleep_on(ctx, THREAD_DEFERRING, &fd, 1);
    if (ctx->polls == seen)
        ctx->attended = false; /* it computes, or so */
}

static void watch(struct context *ctx)
{
    struct pollfd fds[1 + MAX_GIDS] = {{.fd = ctx->kick, .events = POLLIN}};
    nfds_t count = add_links(ctx, fds, 1);

    ctx->wake_at = progress_deadline(ctx);
    if (links_sleep(ctx)) {
        bool readable = false;

        sleep_on(ctx, THREAD_WATCHING, fds, count);
        for (nfds_t i = 1; i < count; i++)
            readable = readable || fds[i].revents;
        if (readable && ctx->attended && !ctx->claimed && !ctx->stopping)
            defer(ctx);
    }
    if (!ctx->claimed)
        links_wake(ctx);
}

static void *device_thread(void *arg)
{
    struct context *ctx = arg;

    pthread_mutex_lock(&ctx->lock);
    while (!ctx->stopping) {
        ctx->resting = ctx->resting && ctx->leading;
        if (ctx->resting) {
            rest(ctx);
        } else if (ctx->claimed) {
            stay_out(ctx);
        } else if (!progress_drive(ctx, false) && list_empty(&ctx->tx_ready)) {
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

void sleep_links_changed(struct context *ctx)
{
    struct list *entry;

    for (entry = ctx->watched.next; entry != &ctx->watched; entry = entry->next)
        update_watch(ctx, list_entry(entry, struct channel, in_watched));
    if (ctx->thread_state == THREAD_WATCHING)
        kick(ctx->kick);
    if (ctx->leading)
        kick(ctx->lead_kick);
}

/* --- life ------------------------------------------------------------------------------------------------------- */

int thread_start(struct context *ctx)
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

void thread_stop(struct context *ctx)
{
    if (!ctx->thread_running)
        return;
    pthread_mutex_lock(&ctx->lock);
    ctx->stopping = true;
    kick(ctx->kick);
    pthread_mutex_unlock(&ctx->lock);
    pthread_join(ctx->thread, NULL);
    ctx->thread_running = false;
}

int sleep_init(struct context *ctx)
{
    list_init(&ctx->watched);
    ctx->grace = GRACE_MAX;
    ctx->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ctx->kick < 0)
        return errno;
    ctx->lead_kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ctx->lead_kick < 0) {
        int rc = errno;

        close(ctx->kick);
        return rc;
    }
    return 0;
}

void sleep_free(struct context *ctx)
{
    sleep_unwatch_all(ctx);
    close(ctx->lead_kick);
    close(ctx->kick);
}
