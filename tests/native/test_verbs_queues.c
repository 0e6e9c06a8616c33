/* Completion queues, completion channels, shared receive queues, asynchronous events. */
#define _GNU_SOURCE /* pthread_timedjoin_np */
#include "verbs_objects.h"

#include <pthread.h>

/* --- completion queues --------------------------------------------------------------------------------------- */

static void cq_attributes(void)
{
    struct ibv_context *context = open_device();
    struct ibv_cq *cq;
    struct ibv_wc wc;

    CHECK(!ibv_create_cq(context, 0, NULL, NULL, 0) && errno == EINVAL);
    CHECK(!ibv_create_cq(context, -1, NULL, NULL, 0) && errno == EINVAL);
    CHECK(!ibv_create_cq(context, INT32_MAX, NULL, NULL, 0) && errno == EINVAL);
    CHECK(!ibv_create_cq(context, 1, NULL, NULL, context->num_comp_vectors) && errno == EINVAL);
    CHECK(!ibv_create_cq(context, 1, NULL, NULL, -1) && errno == EINVAL);
    cq = ibv_create_cq(context, 10, &wc, NULL, 0);
    REQUIRE(cq && cq->cqe >= 10 && cq->cq_context == &wc && cq->context == context);
    CHECK(ibv_poll_cq(cq, 1, &wc) == 0 && ibv_poll_cq(cq, 0, NULL) == 0 && !ibv_req_notify_cq(cq, 0));
    CHECK(!ibv_resize_cq(cq, 100) && cq->cqe >= 100 && ibv_resize_cq(cq, 0) == EINVAL);
    CHECK(!ibv_destroy_cq(cq) && !ibv_close_device(context));
}

/* Resizing keeps what is there, and refuses to lose it. */
static void cq_resize(void)
{
    struct bench bench;
    struct ibv_recv_wr wr = {.num_sge = 0}, *bad;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};

    open_bench(&bench, NULL);
    for (wr.wr_id = 0; wr.wr_id < 10; wr.wr_id++)
        REQUIRE(!ibv_post_recv(bench.a, &wr, &bad));
    CHECK(!ibv_modify_qp(bench.a, &attr, IBV_QP_STATE)); /* that flushes them */
    CHECK(ibv_resize_cq(bench.cq, 8) == EINVAL);
    CHECK(ibv_destroy_cq(bench.cq) == EBUSY);
    CHECK(next_completion(bench.cq).wr_id == 0);
    CHECK(!ibv_resize_cq(bench.cq, 16));
    for (uint64_t i = 1; i < 10; i++) {
        struct ibv_wc wc = next_completion(bench.cq);

        CHECK(wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == i && wc.qp_num == bench.a->qp_num);
    }
    close_bench(&bench);
}

static void cq_overrun(void)
{
    struct bench bench;
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE}, *bad;
    struct ibv_async_event event;
    struct ibv_qp_attr attr;
    struct ibv_qp_init_attr init;
    struct ibv_wc wc;
    int before;

    open_bench(&bench, NULL);
    REQUIRE(!ibv_resize_cq(bench.cq, 4));
    before = bench.cq->cqe;
    for (int i = 0; i < 20; i++) { /* the queue pair may be dead before the last: flushed then */
        wr.send_flags = IBV_SEND_SIGNALED;
        CHECK(!ibv_post_send(bench.a, &wr, &bad));
    }
    REQUIRE(find_event(bench.context, IBV_EVENT_CQ_ERR, &event) && event.element.cq == bench.cq);
    ibv_ack_async_event(&event);
    REQUIRE(find_event(bench.context, IBV_EVENT_QP_FATAL, &event) && event.element.qp == bench.a);
    ibv_ack_async_event(&event);
    CHECK(!ibv_query_qp(bench.a, &attr, IBV_QP_STATE, &init) && attr.qp_state == IBV_QPS_ERR);
    CHECK(!ibv_query_qp(bench.b, &attr, IBV_QP_STATE, &init) && attr.qp_state == IBV_QPS_RTS);
    for (int i = 0; i < before; i++)
        CHECK(ibv_poll_cq(bench.cq, 1, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
    CHECK(ibv_poll_cq(bench.cq, 1, &wc) < 0 && ibv_req_notify_cq(bench.cq, 0) == EIO);
    close_bench(&bench);
}

static struct ibv_cq_ex *create_cq_ex(struct ibv_context *context, uint32_t cqe, uint32_t flags)
{
    struct ibv_cq_init_attr_ex attr = {
        .cqe = cqe,
        .wc_flags = IBV_WC_STANDARD_FLAGS | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP |
                    IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK,
        .comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS,
        .flags = flags,
    };
    struct ibv_cq_ex *cq;

    attr.wc_flags |= IBV_WC_EX_WITH_FLOW_TAG;
    CHECK(!ibv_create_cq_ex(context, &attr) && errno == EOPNOTSUPP);
    attr.wc_flags &= ~(uint64_t)IBV_WC_EX_WITH_FLOW_TAG;
    cq = ibv_create_cq_ex(context, &attr);
    REQUIRE(cq);
    return cq;
}

/* The extended queue in the place of the plain one. */
static void use_cq_ex(struct bench *bench, struct ibv_cq_ex *cq)
{
    CHECK(!ibv_destroy_qp(bench->a) && !ibv_destroy_cq(bench->cq));
    bench->cq = ibv_cq_ex_to_cq(cq);
    bench->a = create_qp(bench, bench->cq, NULL, IBV_QPT_RC);
    reconnect(bench);
}

static int start(struct ibv_cq_ex *cq)
{
    struct ibv_poll_cq_attr attr = {0};
    time_t deadline = now() + PATIENCE;
    int rc;

    do
        rc = ibv_start_poll(cq, &attr);
    while (rc == ENOENT && now() < deadline);
    return rc;
}

static void cq_extended(void)
{
    struct bench bench;
    struct ibv_cq_ex *cq;
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .wr_id = 40};
    struct ibv_poll_cq_attr attr = {.comp_mask = 1};
    uint64_t earlier, wall, seconds;

    open_bench(&bench, NULL);
    cq = create_cq_ex(bench.context, 64, 0);
    use_cq_ex(&bench, cq);
    CHECK(ibv_start_poll(cq, &attr) == EINVAL);
    attr.comp_mask = 0;
    CHECK(ibv_start_poll(cq, &attr) == ENOENT);
    for (int i = 0; i < 2; i++, wr.wr_id++)
        REQUIRE(!post(bench.a, &wr));
    REQUIRE(!start(cq));
    CHECK(cq->wr_id == 40 && cq->status == IBV_WC_SUCCESS && ibv_wc_read_opcode(cq) == IBV_WC_RDMA_WRITE);
    CHECK(ibv_wc_read_qp_num(cq) == bench.a->qp_num && !ibv_wc_read_vendor_err(cq));
    earlier = ibv_wc_read_completion_ts(cq);
    wall = ibv_wc_read_completion_wallclock_ns(cq);
    seconds = (uint64_t)time(NULL);
    CHECK(earlier && wall / 1000000000u + 60 > seconds && wall / 1000000000u <= seconds + 1);
    ibv_end_poll(cq);
    REQUIRE(!start(cq));
    CHECK(cq->wr_id == 41 && ibv_wc_read_completion_ts(cq) >= earlier);
    CHECK(ibv_next_poll(cq) == ENOENT);
    ibv_end_poll(cq);
    REQUIRE(!post(bench.a, &wr));
    CHECK(next_completion(bench.cq).wr_id == 42); /* by the plain function */
    close_bench(&bench);
}

static void cq_that_may_overrun(void)
{
    struct bench bench;
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE};
    struct ibv_wc wc[16];

    open_bench(&bench, NULL);
    use_cq_ex(&bench, create_cq_ex(bench.context, 2,
                                   IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN | IBV_CREATE_CQ_ATTR_SINGLE_THREADED));
    for (int i = 0; i < 10; i++)
        REQUIRE(!post(bench.a, &wr));
    CHECK(next_completion(bench.cq).status == IBV_WC_SUCCESS);
    while (ibv_poll_cq(bench.cq, 16, wc) > 0)
        ;
    CHECK(write_to(&bench, (uintptr_t)memory, bench.mr->rkey) == IBV_WC_SUCCESS);
    close_bench(&bench);
}

/* --- completion events --------------------------------------------------------------------------------------- */

static bool wait_readable(int fd)
{
    struct pollfd pfd = {.fd = fd, .events = POLLIN};

    return poll(&pfd, 1, PATIENCE * 1000) == 1;
}

static struct ibv_cq *take_event(struct bench *bench)
{
    struct ibv_cq *cq = NULL;
    void *cookie = NULL;

    CHECK(!ibv_get_cq_event(bench->cq->channel, &cq, &cookie));
    CHECK(cq == bench->cq && cookie == bench);
    return cq;
}

/* `b` sends; the completion of the receive at `a` is what the channel is about. */
static void receive_one(struct bench *bench, unsigned int flags)
{
    post_receive(bench, bench->a);
    send_to_peer(bench, bench->b, flags | IBV_SEND_SIGNALED);
    CHECK(next_completion(bench->peer_cq).status == IBV_WC_SUCCESS);
}

static void drain(struct ibv_cq *cq, int expected)
{
    struct ibv_wc wc[16];

    CHECK(ibv_poll_cq(cq, 16, wc) == expected);
}

static void channel_events(void)
{
    struct bench bench;
    int fd;

    open_bench(&bench, ibv_create_comp_channel);
    fd = bench.cq->channel->fd;
    receive_one(&bench, 0);
    CHECK(!is_readable(fd)); /* nobody asked */
    CHECK(!ibv_req_notify_cq(bench.cq, 0));
    CHECK(!is_readable(fd)); /* what was there before does not count */
    receive_one(&bench, 0);
    receive_one(&bench, 0);
    CHECK(wait_readable(fd));
    take_event(&bench);
    CHECK(!is_readable(fd)); /* one event for each request */
    drain(bench.cq, 3);
    CHECK(!ibv_req_notify_cq(bench.cq, 1));
    receive_one(&bench, 0);
    CHECK(!is_readable(fd));
    receive_one(&bench, IBV_SEND_SOLICITED);
    CHECK(wait_readable(fd));
    take_event(&bench);
    CHECK(!ibv_req_notify_cq(bench.cq, 0) && !ibv_req_notify_cq(bench.cq, 1)); /* the wider one stays */
    receive_one(&bench, 0);
    CHECK(wait_readable(fd));
    take_event(&bench);
    ibv_ack_cq_events(bench.cq, 3);
    CHECK(ibv_destroy_comp_channel(bench.cq->channel) == EBUSY);
    close_bench(&bench);
}

static void channel_without_waiting(void)
{
    struct bench bench;
    struct ibv_cq *cq;
    void *cookie;

    open_bench(&bench, ibv_create_comp_channel);
    make_nonblocking(bench.cq->channel->fd);
    CHECK(ibv_get_cq_event(bench.cq->channel, &cq, &cookie) == -1 && errno == EAGAIN);
    CHECK(!ibv_req_notify_cq(bench.cq, 0));
    receive_one(&bench, 0);
    CHECK(wait_readable(bench.cq->channel->fd));
    ibv_ack_cq_events(take_event(&bench), 1);
    CHECK(ibv_get_cq_event(bench.cq->channel, &cq, &cookie) == -1 && errno == EAGAIN);
    close_bench(&bench);
}

/* Events that nobody took go with their queue, and the other queue of the channel keeps its own. */
static void channel_forgets(void)
{
    struct bench bench;
    struct ibv_comp_channel *channel;

    open_bench(&bench, ibv_create_comp_channel);
    channel = bench.cq->channel;
    for (int i = 0; i < 3; i++) {
        CHECK(!ibv_req_notify_cq(bench.cq, 0));
        receive_one(&bench, 0);
    }
    CHECK(wait_readable(channel->fd));
    ack_everything(bench.context);
    CHECK(!ibv_destroy_qp(bench.a) && !ibv_destroy_cq(bench.cq));
    CHECK(!is_readable(channel->fd));
    bench.cq = ibv_create_cq(bench.context, 100, &bench, channel, 1);
    bench.a = create_qp(&bench, bench.cq, NULL, IBV_QPT_RC);
    reconnect(&bench);
    CHECK(!ibv_req_notify_cq(bench.cq, 0));
    receive_one(&bench, 0);
    CHECK(wait_readable(channel->fd));
    ibv_ack_cq_events(take_event(&bench), 1);
    close_bench(&bench);
}

static void *wait_for_event(void *arg)
{
    return take_event(arg);
}

static void *destroy_cq(void *arg)
{
    CHECK(!ibv_destroy_cq(arg));
    return NULL;
}

/* A thread sleeps in ibv_get_cq_event(); then one in ibv_destroy_cq(), for an acknowledgement. */
static void channel_threads(void)
{
    struct bench bench;
    struct ibv_comp_channel *channel;
    pthread_t thread;
    struct timespec soon;

    open_bench(&bench, ibv_create_comp_channel);
    channel = bench.cq->channel;
    CHECK(!ibv_req_notify_cq(bench.cq, 0));
    REQUIRE(!pthread_create(&thread, NULL, wait_for_event, &bench));
    receive_one(&bench, 0);
    pthread_join(thread, NULL);
    ack_everything(bench.context);
    CHECK(!ibv_destroy_qp(bench.a));
    REQUIRE(!pthread_create(&thread, NULL, destroy_cq, bench.cq));
    clock_gettime(CLOCK_REALTIME, &soon);
    soon.tv_nsec += 50 * 1000 * 1000;
    soon.tv_sec += soon.tv_nsec / 1000000000;
    soon.tv_nsec %= 1000000000;
    CHECK(pthread_timedjoin_np(thread, NULL, &soon) == ETIMEDOUT);
    ibv_ack_cq_events(bench.cq, 1);
    pthread_join(thread, NULL);
    bench.cq = ibv_create_cq(bench.context, 1, NULL, channel, 0);
    bench.a = create_qp(&bench, bench.cq, NULL, IBV_QPT_RC);
    close_bench(&bench);
}

static void *take_events_of(void *arg)
{
    struct ibv_comp_channel *channel = arg;
    struct ibv_cq *cq;
    void *cookie;

    CHECK(!ibv_get_cq_event(channel, &cq, &cookie) && cq->channel == channel);
    ibv_ack_cq_events(cq, 1);
    return NULL;
}

/* Two threads sleep, each on its own channel; only one of them can wake for packets. */
static void channel_followers(void)
{
    struct bench bench;
    struct ibv_comp_channel *channel;
    struct ibv_cq *second;
    pthread_t threads[2];
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .send_flags = IBV_SEND_SIGNALED};

    open_bench(&bench, ibv_create_comp_channel);
    channel = ibv_create_comp_channel(bench.context);
    REQUIRE(channel);
    CHECK(!ibv_destroy_qp(bench.b));
    second = ibv_create_cq(bench.context, 16, NULL, channel, 0);
    REQUIRE(second);
    bench.b = create_qp(&bench, second, NULL, IBV_QPT_RC);
    reconnect(&bench);
    for (int i = 0; i < 20; i++) {
        REQUIRE(!ibv_req_notify_cq(bench.cq, 0) && !ibv_req_notify_cq(second, 0));
        REQUIRE(!pthread_create(&threads[0], NULL, take_events_of, bench.cq->channel));
        REQUIRE(!pthread_create(&threads[1], NULL, take_events_of, channel));
        REQUIRE(!post(i % 2 ? bench.a : bench.b, &wr));
        REQUIRE(!pthread_join(threads[i % 2 ? 0 : 1], NULL));
        REQUIRE(!post(i % 2 ? bench.b : bench.a, &wr));
        REQUIRE(!pthread_join(threads[i % 2 ? 1 : 0], NULL));
        drain(bench.cq, 1);
        drain(second, 1);
    }
    CHECK(!ibv_destroy_qp(bench.b) && !ibv_destroy_cq(second) && !ibv_destroy_comp_channel(channel));
    bench.b = create_qp(&bench, bench.peer_cq, NULL, IBV_QPT_RC);
    close_bench(&bench);
}

/* A thread that slept for packets is cancelled there: others see to them from then on. */
static void channel_cancelled(void)
{
    struct bench bench;
    pthread_t thread;
    void *result;

    open_bench(&bench, ibv_create_comp_channel);
    for (int i = 0; i < 20; i++) {
        CHECK(!ibv_req_notify_cq(bench.cq, 1));
        REQUIRE(!pthread_create(&thread, NULL, take_events_of, bench.cq->channel));
        receive_one(&bench, 0); /* not solicited: no event */
        REQUIRE(!pthread_cancel(thread) && !pthread_join(thread, &result));
        CHECK(result == PTHREAD_CANCELED);
        CHECK(write_to(&bench, (uintptr_t)memory, bench.mr->rkey) == IBV_WC_SUCCESS);
        receive_one(&bench, IBV_SEND_SOLICITED);
        CHECK(wait_readable(bench.cq->channel->fd));
        ibv_ack_cq_events(take_event(&bench), 1);
        while (ibv_poll_cq(bench.cq, 1, &(struct ibv_wc){0}) > 0)
            ;
    }
    close_bench(&bench);
}

/* --- a watched channel ------------------------------------------------------------------------------------------- */

static int watch(struct bench *bench)
{
    int fd = -1, again = -1;

    open_bench(bench, ibv_create_comp_channel);
    make_nonblocking(bench->cq->channel->fd);
    REQUIRE(!usroce_watch_channel(bench->cq->channel, &fd) && !usroce_watch_channel(bench->cq->channel, &again));
    CHECK(fd >= 0 && fd == again && fd != bench->cq->channel->fd);
    return fd;
}

/* As an event loop does it; returns how many wake-ups were stray. */
static int wait_watching(struct bench *bench, int fd)
{
    struct ibv_cq *cq;
    void *cookie;
    int strays = 0;

    for (;; strays++) {
        REQUIRE(wait_readable(fd));
        if (!ibv_get_cq_event(bench->cq->channel, &cq, &cookie))
            break;
        CHECK(errno == EAGAIN);
    }
    CHECK(cq == bench->cq && cookie == bench);
    ibv_ack_cq_events(cq, 1);
    return strays;
}

/* Nobody calls the device but for an event. */
static void watched_channel(void)
{
    struct bench bench;
    struct ibv_cq *cq;
    void *cookie;
    int fd = watch(&bench);

    for (int i = 0; i < 200; i++) {
        CHECK(!ibv_req_notify_cq(bench.cq, 0));
        post_receive(&bench, bench.a);
        send_to_peer(&bench, bench.b, IBV_SEND_SIGNALED);
        wait_watching(&bench, fd);
        drain(bench.cq, 1);
        CHECK(next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
    }
    while (is_readable(fd)) /* an acknowledgement: the descriptor is readable until it is taken */
        CHECK(ibv_get_cq_event(bench.cq->channel, &cq, &cookie) == -1 && errno == EAGAIN);
    CHECK(!ibv_req_notify_cq(bench.cq, 0)); /* it is destroyed armed */
    close_bench(&bench);
}

/* What is found by polling may raise no event, but then the queue stays armed. */
static void watched_and_polled(void)
{
    struct bench bench;
    struct ibv_cq *cq;
    void *cookie;
    int fd = watch(&bench);
    bool armed = false;

    for (int i = 0; i < 200; i++) {
        if (!armed)
            CHECK(!ibv_req_notify_cq(bench.cq, 0));
        post_receive(&bench, bench.a);
        send_to_peer(&bench, bench.b, IBV_SEND_SIGNALED);
        CHECK(next_completion(bench.cq).status == IBV_WC_SUCCESS);
        CHECK(next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
        armed = ibv_get_cq_event(bench.cq->channel, &cq, &cookie) != 0;
        if (!armed)
            ibv_ack_cq_events(cq, 1);
        if (!armed || i % 8)
            continue;
        post_receive(&bench, bench.a);
        send_to_peer(&bench, bench.b, IBV_SEND_SIGNALED);
        wait_watching(&bench, fd);
        armed = false;
        drain(bench.cq, 1);
        CHECK(next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
    }
    close_bench(&bench);
}

/* A loop is not woken for ever for packets that are none of its business. */
static void watched_in_vain(void)
{
    struct bench bench;
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .send_flags = IBV_SEND_SIGNALED};
    int fd = watch(&bench), strays = 0;

    CHECK(!ibv_req_notify_cq(bench.cq, 0));
    for (int i = 0; i < 200; i++) {
        struct ibv_cq *cq;
        struct ibv_wc wc;
        void *cookie;

        REQUIRE(!post(bench.b, &wr));
        while (!ibv_poll_cq(bench.peer_cq, 1, &wc)) /* nothing is driven here but by the loop, once it is readable */
            if (is_readable(fd))
                strays += ibv_get_cq_event(bench.cq->channel, &cq, &cookie) == -1;
    }
    post_receive(&bench, bench.a);
    send_to_peer(&bench, bench.b, IBV_SEND_SIGNALED);
    wait_watching(&bench, fd);
    drain(bench.cq, 1);
    CHECK(next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
    CHECK(strays <= 200);
    close_bench(&bench);
}

/* --- shared receive queues and asynchronous events ----------------------------------------------------------- */

static struct ibv_srq *create_srq(struct ibv_pd *pd, uint32_t max_wr, uint32_t max_sge)
{
    struct ibv_srq_init_attr init = {.attr = {.max_wr = max_wr, .max_sge = max_sge}};
    struct ibv_srq *srq = ibv_create_srq(pd, &init);

    CHECK(!srq || init.attr.max_wr >= max_wr);
    return srq;
}

static int post_shared(struct bench *bench, struct ibv_srq *srq, int count)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory + PAGE, .length = 64, .lkey = bench->mr->lkey};
    int rc = 0;

    for (int i = 0; i < count && !rc; i++) {
        struct ibv_recv_wr wr = {.wr_id = (uint64_t)i, .sg_list = &sge, .num_sge = 1}, *bad = NULL;

        rc = ibv_post_srq_recv(srq, &wr, &bad);
        CHECK(!rc || bad == &wr);
    }
    return rc;
}

static void srq_attributes(void)
{
    struct bench bench;
    struct ibv_srq *srq;
    struct ibv_srq_attr attr;
    struct ibv_sge sges[3] = {{0}};
    struct ibv_recv_wr wr = {.sg_list = sges, .num_sge = 3}, *bad;

    open_bench(&bench, NULL);
    CHECK(!create_srq(bench.pd, 0, 1) && errno == EINVAL && !create_srq(bench.pd, 1, 1000) && errno == EINVAL);
    srq = create_srq(bench.pd, 4, 2);
    REQUIRE(srq);
    CHECK(!ibv_query_srq(srq, &attr) && attr.max_wr >= 4 && attr.max_sge == 2 && !attr.srq_limit);
    CHECK(ibv_post_srq_recv(srq, &wr, &bad) == EINVAL && bad == &wr);
    CHECK(post_shared(&bench, srq, (int)attr.max_wr) == 0 && post_shared(&bench, srq, 1) == ENOMEM);
    attr.max_wr = 1;
    CHECK(ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR) == EINVAL);
    attr.max_wr = 64;
    CHECK(!ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR) && post_shared(&bench, srq, 60) == 0);
    attr.srq_limit = 1000;
    CHECK(ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT) == EINVAL);
    CHECK(ibv_dealloc_pd(bench.pd) == EBUSY);
    CHECK(!ibv_destroy_srq(srq));
    close_bench(&bench);
}

static void *destroy_srq(void *arg)
{
    CHECK(!ibv_destroy_srq(arg));
    return NULL;
}

static void srq_limit(void)
{
    struct bench bench;
    struct ibv_srq *srq;
    struct ibv_srq_attr attr = {.srq_limit = 3};
    struct ibv_async_event event;
    pthread_t thread;

    open_bench(&bench, NULL);
    srq = create_srq(bench.pd, 8, 1);
    CHECK(!ibv_destroy_qp(bench.b));
    bench.b = create_qp(&bench, bench.peer_cq, srq, IBV_QPT_RC);
    reconnect(&bench);
    CHECK(ibv_destroy_srq(srq) == EBUSY);
    CHECK(!post_shared(&bench, srq, 5) && !ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT));
    make_nonblocking(bench.context->async_fd);
    for (int left = 4; left >= 1; left--) {
        send_to_peer(&bench, bench.a, IBV_SEND_SIGNALED);
        CHECK(next_completion(bench.cq).status == IBV_WC_SUCCESS);
        CHECK(next_completion(bench.peer_cq).status == IBV_WC_SUCCESS);
        while (left > 2 && !ibv_get_async_event(bench.context, &event)) {
            CHECK(event.event_type != IBV_EVENT_SRQ_LIMIT_REACHED);
            ibv_ack_async_event(&event);
        }
    }
    REQUIRE(find_event(bench.context, IBV_EVENT_SRQ_LIMIT_REACHED, &event) && event.element.srq == srq);
    CHECK(!is_readable(bench.context->async_fd)); /* once */
    CHECK(!ibv_query_srq(srq, &attr) && !attr.srq_limit);
    CHECK(!ibv_destroy_qp(bench.b));
    REQUIRE(!pthread_create(&thread, NULL, destroy_srq, srq)); /* waits for the acknowledgement */
    ibv_ack_async_event(&event);
    pthread_join(thread, NULL);
    bench.b = create_qp(&bench, bench.peer_cq, NULL, IBV_QPT_RC);
    close_bench(&bench);
}

/* Armed above what is there, it tells at once; what nobody took goes with the queue. */
static void srq_limit_on_empty(void)
{
    struct bench bench;
    struct ibv_srq *srq;
    struct ibv_srq_attr attr = {.srq_limit = 3};

    open_bench(&bench, NULL);
    ack_everything(bench.context);
    srq = create_srq(bench.pd, 8, 1);
    CHECK(!ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT) && is_readable(bench.context->async_fd));
    CHECK(!ibv_destroy_srq(srq) && !is_readable(bench.context->async_fd));
    close_bench(&bench);
}

/* --- the newest receive first ------------------------------------------------------------------------------------ */

static void post_numbers(struct bench *bench, struct ibv_srq *srq, uint64_t first, uint64_t last)
{
    struct ibv_recv_wr wr = {.num_sge = 0}, *bad;

    for (wr.wr_id = first; wr.wr_id <= last; wr.wr_id++)
        REQUIRE(srq ? !ibv_post_srq_recv(srq, &wr, &bad) : !ibv_post_recv(bench->b, &wr, &bad));
}

/* An empty message for `b`; the receive that it took. */
static uint64_t taken_by_message(struct bench *bench)
{
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND};
    struct ibv_wc wc;

    CHECK(run(bench, &wr) == IBV_WC_SUCCESS);
    wc = next_completion(bench->peer_cq);
    CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV);
    return wc.wr_id;
}

static void expect_newest(struct bench *bench, struct ibv_srq *srq)
{
    post_numbers(bench, srq, 1, 4);
    CHECK(taken_by_message(bench) == 1); /* as verbs have it */
    CHECK(!usroce_newest_first(srq ? NULL : bench->b, srq));
    CHECK(taken_by_message(bench) == 4);
    post_numbers(bench, srq, 5, 5);
    CHECK(taken_by_message(bench) == 5);
    CHECK(taken_by_message(bench) == 3);
    CHECK(taken_by_message(bench) == 2);
    post_numbers(bench, srq, 6, 8);
}

static void newest_first(void)
{
    struct bench bench;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};

    open_bench(&bench, NULL);
    expect_newest(&bench, NULL);
    CHECK(!ibv_modify_qp(bench.b, &attr, IBV_QP_STATE));
    for (int i = 8; i >= 6; i--) { /* none is forgotten */
        struct ibv_wc wc = next_completion(bench.peer_cq);

        CHECK(wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == (uint64_t)i);
    }
    close_bench(&bench);
}

static void newest_first_shared(void)
{
    struct bench bench;
    struct ibv_srq *srq;
    struct ibv_srq_attr attr = {.max_wr = 32};

    open_bench(&bench, NULL);
    srq = create_srq(bench.pd, 8, 1);
    CHECK(!ibv_destroy_qp(bench.b));
    bench.b = create_qp(&bench, bench.peer_cq, srq, IBV_QPT_RC);
    reconnect(&bench);
    expect_newest(&bench, srq);
    CHECK(!ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR));
    for (uint64_t i = 8; i >= 6; i--)
        CHECK(taken_by_message(&bench) == i);
    CHECK(!ibv_destroy_qp(bench.b) && !ibv_destroy_srq(srq));
    bench.b = create_qp(&bench, bench.peer_cq, NULL, IBV_QPT_RC);
    close_bench(&bench);
}

int main(void)
{
    cq_attributes();
    cq_resize();
    cq_overrun();
    cq_extended();
    cq_that_may_overrun();
    channel_events();
    channel_without_waiting();
    channel_forgets();
    channel_threads();
    channel_followers();
    channel_cancelled();
    watched_channel();
    watched_and_polled();
    watched_in_vain();
    srq_attributes();
    srq_limit();
    srq_limit_on_empty();
    newest_first();
    newest_first_shared();
    if (failures)
        fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
