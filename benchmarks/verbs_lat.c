/* What one awaited operation costs without Python: the C row of benchmarks/core.py.
 *
 * A client times, one at a time, what `await conn.write`, `await conn.read` and an echo do on the wire: post
 * one signaled work request (inline where aiordma would), wait for its completion. Unlike perftest's
 * ib_write_lat, which waits for the peer's answering write and halves the round trip, the end of a write is its
 * local completion. Waiting is done twice: polling without pause, and blocking in ibv_get_cq_event with the
 * queue armed beforehand.
 *
 *     verbs_lat DEVICE GID_INDEX SIZE ITERATIONS                   server; prints its TCP port
 *     verbs_lat DEVICE GID_INDEX SIZE ITERATIONS HOST PORT         client; prints a line for each operation:
 *                                                                  operation, wait, minimum, median, p99 (ns)
 */
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORT_NUM 1
#define RECEIVES 16
#define INLINE 220
#define DEADLINE_S 120
#define PAGE 4096UL
enum { SEND_ID = 1, RECV_ID = 2 };

struct endpoint {
    uint64_t addr;
    uint32_t rkey;
    uint32_t qpn;
    uint32_t psn;
    uint32_t lid;
    union ibv_gid gid;
};

/* The buffer has three parts of `area` bytes: what is sent (or read into), what arrives, what the peer may touch. */
struct lab {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    struct ibv_port_attr port;
    struct endpoint local, remote;
    char *buffer;
    size_t area;
    uint32_t size;
    uint32_t max_inline;
    int gid_index;
    int sock;
    int events;       /* wait by blocking, not by polling */
    unsigned unacked; /* events read and not yet acknowledged */
    unsigned long sent, received;
};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void require(int ok, const char *what)
{
    if (!ok)
        fail(what);
}

/* --- setting up ------------------------------------------------------------------------------------- */

static struct ibv_context *open_device(const char *name)
{
    struct ibv_context *context = NULL;
    struct ibv_device **list = ibv_get_device_list(NULL);

    for (struct ibv_device **device = list; device && *device; device++)
        if (!strcmp(ibv_get_device_name(*device), name))
            context = ibv_open_device(*device);
    if (list)
        ibv_free_device_list(list);
    return context;
}

static void make_queues(struct lab *lab)
{
    struct ibv_qp_init_attr attr = {
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = 16, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1},
    };
    uint32_t wanted = INLINE;

    require((lab->channel = ibv_create_comp_channel(lab->context)) != NULL, "ibv_create_comp_channel");
    lab->cq = ibv_create_cq(lab->context, 2 * RECEIVES + 16, NULL, lab->channel, 0);
    require(lab->cq != NULL, "ibv_create_cq");
    attr.send_cq = attr.recv_cq = lab->cq;
    for (;; wanted /= 2) {
        attr.cap.max_inline_data = wanted;
        lab->qp = ibv_create_qp(lab->pd, &attr);
        if (lab->qp || !wanted)
            break;
    }
    require(lab->qp != NULL, "ibv_create_qp");
    lab->max_inline = attr.cap.max_inline_data;
}

static void make_memory(struct lab *lab)
{
    lab->area = (lab->size + PAGE - 1) / PAGE * PAGE;
    lab->buffer = aligned_alloc(PAGE, 3 * lab->area);
    require(lab->buffer != NULL, "aligned_alloc");
    memset(lab->buffer, 0x7b, 3 * lab->area);
    lab->mr = ibv_reg_mr(lab->pd, lab->buffer, 3 * lab->area,
                         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    require(lab->mr != NULL, "ibv_reg_mr");
}

static void make_lab(struct lab *lab, const char *device)
{
    require((lab->context = open_device(device)) != NULL, device);
    require((lab->pd = ibv_alloc_pd(lab->context)) != NULL, "ibv_alloc_pd");
    require(ibv_query_port(lab->context, PORT_NUM, &lab->port) == 0, "ibv_query_port");
    make_memory(lab);
    make_queues(lab);
    srand((unsigned)getpid());
    lab->local = (struct endpoint){
        .addr = (uintptr_t)(lab->buffer + 2 * lab->area),
        .rkey = lab->mr->rkey,
        .qpn = lab->qp->qp_num,
        .psn = (uint32_t)rand() & 0xffffff,
        .lid = lab->port.lid,
    };
    require(ibv_query_gid(lab->context, PORT_NUM, lab->gid_index, &lab->local.gid) == 0, "ibv_query_gid");
}

static void close_lab(struct lab *lab)
{
    ibv_destroy_qp(lab->qp);
    ibv_ack_cq_events(lab->cq, lab->unacked);
    ibv_destroy_cq(lab->cq);
    ibv_destroy_comp_channel(lab->channel);
    ibv_dereg_mr(lab->mr);
    ibv_dealloc_pd(lab->pd);
    ibv_close_device(lab->context);
    free(lab->buffer);
}

static void connect_qp(struct lab *lab)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = PORT_NUM,
        .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
    };
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;

    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to INIT");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = lab->port.active_mtu,
        .dest_qp_num = lab->remote.qpn,
        .rq_psn = lab->remote.psn,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1,
                    .port_num = PORT_NUM,
                    .dlid = (uint16_t)lab->remote.lid,
                    .grh = {.dgid = lab->remote.gid, .sgid_index = (uint8_t)lab->gid_index, .hop_limit = 64}},
    };
    mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to RTR");
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS,
        .sq_psn = lab->local.psn,
        .timeout = 16,
        .retry_cnt = 6,
        .rnr_retry = 6,
        .max_rd_atomic = 1,
    };
    mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
           IBV_QP_MAX_QP_RD_ATOMIC;
    require(ibv_modify_qp(lab->qp, &attr, mask) == 0, "to RTS");
}

/* --- TCP -------------------------------------------------------------------------------------------- */

static int accept_one(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), sock;

    require(listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0, "bind");
    require(listen(listener, 1) == 0, "listen");
    require(getsockname(listener, (struct sockaddr *)&address, &length) == 0, "getsockname");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    require((sock = accept(listener, NULL, NULL)) >= 0, "accept");
    close(listener);
    return sock;
}

static int connect_to(const char *host, const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    int sock = socket(AF_INET, SOCK_STREAM, 0);

    require(inet_pton(AF_INET, host, &address.sin_addr) == 1, host);
    require(connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0, "connect");
    return sock;
}

static void exchange(int sock, const void *out, void *in, size_t length)
{
    require(write(sock, out, length) == (ssize_t)length, "write to peer");
    require(recv(sock, in, length, MSG_WAITALL) == (ssize_t)length, "read from peer");
}

static void barrier(const struct lab *lab)
{
    char token = 0;

    exchange(lab->sock, &token, &token, 1);
}

/* --- posting and waiting ---------------------------------------------------------------------------- */

static void post_receive(struct lab *lab)
{
    struct ibv_sge sge = {(uintptr_t)(lab->buffer + lab->area), lab->size, lab->mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = RECV_ID, .sg_list = &sge, .num_sge = 1}, *bad;

    require(ibv_post_recv(lab->qp, &wr, &bad) == 0, "ibv_post_recv");
}

static void post(struct lab *lab, enum ibv_wr_opcode opcode)
{
    struct ibv_sge sge = {(uintptr_t)lab->buffer, lab->size, lab->mr->lkey};
    struct ibv_send_wr wr = {.wr_id = SEND_ID, .sg_list = &sge, .num_sge = 1, .opcode = opcode}, *bad;

    wr.send_flags = IBV_SEND_SIGNALED;
    if (opcode != IBV_WR_RDMA_READ && lab->size <= lab->max_inline)
        wr.send_flags |= IBV_SEND_INLINE;
    wr.wr.rdma.remote_addr = lab->remote.addr;
    wr.wr.rdma.rkey = lab->remote.rkey;
    require(ibv_post_send(lab->qp, &wr, &bad) == 0, "ibv_post_send");
}

static void arm(struct lab *lab)
{
    require(ibv_req_notify_cq(lab->cq, 0) == 0, "ibv_req_notify_cq");
}

static void sleep_on_channel(struct lab *lab)
{
    struct ibv_cq *cq;
    void *cookie;

    require(ibv_get_cq_event(lab->channel, &cq, &cookie) == 0, "ibv_get_cq_event");
    if (++lab->unacked == 64) {
        ibv_ack_cq_events(lab->cq, lab->unacked);
        lab->unacked = 0;
    }
    arm(lab);
}

static void take_completions(struct lab *lab)
{
    struct ibv_wc wcs[8];
    int count;

    while ((count = ibv_poll_cq(lab->cq, 8, wcs)) > 0)
        for (int i = 0; i < count; i++) {
            if (wcs[i].status != IBV_WC_SUCCESS) {
                fprintf(stderr, "completion: %s\n", ibv_wc_status_str(wcs[i].status));
                exit(1);
            }
            if (wcs[i].wr_id == RECV_ID) {
                lab->received++;
                post_receive(lab);
            } else {
                lab->sent++;
            }
        }
    require(count == 0, "ibv_poll_cq");
}

static void wait_for(struct lab *lab, unsigned long sent, unsigned long received)
{
    while (lab->sent < sent || lab->received < received) {
        if (lab->events)
            sleep_on_channel(lab);
        take_completions(lab);
    }
}

/* --- the operations --------------------------------------------------------------------------------- */

static void one_sided(struct lab *lab, enum ibv_wr_opcode opcode)
{
    unsigned long sent = lab->sent;

    post(lab, opcode);
    wait_for(lab, sent + 1, 0);
}

static void do_write(struct lab *lab)
{
    one_sided(lab, IBV_WR_RDMA_WRITE);
}

static void do_read(struct lab *lab)
{
    one_sided(lab, IBV_WR_RDMA_READ);
}

static void do_echo(struct lab *lab)
{
    unsigned long sent = lab->sent, received = lab->received;

    post(lab, IBV_WR_SEND);
    wait_for(lab, sent + 1, received + 1);
}

static void answer(struct lab *lab, int count)
{
    unsigned long received = lab->received;

    while (count--) {
        wait_for(lab, 0, ++received);
        one_sided(lab, IBV_WR_SEND);
    }
}

static const struct operation {
    const char *name;
    void (*run)(struct lab *lab);
    int answered; /* the peer takes part */
} operations[] = {{"write", do_write, 0}, {"read", do_read, 0}, {"echo", do_echo, 1}};

static int compare(const void *a, const void *b)
{
    const int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;

    return (left > right) - (left < right);
}

static int64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void measure(struct lab *lab, const struct operation *operation, int warmup, int iterations)
{
    int64_t *samples = calloc((size_t)iterations, sizeof(*samples)), before, now;

    require(samples != NULL, "calloc");
    for (int i = 0; i < warmup; i++)
        operation->run(lab);
    before = now_ns();
    for (int i = 0; i < iterations; i++) {
        operation->run(lab);
        now = now_ns();
        samples[i] = now - before;
        before = now;
    }
    qsort(samples, (size_t)iterations, sizeof(*samples), compare);
    printf("%s %s %lld %lld %lld\n", operation->name, lab->events ? "event" : "polled", (long long)samples[0],
           (long long)samples[iterations / 2], (long long)samples[(int)(iterations * 0.99)]);
    fflush(stdout);
    free(samples);
}

static void run(struct lab *lab, int iterations, int client)
{
    const int warmup = iterations / 10 + 10;

    for (lab->events = 0; lab->events < 2; lab->events++) {
        if (lab->events)
            arm(lab);
        for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
            barrier(lab);
            if (client)
                measure(lab, &operations[i], warmup, iterations);
            else if (operations[i].answered)
                answer(lab, warmup + iterations);
        }
    }
    barrier(lab);
}

int main(int argc, char **argv)
{
    struct lab lab = {0};
    int iterations, on = 1;

    if (argc != 5 && argc != 7) {
        fprintf(stderr, "usage: verbs_lat DEVICE GID_INDEX SIZE ITERATIONS [HOST PORT]\n");
        return 2;
    }
    alarm(DEADLINE_S);
    lab.gid_index = atoi(argv[2]);
    lab.size = (uint32_t)atoi(argv[3]);
    iterations = atoi(argv[4]);
    make_lab(&lab, argv[1]);
    lab.sock = argc == 7 ? connect_to(argv[5], argv[6]) : accept_one();
    setsockopt(lab.sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    exchange(lab.sock, &lab.local, &lab.remote, sizeof(lab.local));
    connect_qp(&lab);
    for (int i = 0; i < RECEIVES; i++)
        post_receive(&lab);
    run(&lab, iterations, argc == 7);
    close(lab.sock);
    close_lab(&lab);
    return 0;
}
