/* Control path: one verbs call a function, its error number as the result.
 *
 * The create functions of verbs return NULL and set errno, the others return an error number or -1 and errno,
 * by the function; here every one returns 0 or a positive errno. */
#include "glue.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

/* Some providers return NULL without setting errno; never report success for that. */
static int last_errno(void)
{
    return errno > 0 ? errno : EIO;
}

static int result(int rc)
{
    if (rc == 0)
        return 0;
    return rc > 0 ? rc : last_errno();
}

/* Lists devices; *list must be given back with provider->free_device_list. A kernel without RDMA support
 * (ENOSYS) is a machine with no devices, not an error. */
int glue_get_device_list(struct glue_provider *p, struct ibv_device ***list, int *num)
{
    errno = 0;
    *num = 0;
    *list = p->get_device_list(num);
    if (*list)
        return 0;
    return errno == ENOSYS ? 0 : last_errno();
}

int glue_open_device(struct glue_provider *p, struct ibv_device *device, struct ibv_context **context)
{
    errno = 0;
    *context = p->open_device(device);
    return *context ? 0 : last_errno();
}

int glue_close_device(struct glue_provider *p, struct ibv_context *context)
{
    return result(p->close_device(context));
}

int glue_query_device(struct glue_provider *p, struct ibv_context *context, struct ibv_device_attr *attr)
{
    memset(attr, 0, sizeof(*attr));
    return result(p->query_device(context, attr));
}

/* The symbol ibv_query_port fills a shorter, older struct; verbs.h reaches the full one through the context
 * and falls back to the symbol. So does this (verbs.h's own inline would need the symbol at link time). */
int glue_query_port(struct glue_provider *p, struct ibv_context *context, uint8_t port,
                    struct ibv_port_attr *attr)
{
    struct verbs_context *extended = verbs_get_ctx_op(context, query_port);

    memset(attr, 0, sizeof(*attr));
    if (extended)
        return result(extended->query_port(context, port, attr, sizeof(*attr)));
    return result(p->query_port(context, port, (struct _compat_ibv_port_attr *)attr));
}

/* Fills at most `max` entries; *num is how many. */
int glue_query_gid_table(struct glue_provider *p, struct ibv_context *context, struct ibv_gid_entry *entries,
                         size_t max, size_t *num)
{
    ssize_t count = p->query_gid_table(context, entries, max, 0, sizeof(*entries));

    *num = count > 0 ? (size_t)count : 0;
    return count < 0 ? (int)-count : 0;
}

/* Reads one asynchronous event, flattens it and acknowledges it before it returns, so that destroying the
 * object it is about never waits for us. EAGAIN: none there (context->async_fd must be non-blocking). */
int glue_get_async_event(struct glue_provider *p, struct ibv_context *context, struct glue_async_event *event)
{
    struct ibv_async_event raw;

    memset(event, 0, sizeof(*event));
    errno = 0;
    if (p->get_async_event(context, &raw))
        return last_errno();
    event->type = raw.event_type;
    switch (raw.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_COMM_EST:
    case IBV_EVENT_SQ_DRAINED:
    case IBV_EVENT_PATH_MIG:
    case IBV_EVENT_PATH_MIG_ERR:
    case IBV_EVENT_QP_LAST_WQE_REACHED:
        event->qp_num = raw.element.qp->qp_num;
        break;
    case IBV_EVENT_CQ_ERR:
        event->cookie = (uintptr_t)raw.element.cq->cq_context;
        break;
    case IBV_EVENT_PORT_ACTIVE:
    case IBV_EVENT_PORT_ERR:
    case IBV_EVENT_LID_CHANGE:
    case IBV_EVENT_PKEY_CHANGE:
    case IBV_EVENT_GID_CHANGE:
    case IBV_EVENT_SM_CHANGE:
    case IBV_EVENT_CLIENT_REREGISTER:
        event->port = raw.element.port_num;
        break;
    default:
        break;
    }
    p->ack_async_event(&raw);
    return 0;
}

int glue_alloc_pd(struct glue_provider *p, struct ibv_context *context, struct ibv_pd **pd)
{
    errno = 0;
    *pd = p->alloc_pd(context);
    return *pd ? 0 : last_errno();
}

int glue_dealloc_pd(struct glue_provider *p, struct ibv_pd *pd)
{
    return result(p->dealloc_pd(pd));
}

/* The memory must stay mapped until the region is deregistered; the caller sees to it. */
int glue_reg_mr(struct glue_provider *p, struct ibv_pd *pd, uint64_t addr, uint64_t length, int access,
                struct ibv_mr **mr)
{
    errno = 0;
    *mr = p->reg_mr(pd, (void *)(uintptr_t)addr, length, access);
    return *mr ? 0 : last_errno();
}

int glue_dereg_mr(struct glue_provider *p, struct ibv_mr *mr)
{
    return result(p->dereg_mr(mr));
}

int glue_alloc_mw(struct ibv_pd *pd, int type, struct ibv_mw **mw)
{
    *mw = NULL;
    if (!pd->context->ops.alloc_mw)
        return EOPNOTSUPP;
    errno = 0;
    *mw = ibv_alloc_mw(pd, (enum ibv_mw_type)type);
    return *mw ? 0 : last_errno();
}

int glue_dealloc_mw(struct ibv_mw *mw)
{
    return result(ibv_dealloc_mw(mw));
}

int glue_create_comp_channel(struct glue_provider *p, struct ibv_context *context,
                             struct ibv_comp_channel **channel)
{
    errno = 0;
    *channel = p->create_comp_channel(context);
    return *channel ? 0 : last_errno();
}

int glue_destroy_comp_channel(struct glue_provider *p, struct ibv_comp_channel *channel)
{
    return result(p->destroy_comp_channel(channel));
}

/* *fd is what an event loop watches that does not mind waking for no event. */
int glue_watch_channel(struct glue_provider *p, struct ibv_comp_channel *channel, int *fd)
{
    *fd = channel->fd;
    return p->usroce_watch_channel ? result(p->usroce_watch_channel(channel, fd)) : 0;
}

/* `cookie` comes back from glue_drain_channel() with each event of this queue. `channel` may be NULL. */
int glue_create_cq(struct glue_provider *p, struct ibv_context *context, int cqe, uint64_t cookie,
                   struct ibv_comp_channel *channel, int comp_vector, struct ibv_cq **cq)
{
    errno = 0;
    *cq = p->create_cq(context, cqe, (void *)(uintptr_t)cookie, channel, comp_vector);
    return *cq ? 0 : last_errno();
}

/* Waits inside libibverbs until every event delivered for the queue was acknowledged. */
int glue_destroy_cq(struct glue_provider *p, struct ibv_cq *cq)
{
    return result(p->destroy_cq(cq));
}

int glue_create_srq(struct glue_provider *p, struct ibv_pd *pd, uint32_t max_wr, uint32_t max_sge,
                    struct ibv_srq **srq, uint32_t *granted_wr)
{
    struct ibv_srq_init_attr attr = {.attr = {.max_wr = max_wr, .max_sge = max_sge}};

    errno = 0;
    *srq = p->create_srq(pd, &attr);
    if (!*srq)
        return last_errno();
    *granted_wr = attr.attr.max_wr;
    return 0;
}

/* Asks for one IBV_EVENT_SRQ_LIMIT_REACHED when fewer than `limit` receives are left. */
int glue_arm_srq(struct glue_provider *p, struct ibv_srq *srq, uint32_t limit)
{
    struct ibv_srq_attr attr = {.srq_limit = limit};

    return result(p->modify_srq(srq, &attr, IBV_SRQ_LIMIT));
}

int glue_destroy_srq(struct glue_provider *p, struct ibv_srq *srq)
{
    return result(p->destroy_srq(srq));
}

/* A message may take the receive that was posted last; of one of the two, the other is NULL. Where the device takes the
 * oldest and nothing else, it does so. */
int glue_newest_first(struct glue_provider *p, struct ibv_qp *qp, struct ibv_srq *srq)
{
    return p->usroce_newest_first ? result(p->usroce_newest_first(qp, srq)) : 0;
}

/* attr->cap is updated to what the device granted. */
int glue_create_qp(struct glue_provider *p, struct ibv_pd *pd, struct ibv_qp_init_attr *attr,
                   struct ibv_qp **qp)
{
    errno = 0;
    *qp = p->create_qp(pd, attr);
    return *qp ? 0 : last_errno();
}

int glue_modify_qp(struct glue_provider *p, struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    return result(p->modify_qp(qp, attr, mask));
}

int glue_query_qp(struct glue_provider *p, struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                  struct ibv_qp_init_attr *init)
{
    memset(attr, 0, sizeof(*attr));
    memset(init, 0, sizeof(*init));
    return result(p->query_qp(qp, attr, mask, init));
}

int glue_destroy_qp(struct glue_provider *p, struct ibv_qp *qp)
{
    return result(p->destroy_qp(qp));
}

int glue_set_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0)
        return errno;
    return fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? errno : 0;
}

/* What libusroce.so can do beyond verbs (usroce_api.h). ENOTSUP where the library is another one. */

int glue_usroce_set_option(struct glue_provider *p, const char *name, const char *value)
{
    return p->usroce_set_option ? result(p->usroce_set_option(name, value)) : ENOTSUP;
}

int glue_usroce_set_fault(struct glue_provider *p, struct ibv_context *context, const struct usroce_fault *fault)
{
    return p->usroce_set_fault ? result(p->usroce_set_fault(context, fault)) : ENOTSUP;
}

int glue_usroce_capture(struct glue_provider *p, struct ibv_context *context, const char *path)
{
    return p->usroce_capture ? result(p->usroce_capture(context, path)) : ENOTSUP;
}

/* Members that a library older than these headers does not know are 0. */
int glue_usroce_query_counters(struct glue_provider *p, struct ibv_context *context,
                               struct usroce_counters *counters)
{
    memset(counters, 0, sizeof(*counters));
    if (!p->usroce_query_counters)
        return ENOTSUP;
    return result(p->usroce_query_counters(context, counters, sizeof(*counters)));
}

/* Memory that peers on this host can map. */
int glue_usroce_alloc(struct glue_provider *p, size_t size, void **memory)
{
    if (!p->usroce_alloc)
        return ENOTSUP;
    *memory = p->usroce_alloc(size);
    return *memory ? 0 : errno;
}

int glue_usroce_free(struct glue_provider *p, void *memory)
{
    return p->usroce_free ? result(p->usroce_free(memory)) : ENOTSUP;
}

int glue_usroce_unshare(struct glue_provider *p, void *memory)
{
    return p->usroce_unshare ? result(p->usroce_unshare(memory)) : ENOTSUP;
}
