/* What the tests of the device as a verbs library share: through the public functions only, and over the loopback
 * interface where packets are needed. Built with sanitizers by `make sanitize`: no leak on any path. For one file
 * that is a test. */
#ifndef TEST_VERBS_OBJECTS_H
#define TEST_VERBS_OBJECTS_H

#include <infiniband/verbs.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "usroce_api.h"

enum {
    PAGE = 4096,
    ALL_RIGHTS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE |
                 IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND,
    PATIENCE = 20, /* seconds */
    FIRST_PSN = 0xffffe0, /* so that it starts again at 0 in every test */
};

static int failures;

#define CHECK(holds) check_at(__LINE__, holds, #holds)

static inline bool check_at(int line, bool holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "line %d: not so: %s\n", line, what);
        failures++;
    }
    return holds;
}

/* Nothing that follows would make sense without it. */
#define REQUIRE(holds)                                                                                            \
    do                                                                                                            \
        if (!CHECK(holds))                                                                                        \
            exit(1);                                                                                              \
    while (0)

static uint8_t memory[8 * PAGE] __attribute__((aligned(PAGE)));

/* --- a connection to itself ---------------------------------------------------------------------------------- */

/* One device with two connected queue pairs; `a` sends and `b` receives, unless a test does otherwise. */
struct bench {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_mr *mr;
    struct ibv_cq *cq, *peer_cq;
    struct ibv_qp *a, *b;
};

static inline struct ibv_context *open_device(void)
{
    struct ibv_device **list = ibv_get_device_list(NULL);
    struct ibv_context *context;

    REQUIRE(list && list[0]);
    context = ibv_open_device(list[0]);
    ibv_free_device_list(list); /* the device outlives its list */
    REQUIRE(context);
    return context;
}

static inline struct ibv_qp *create_qp(struct bench *bench, struct ibv_cq *cq, struct ibv_srq *srq,
                                       enum ibv_qp_type type)
{
    struct ibv_qp_init_attr init = {
        .send_cq = cq,
        .recv_cq = cq,
        .srq = srq,
        .cap = {.max_send_wr = 64, .max_recv_wr = 64, .max_send_sge = 2, .max_recv_sge = 2},
        .qp_type = type,
    };
    struct ibv_qp *qp = ibv_create_qp(bench->pd, &init);

    REQUIRE(qp);
    return qp;
}

static inline void to_init(struct ibv_qp *qp)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = 1,
        .qp_access_flags = ALL_RIGHTS & ~IBV_ACCESS_MW_BIND,
    };

    REQUIRE(!ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
}

static inline void to_rtr(struct ibv_qp *qp, const struct ibv_qp *peer)
{
    struct ibv_port_attr port;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_1024,
        .dest_qp_num = peer->qp_num,
        .rq_psn = FIRST_PSN,
        .max_dest_rd_atomic = 4,
        .min_rnr_timer = 1,
        .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 64}},
    };

    REQUIRE(!ibv_query_port(qp->context, 1, &port));
    REQUIRE(!ibv_query_gid(qp->context, 1, 0, &attr.ah_attr.grh.dgid));
    attr.ah_attr.dlid = port.lid;
    REQUIRE(!ibv_modify_qp(qp, &attr,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
}

static inline void to_rts(struct ibv_qp *qp)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTS, .sq_psn = FIRST_PSN, .timeout = 17, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 4};

    REQUIRE(!ibv_modify_qp(qp, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                               IBV_QP_MAX_QP_RD_ATOMIC));
}

static inline void connect_pair(struct ibv_qp *a, struct ibv_qp *b)
{
    to_init(a);
    to_init(b);
    to_rtr(a, b);
    to_rtr(b, a);
    to_rts(a);
    to_rts(b);
}

static inline void reconnect(struct bench *bench)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};

    REQUIRE(!ibv_modify_qp(bench->a, &attr, IBV_QP_STATE));
    REQUIRE(!ibv_modify_qp(bench->b, &attr, IBV_QP_STATE));
    connect_pair(bench->a, bench->b);
}

static inline void open_bench(struct bench *bench, struct ibv_comp_channel *(*channel)(struct ibv_context *))
{
    memset(bench, 0, sizeof(*bench));
    memset(memory, 0, sizeof(memory));
    bench->context = open_device();
    bench->pd = ibv_alloc_pd(bench->context);
    REQUIRE(bench->pd);
    bench->mr = ibv_reg_mr(bench->pd, memory, sizeof(memory), ALL_RIGHTS);
    REQUIRE(bench->mr);
    bench->cq = ibv_create_cq(bench->context, 100, bench, channel ? channel(bench->context) : NULL, 0);
    bench->peer_cq = ibv_create_cq(bench->context, 100, NULL, NULL, 0);
    REQUIRE(bench->cq && bench->peer_cq);
    bench->a = create_qp(bench, bench->cq, NULL, IBV_QPT_RC);
    bench->b = create_qp(bench, bench->peer_cq, NULL, IBV_QPT_RC);
    connect_pair(bench->a, bench->b);
}

static inline void ack_everything(struct ibv_context *context);

/* All but the device. */
static inline void destroy_bench(struct bench *bench)
{
    struct ibv_comp_channel *channel = bench->cq->channel;

    CHECK(!ibv_destroy_qp(bench->a));
    CHECK(!ibv_destroy_qp(bench->b));
    CHECK(!ibv_destroy_cq(bench->cq));
    CHECK(!ibv_destroy_cq(bench->peer_cq));
    if (channel)
        CHECK(!ibv_destroy_comp_channel(channel));
    CHECK(!ibv_dereg_mr(bench->mr));
    CHECK(!ibv_dealloc_pd(bench->pd));
}

static inline void close_bench(struct bench *bench)
{
    ack_everything(bench->context);
    destroy_bench(bench);
    CHECK(!ibv_close_device(bench->context));
}

static inline time_t now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec;
}

/* The next completion; a status that no completion has if none comes. */
static inline struct ibv_wc next_completion(struct ibv_cq *cq)
{
    time_t deadline = now() + PATIENCE;
    struct ibv_wc wc;
    int got;

    do
        got = ibv_poll_cq(cq, 1, &wc);
    while (!got && now() < deadline);
    if (got != 1) {
        memset(&wc, 0, sizeof(wc));
        wc.status = (enum ibv_wc_status)99;
    }
    return wc;
}

static inline int post(struct ibv_qp *qp, struct ibv_send_wr *wr)
{
    struct ibv_send_wr *bad = NULL;

    wr->send_flags |= IBV_SEND_SIGNALED;
    return ibv_post_send(qp, wr, &bad);
}

/* Posts one request and returns how it ended. */
static inline enum ibv_wc_status run(struct bench *bench, struct ibv_send_wr *wr)
{
    REQUIRE(!post(bench->a, wr));
    return next_completion(bench->cq).status;
}

/* Writes 8 bytes to `addr` with `rkey`. */
static inline enum ibv_wc_status write_to(struct bench *bench, uint64_t addr, uint32_t rkey)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = 8, .lkey = bench->mr->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1};

    wr.wr.rdma.remote_addr = addr;
    wr.wr.rdma.rkey = rkey;
    return run(bench, &wr);
}

static inline void post_receive(struct bench *bench, struct ibv_qp *qp)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory + PAGE, .length = PAGE, .lkey = bench->mr->lkey};
    struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    REQUIRE(!ibv_post_recv(qp, &wr, &bad));
}

static inline void send_to_peer(struct bench *bench, struct ibv_qp *from, unsigned int flags)
{
    struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = 8, .lkey = bench->mr->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1, .send_flags = flags}, *bad;

    REQUIRE(!ibv_post_send(from, &wr, &bad));
}

/* --- events -------------------------------------------------------------------------------------------------- */

static inline bool is_readable(int fd)
{
    struct pollfd pfd = {.fd = fd, .events = POLLIN};

    return poll(&pfd, 1, 0) == 1;
}

static inline void make_nonblocking(int fd)
{
    REQUIRE(!fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK));
}

static inline void ack_everything(struct ibv_context *context)
{
    struct ibv_async_event event;

    while (is_readable(context->async_fd)) {
        REQUIRE(!ibv_get_async_event(context, &event));
        ibv_ack_async_event(&event);
    }
}

/* Takes events until one of that type is there, and returns it unacknowledged. False: none came. */
static inline bool find_event(struct ibv_context *context, enum ibv_event_type type, struct ibv_async_event *event)
{
    struct pollfd pfd = {.fd = context->async_fd, .events = POLLIN};

    while (poll(&pfd, 1, PATIENCE * 1000) == 1) {
        REQUIRE(!ibv_get_async_event(context, event));
        if (event->event_type == type)
            return true;
        ibv_ack_async_event(event);
    }
    return false;
}

/* --- children ------------------------------------------------------------------------------------------------ */

/* Runs a function in a child; its standard error comes back as text. True: it found nothing wrong. */
static inline bool in_child(void (*function)(void), char *text, size_t size)
{
    int pipes[2], status;
    size_t filled = 0;
    ssize_t got;
    pid_t child;

    REQUIRE(!pipe(pipes));
    child = fork();
    REQUIRE(child >= 0);
    if (!child) {
        failures = 0;
        dup2(pipes[1], 2);
        close(pipes[0]);
        close(pipes[1]);
        function();
        _exit(failures ? 1 : 0);
    }
    close(pipes[1]);
    while (filled < size - 1 && (got = read(pipes[0], text + filled, size - 1 - filled)) > 0)
        filled += (size_t)got;
    text[filled] = '\0';
    close(pipes[0]);
    REQUIRE(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) && !WEXITSTATUS(status);
}

#endif
