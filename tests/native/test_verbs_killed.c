/* Peers in processes of their own that are killed at random moments, in the middle of whatever they do to us and we to
 * them. The survivor sees silence, which is RETRY_EXC_ERR after the configured time; its memory is what it was, or what
 * the peer had the right to write; and it goes on with the next one. */
#define _GNU_SOURCE
#include "verbs_objects.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

enum {
    ROUNDS = 60,
    SHARED = 4 * PAGE,   /* bytes that the peer may write and read */
    GUARD = 0xa5,
    PEER_WRITES = 0x11,  /* what it writes, everywhere */
    COUNTER = SHARED - 8, /* it adds to it, and writes before it only */
    DEPTH = 16,
    TIMEOUT = 12,        /* 17 ms */
};

struct end {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_mr *mr;
    struct ibv_cq *cq;
    uint8_t *memory; /* guard, shared, guard, private, guard: PAGE, SHARED, PAGE, SHARED, PAGE */
};

struct card {
    union ibv_gid gid;
    uint64_t addr;
    uint32_t rkey, qp_num;
    uint16_t lid;
};

static uint8_t *shared_of(const struct end *end)
{
    return end->memory + PAGE;
}

static uint8_t *private_of(const struct end *end)
{
    return end->memory + PAGE + SHARED + PAGE;
}

static void open_end(struct end *end)
{
    size_t size = 3 * PAGE + 2 * SHARED;

    end->context = open_device();
    end->memory = aligned_alloc(PAGE, size);
    REQUIRE(end->memory);
    memset(end->memory, GUARD, size);
    end->pd = ibv_alloc_pd(end->context);
    REQUIRE(end->pd);
    end->mr = ibv_reg_mr(end->pd, end->memory, size, ALL_RIGHTS);
    end->cq = ibv_create_cq(end->context, 100, NULL, NULL, 0);
    REQUIRE(end->mr && end->cq);
}

static void close_end(struct end *end)
{
    CHECK(!ibv_destroy_cq(end->cq));
    CHECK(!ibv_dereg_mr(end->mr));
    CHECK(!ibv_dealloc_pd(end->pd));
    CHECK(!ibv_close_device(end->context));
    free(end->memory);
}

static struct ibv_qp *new_qp(const struct end *end)
{
    struct ibv_qp_init_attr init = {
        .send_cq = end->cq,
        .recv_cq = end->cq,
        .cap = {.max_send_wr = 2 * DEPTH, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
        .qp_type = IBV_QPT_RC,
        .sq_sig_all = 1,
    };
    struct ibv_qp *qp = ibv_create_qp(end->pd, &init);

    REQUIRE(qp);
    to_init(qp);
    return qp;
}

static struct card card_of(const struct end *end, const struct ibv_qp *qp)
{
    struct card card = {.addr = (uintptr_t)shared_of(end), .rkey = end->mr->rkey, .qp_num = qp->qp_num};
    struct ibv_port_attr port;

    REQUIRE(!ibv_query_port(end->context, 1, &port) && !ibv_query_gid(end->context, 1, 0, &card.gid));
    card.lid = port.lid;
    return card;
}

static void connect_to(struct ibv_qp *qp, const struct card *peer)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_4096,
        .dest_qp_num = peer->qp_num,
        .max_dest_rd_atomic = 4,
        .min_rnr_timer = 1,
        .ah_attr = {.is_global = 1, .port_num = 1, .dlid = peer->lid, .grh = {.hop_limit = 64, .dgid = peer->gid}},
        .timeout = TIMEOUT,
        .retry_cnt = 2,
        .max_rd_atomic = 4,
    };

    REQUIRE(!ibv_modify_qp(qp, &attr,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
    attr.qp_state = IBV_QPS_RTS;
    REQUIRE(!ibv_modify_qp(qp, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                               IBV_QP_MAX_QP_RD_ATOMIC));
}

/* Writes, reads and adds, of all sizes, from and to private memory. */
static void post_something(const struct end *end, struct ibv_qp *qp, const struct card *peer)
{
    uint32_t length = (uint32_t)random() % (SHARED - 8) + 1;
    struct ibv_sge sge = {.addr = (uintptr_t)private_of(end), .length = length, .lkey = end->mr->lkey};
    struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    wr.wr.rdma.remote_addr = peer->addr;
    wr.wr.rdma.rkey = peer->rkey;
    switch (random() % 4) {
    case 0:
        wr.opcode = IBV_WR_RDMA_READ;
        sge.addr += PAGE; /* what is written from stays as it is */
        sge.length = length % PAGE;
        break;
    case 1:
        wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
        wr.wr.atomic.remote_addr = peer->addr + COUNTER;
        wr.wr.atomic.compare_add = 1;
        wr.wr.atomic.rkey = peer->rkey;
        sge.addr += SHARED - 8;
        sge.length = 8;
        break;
    default:
        wr.opcode = IBV_WR_RDMA_WRITE;
        sge.length = length % PAGE + 1;
        wr.wr.rdma.remote_addr += length % (SHARED - 8 - sge.length);
        break;
    }
    REQUIRE(!ibv_post_send(qp, &wr, &bad));
}

/* Keeps DEPTH operations under way (so many are, in *posted) until one fails, or `until`. Its status. */
static enum ibv_wc_status work(const struct end *end, struct ibv_qp *qp, const struct card *peer, int *posted,
                               uint64_t until)
{
    struct timespec ts;
    struct ibv_wc wc;

    do {
        for (; *posted < DEPTH; (*posted)++)
            post_something(end, qp, peer);
        while (ibv_poll_cq(end->cq, 1, &wc) == 1) {
            (*posted)--;
            if (wc.status != IBV_WC_SUCCESS)
                return wc.status;
        }
        clock_gettime(CLOCK_MONOTONIC, &ts);
    } while ((uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000 < until);
    return IBV_WC_SUCCESS;
}

/* The peer: until it is killed. */
static void be_peer(int in, int out)
{
    struct end end;
    struct ibv_qp *qp;
    struct card mine, theirs;
    int posted = 0;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    open_end(&end);
    memset(private_of(&end), PEER_WRITES, SHARED);
    qp = new_qp(&end);
    mine = card_of(&end, qp);
    REQUIRE(write(out, &mine, sizeof(mine)) == (ssize_t)sizeof(mine));
    REQUIRE(read(in, &theirs, sizeof(theirs)) == (ssize_t)sizeof(theirs));
    connect_to(qp, &theirs);
    REQUIRE(write(out, "", 1) == 1);
    work(&end, qp, &theirs, &posted, UINT64_MAX);
    for (;;)
        pause();
}

/* A program of its own: a forked child of a process with threads may do little but this. */
static void start_peer(int in, int out)
{
    char in_text[16], out_text[16];

    snprintf(in_text, sizeof(in_text), "%d", in);
    snprintf(out_text, sizeof(out_text), "%d", out);
    execl("/proc/self/exe", "peer", in_text, out_text, (char *)NULL);
    _exit(1);
}

static bool is_all(const uint8_t *at, size_t size, uint8_t a, uint8_t b)
{
    for (size_t i = 0; i < size; i++)
        if (at[i] != a && at[i] != b)
            return false;
    return true;
}

static void check_memory(const struct end *end)
{
    CHECK(is_all(end->memory, PAGE, GUARD, GUARD));
    CHECK(is_all(shared_of(end), SHARED - 8, GUARD, PEER_WRITES));
    CHECK(is_all(shared_of(end) + SHARED, PAGE, GUARD, GUARD));
    CHECK(is_all(private_of(end), PAGE, GUARD, GUARD)); /* what we write from */
    CHECK(is_all(private_of(end) + SHARED, PAGE, GUARD, GUARD));
}

static uint64_t in_microseconds(uint64_t more)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000 + more;
}

static void round_with(struct end *end)
{
    struct ibv_qp *qp = new_qp(end);
    struct card mine = card_of(end, qp), theirs;
    enum ibv_wc_status status;
    int to[2], from[2], posted = 0;
    pid_t pid;
    char byte;

    REQUIRE(!pipe(to) && !pipe(from));
    pid = fork();
    if (pid == 0)
        start_peer(to[0], from[1]);
    REQUIRE(pid > 0);
    REQUIRE(read(from[0], &theirs, sizeof(theirs)) == (ssize_t)sizeof(theirs));
    REQUIRE(write(to[1], &mine, sizeof(mine)) == (ssize_t)sizeof(mine));
    connect_to(qp, &theirs);
    REQUIRE(read(from[0], &byte, 1) == 1);
    status = work(end, qp, &theirs, &posted, in_microseconds((uint64_t)random() % 5000));
    CHECK(status == IBV_WC_SUCCESS);
    kill(pid, SIGKILL);
    REQUIRE(waitpid(pid, NULL, 0) == pid);
    if (status == IBV_WC_SUCCESS)
        status = work(end, qp, &theirs, &posted, in_microseconds(PATIENCE * 1000000));
    CHECK(status == IBV_WC_RETRY_EXC_ERR);
    check_memory(end);
    CHECK(!ibv_destroy_qp(qp));
    for (int i = 0; i < 2; i++) {
        close(to[i]);
        close(from[i]);
    }
}

/* `shm`: what the device is to have of it. */
static void killed(const char *shm, int rounds)
{
    struct usroce_counters counters;
    struct end end;

    setenv("AIORDMA_USROCE_SHM", shm, 1); /* of the peers too */
    open_end(&end);
    for (int i = 0; i < rounds; i++)
        round_with(&end);
    REQUIRE(!usroce_query_counters(end.context, &counters, sizeof(counters)));
    if (shm[0] == '0')
        CHECK(!counters.shm_sent && !counters.shm_received);
    else
        CHECK(counters.shm_sent > ROUNDS && counters.shm_received > ROUNDS);
    close_end(&end);
}

int main(int argc, char **argv)
{
    if (argc == 3) {
        srandom((unsigned int)getpid());
        be_peer(atoi(argv[1]), atoi(argv[2]));
    }
    srandom(1);
    killed("1", ROUNDS);
    killed("0", 5);
    return failures ? 1 : 0;
}
