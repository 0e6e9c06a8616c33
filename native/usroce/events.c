/* Events: completion channels, asynchronous events, and their acknowledgement.
 *
 * Both kinds have a descriptor that the application may watch: an eventfd in semaphore mode that holds one unit
 * for each event nobody has taken. Units are added and removed only under the device lock, together with the event
 * they stand for, so that the descriptor is readable exactly if there is one, and reading a unit never blocks. Who
 * finds none waits in poll(), outside the lock; on a descriptor that the application made non-blocking it is told
 * EAGAIN.
 *
 * Acknowledgements are counted in the object itself, under the mutex that the verbs ABI keeps there for it; an
 * object is not destroyed before everything taken about it is acknowledged. */
#include "usroce.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct async_node {
    struct list in_ready;
    struct ibv_async_event event;
    enum event_subject subject;
    void *element;
};

/* --- units --------------------------------------------------------------------------------------------------- */

static void add_unit(int fd)
{
    uint64_t one = 1;
    ssize_t rc = write(fd, &one, sizeof(one));

    (void)rc; /* 2^64 - 1 events would have to wait for it to fail */
}

/* Never blocks, unless the application read the descriptor behind our back. */
static void take_unit(int fd)
{
    uint64_t one;
    ssize_t rc;

    do
        rc = read(fd, &one, sizeof(one));
    while (rc < 0 && errno == EINTR);
}

/* Whether to wait for a unit. False: errno says why not. */
static bool may_wait(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0)
        return false;
    if (flags & O_NONBLOCK) {
        errno = EAGAIN;
        return false;
    }
    return true;
}

/* Waits for an event, without the lock. False: errno says why there is none. */
static bool wait_for_unit(int fd)
{
    struct pollfd pfd = {.fd = fd, .events = POLLIN};

    return may_wait(fd) && poll(&pfd, 1, -1) > 0;
}

/* --- completion channels ------------------------------------------------------------------------------------- */

static struct channel *channel_of(struct ibv_comp_channel *base)
{
    return (struct channel *)(void *)base;
}

EXPORT struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    struct context *ctx = context_of(context);
    struct channel *channel;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return NULL;
    }
    channel = calloc(1, sizeof(*channel));
    if (!channel)
        return NULL;
    channel->base.fd = eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC);
    if (channel->base.fd < 0) {
        int error = errno;

        free(channel);
        errno = error;
        return NULL;
    }
    channel->base.context = context;
    channel->watch_fd = -1;
    list_init(&channel->in_watched);
    list_init(&channel->ready);
    pthread_mutex_lock(&ctx->lock);
    ctx->num_channels++;
    pthread_mutex_unlock(&ctx->lock);
    return &channel->base;
}

EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *base)
{
    struct context *ctx = context_of(base->context);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = base->refcnt > 0;
    if (!busy) {
        sleep_unwatch(ctx, channel_of(base));
        ctx->num_channels--;
    }
    context_unlock(ctx);
    if (busy)
        return EBUSY;
    close(base->fd);
    free(channel_of(base));
    return 0;
}

void channel_notify(struct cq *cq)
{
    struct channel *channel = channel_of(cq->base.channel);

    cq->armed = NOT_ARMED;
    if (!channel)
        return;
    cq->pending++;
    if (list_empty(&cq->in_channel))
        list_add_tail(&channel->ready, &cq->in_channel);
    if (channel->taking)
        channel->without_unit++;
    else
        add_unit(channel->base.fd);
    sleep_notified(context_of(cq->base.context), channel);
}

bool channel_is_watched(struct ibv_comp_channel *base)
{
    return base && channel_of(base)->watch_fd >= 0;
}

void channel_forget(struct cq *cq)
{
    list_del(&cq->in_channel);
    for (; cq->pending; cq->pending--)
        take_unit(cq->base.channel->fd);
}

/* The next queue with an event, which is taken; NULL: there is none. A queue with several goes to the end of the
 * line. */
static struct cq *channel_take(struct channel *channel)
{
    struct list *entry = list_pop(&channel->ready);
    struct cq *cq;

    if (!entry)
        return NULL;
    cq = list_entry(entry, struct cq, in_channel);
    if (channel->without_unit)
        channel->without_unit--;
    else
        take_unit(channel->base.fd);
    channel->taken = true;
    cq->pending--;
    cq->comp_events++;
    if (cq->pending)
        list_add_tail(&channel->ready, &cq->in_channel);
    return cq;
}

EXPORT int ibv_get_cq_event(struct ibv_comp_channel *base, struct ibv_cq **cq_out, void **cq_context)
{
    struct context *ctx = context_of(base->context);
    struct channel *channel = channel_of(base);
    struct cq *cq;
    int state;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return -1;
    }
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state); /* but for its sleep: driving has cancellation points */
    pthread_mutex_lock(&ctx->lock);
    do
        cq = channel_take(channel);
    while (!cq && (sleep_attend(ctx, channel) || (may_wait(base->fd) && sleep_blocking(ctx, channel, state))));
    for (; channel->without_unit; channel->without_unit--)
        add_unit(base->fd);
    pthread_mutex_unlock(&ctx->lock);
    pthread_setcancelstate(state, NULL);
    if (!cq)
        return -1;
    *cq_out = &cq->base;
    *cq_context = cq->base.cq_context;
    return 0;
}

EXPORT int usroce_watch_channel(struct ibv_comp_channel *base, int *fd)
{
    struct context *ctx = context_of(base->context);
    struct channel *channel = channel_of(base);
    int rc = context_check_ours(base->context);

    if (rc)
        return rc;
    pthread_mutex_lock(&ctx->lock);
    if (channel->watch_fd < 0)
        rc = sleep_watch(ctx, channel);
    *fd = channel->watch_fd;
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int nevents)
{
    if (context_is_foreign(context_of(cq->context)))
        return;
    pthread_mutex_lock(&cq->mutex);
    cq->comp_events_completed += nevents;
    pthread_cond_signal(&cq->cond);
    pthread_mutex_unlock(&cq->mutex);
}

/* --- asynchronous events ------------------------------------------------------------------------------------- */

static void set_element(struct ibv_async_event *event, enum event_subject subject, void *element)
{
    switch (subject) {
    case EVENT_CQ:
        event->element.cq = &((struct cq *)element)->base;
        break;
    case EVENT_QP:
        event->element.qp = &((struct qp *)element)->base;
        break;
    case EVENT_SRQ:
        event->element.srq = &((struct srq *)element)->base;
        break;
    case EVENT_PORT:
        event->element.port_num = 1;
        break;
    case EVENT_DEVICE:
        break;
    }
}

/* Without memory the event is lost; what it tells can be seen in its subject as well. */
void async_post(struct context *ctx, enum ibv_event_type type, enum event_subject subject, void *element)
{
    struct async_node *node = calloc(1, sizeof(*node));

    if (!node)
        return;
    node->event.event_type = type;
    set_element(&node->event, subject, element);
    node->subject = subject;
    node->element = element;
    list_add_tail(&ctx->async_ready, &node->in_ready);
    add_unit(ctx->verbs.context.async_fd);
}

static void drop_node(struct context *ctx, struct async_node *node)
{
    list_del(&node->in_ready);
    take_unit(ctx->verbs.context.async_fd);
    free(node);
}

void async_forget(struct context *ctx, void *element)
{
    struct list *entry = ctx->async_ready.next;

    while (entry != &ctx->async_ready) {
        struct async_node *node = list_entry(entry, struct async_node, in_ready);

        entry = entry->next;
        if (element && node->element == element)
            drop_node(ctx, node);
    }
}

void async_forget_all(struct context *ctx)
{
    while (!list_empty(&ctx->async_ready))
        drop_node(ctx, list_entry(ctx->async_ready.next, struct async_node, in_ready));
}

/* The object will have to wait for the acknowledgement of one more. */
static void count_taken(const struct async_node *node)
{
    if (node->subject == EVENT_CQ)
        ((struct cq *)node->element)->async_events++;
    else if (node->subject == EVENT_QP)
        ((struct qp *)node->element)->async_events++;
    else if (node->subject == EVENT_SRQ)
        ((struct srq *)node->element)->async_events++;
}

static bool async_take(struct context *ctx, struct ibv_async_event *event)
{
    struct async_node *node;

    if (list_empty(&ctx->async_ready))
        return false;
    node = list_entry(ctx->async_ready.next, struct async_node, in_ready);
    count_taken(node);
    *event = node->event;
    drop_node(ctx, node);
    return true;
}

EXPORT int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
    struct context *ctx = context_of(context);
    bool taken;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return -1;
    }
    for (;;) {
        pthread_mutex_lock(&ctx->lock);
        taken = async_take(ctx, event);
        pthread_mutex_unlock(&ctx->lock);
        if (taken)
            return 0;
        if (!wait_for_unit(context->async_fd))
            return -1;
    }
}

/* --- acknowledgement ----------------------------------------------------------------------------------------- */

static void acknowledge(struct ibv_context *context, pthread_mutex_t *mutex, pthread_cond_t *cond,
                        uint32_t *completed)
{
    if (context_is_foreign(context_of(context)))
        return;
    pthread_mutex_lock(mutex);
    ++*completed;
    pthread_cond_signal(cond);
    pthread_mutex_unlock(mutex);
}

EXPORT void ibv_ack_async_event(struct ibv_async_event *event)
{
    struct ibv_cq *cq = event->element.cq;
    struct ibv_qp *qp = event->element.qp;
    struct ibv_srq *srq = event->element.srq;

    switch (event->event_type) {
    case IBV_EVENT_CQ_ERR:
        acknowledge(cq->context, &cq->mutex, &cq->cond, &cq->async_events_completed);
        break;
    case IBV_EVENT_SRQ_ERR:
    case IBV_EVENT_SRQ_LIMIT_REACHED:
        acknowledge(srq->context, &srq->mutex, &srq->cond, &srq->events_completed);
        break;
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_COMM_EST:
    case IBV_EVENT_SQ_DRAINED:
    case IBV_EVENT_QP_LAST_WQE_REACHED:
        acknowledge(qp->context, &qp->mutex, &qp->cond, &qp->events_completed);
        break;
    default:
        break; /* of the device or the port: nothing waits for these */
    }
}

static void wait_acked(pthread_mutex_t *mutex, pthread_cond_t *cond, const uint32_t *completed, uint32_t taken)
{
    pthread_mutex_lock(mutex);
    while (*completed != taken)
        pthread_cond_wait(cond, mutex);
    pthread_mutex_unlock(mutex);
}

void async_wait_acked_cq(struct cq *cq)
{
    struct ibv_cq *base = &cq->base;

    wait_acked(&base->mutex, &base->cond, &base->comp_events_completed, cq->comp_events);
    wait_acked(&base->mutex, &base->cond, &base->async_events_completed, cq->async_events);
}

void async_wait_acked_qp(struct qp *qp)
{
    wait_acked(&qp->base.mutex, &qp->base.cond, &qp->base.events_completed, qp->async_events);
}

void async_wait_acked_srq(struct srq *srq)
{
    wait_acked(&srq->base.mutex, &srq->base.cond, &srq->base.events_completed, srq->async_events);
}
