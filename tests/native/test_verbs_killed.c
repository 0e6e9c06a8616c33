/* Peers in processes of their own that are killed at random moments, in the middle of whatever they do to us and we to
 * them. The survivor sees silence, which is RETRY_EXC_ERR after the configured time; its memory is what it was, or what
 * the peer had the right to write; its other connection goes on all the time, nothing is left of the dead, and it goes
 * on with the next one. The first argument is the seed. */
#define _GNU_SOURCE
#include "verbs_objects.h"

#include <dirent.h>
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
    STEADY_TIMEOUT = 18, /* 1 s */
};

struct end {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_mr *mr;
    struct ibv_cq *cq;
    bool slab;       /* memory that peers can map */
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
    end->slab = getenv("KILLED_SLAB");
    end->memory = end->slab ? usroce_alloc(size) : aligned_alloc(PAGE, size);
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
    if (end->slab)
        CHECK(!usroce_free(end->memory));
    else
        free(end->memory);
}

static struct ibv_qp *new_qp(const struct end *end, struct ibv_cq *cq)
{
    struct ibv_qp_init_attr init = {
        .send_cq = cq,
        .recv_cq = cq,
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

/* `steady`: nobody is to be given up because the machine is busy. */
static void connect_to(struct ibv_qp *qp, const struct card *peer, bool steady)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_4096,
        .dest_qp_num = peer->qp_num,
        .max_dest_rd_atomic = 4,
        .min_rnr_timer = 1,
        .ah_attr = {.is_global = 1, .port_num = 1, .dlid = peer->lid, .grh = {.hop_limit = 64, .dgid = peer->gid}},
        .timeout = steady ? STEADY_TIMEOUT : TIMEOUT,
        .retry_cnt = steady ? 7 : 2,
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

/* The peer: until it is killed. A steady one only serves us. */
static void be_peer(int in, int out, bool steady)
{
    struct end end;
    struct ibv_qp *qp;
    struct card mine, theirs;
    int posted = 0;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    open_end(&end);
    memset(private_of(&end), PEER_WRITES, SHARED);
    qp = new_qp(&end, end.cq);
    mine = card_of(&end, qp);
    REQUIRE(write(out, &mine, sizeof(mine)) == (ssize_t)sizeof(mine));
    REQUIRE(read(in, &theirs, sizeof(theirs)) == (ssize_t)sizeof(theirs));
    connect_to(qp, &theirs, steady);
    REQUIRE(write(out, "", 1) == 1);
    if (!steady)
        work(&end, qp, &theirs, &posted, UINT64_MAX);
    for (;;)
        pause();
}

struct peer {
    pid_t pid;
    int to, from; /* pipes */
    struct card card;
    struct ibv_qp *qp; /* ours */
};

/* A program of its own: a forked child of a process with threads may do little but this. */
static void start_peer(const int to[2], const int from[2], bool steady)
{
    char in[16], out[16];

    snprintf(in, sizeof(in), "%d", to[0]);
    snprintf(out, sizeof(out), "%d", from[1]);
    if (!fcntl(to[0], F_SETFD, 0) && !fcntl(from[1], F_SETFD, 0))
        execl("/proc/self/exe", steady ? "steady" : "peer", "peer", in, out, (char *)NULL);
    _exit(1);
}

/* Starts a peer and connects to it. Should it die before that, reading from it fails. */
static void meet(const struct end *end, struct ibv_cq *cq, struct peer *peer, bool steady)
{
    struct card mine;
    int to[2], from[2];
    char byte;

    peer->qp = new_qp(end, cq);
    mine = card_of(end, peer->qp);
    REQUIRE(!pipe2(to, O_CLOEXEC) && !pipe2(from, O_CLOEXEC));
    peer->pid = fork();
    if (peer->pid == 0)
        start_peer(to, from, steady);
    REQUIRE(peer->pid > 0);
    close(to[0]);
    close(from[1]);
    peer->to = to[1];
    peer->from = from[0];
    REQUIRE(read(peer->from, &peer->card, sizeof(peer->card)) == (ssize_t)sizeof(peer->card));
    REQUIRE(write(peer->to, &mine, sizeof(mine)) == (ssize_t)sizeof(mine));
    connect_to(peer->qp, &peer->card, steady);
    REQUIRE(read(peer->from, &byte, 1) == 1);
}

static void kill_peer(const struct peer *peer)
{
    kill(peer->pid, SIGKILL);
    REQUIRE(waitpid(peer->pid, NULL, 0) == peer->pid);
}

static void forget_peer(const struct peer *peer)
{
    CHECK(!ibv_destroy_qp(peer->qp));
    close(peer->to);
    close(peer->from);
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

/* The connection that nobody kills works. */
static void check_steady(const struct end *end, struct ibv_cq *cq, const struct peer *steady)
{
    struct ibv_sge sge = {.addr = (uintptr_t)private_of(end), .length = 8, .lkey = end->mr->lkey};
    struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE, .sg_list = &sge, .num_sge = 1};

    wr.wr.rdma.remote_addr = steady->card.addr;
    wr.wr.rdma.rkey = steady->card.rkey;
    REQUIRE(!post(steady->qp, &wr));
    CHECK(next_completion(cq).status == IBV_WC_SUCCESS);
}

static void round_with(const struct end *end, struct ibv_cq *steady_cq, const struct peer *steady)
{
    enum ibv_wc_status status;
    struct peer peer;
    int posted = 0;

    meet(end, end->cq, &peer, false);
    status = work(end, peer.qp, &peer.card, &posted, in_microseconds((uint64_t)random() % 5000));
    CHECK(status == IBV_WC_SUCCESS);
    kill_peer(&peer);
    check_steady(end, steady_cq, steady);
    if (status == IBV_WC_SUCCESS)
        status = work(end, peer.qp, &peer.card, &posted, in_microseconds(PATIENCE * 1000000));
    CHECK(status == IBV_WC_RETRY_EXC_ERR);
    check_steady(end, steady_cq, steady);
    check_memory(end);
    forget_peer(&peer);
}

static int descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    REQUIRE(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

/* Pieces of memory that are shared with a peer. */
static int mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];
    int count = 0;

    REQUIRE(maps);
    while (fgets(line, sizeof(line), maps))
        count += strstr(line, "memfd:usroce") != NULL;
    fclose(maps);
    return count;
}

/* Of the dead nothing is left, once the device has looked. */
static void check_no_leak(const struct end *end, struct ibv_cq *cq, const struct peer *steady, int fds, int maps)
{
    time_t deadline = now() + PATIENCE;

    while ((descriptors() != fds || mappings() != maps) && now() < deadline)
        check_steady(end, cq, steady);
    CHECK(descriptors() == fds && mappings() == maps);
}

/* `shm`: what the device is to have of it. */
static void killed(const char *shm, int rounds)
{
    struct usroce_counters counters;
    struct ibv_cq *steady_cq;
    struct peer steady;
    struct end end;
    int fds, maps;

    setenv("AIORDMA_USROCE_SHM", shm, 1); /* of the peers too */
    open_end(&end);
    steady_cq = ibv_create_cq(end.context, 10, NULL, NULL, 0);
    REQUIRE(steady_cq);
    meet(&end, steady_cq, &steady, true);
    for (int i = 0; i < 100; i++) /* until both ways are what they will be */
        check_steady(&end, steady_cq, &steady);
    fds = descriptors();
    maps = mappings();
    for (int i = 0; i < rounds; i++)
        round_with(&end, steady_cq, &steady);
    check_no_leak(&end, steady_cq, &steady, fds, maps);
    REQUIRE(!usroce_query_counters(end.context, &counters, sizeof(counters)));
    if (shm[0] == '0') {
        CHECK(!counters.shm_sent && !counters.shm_received);
    } else {
        CHECK(counters.shm_sent > ROUNDS && counters.shm_received > ROUNDS);
        CHECK(!counters.shm_refused && counters.shm_peers == 1 && maps > 0);
    }
    kill_peer(&steady);
    forget_peer(&steady);
    CHECK(!ibv_destroy_cq(steady_cq));
    close_end(&end);
}

int main(int argc, char **argv)
{
    if (argc == 4) {
        srandom((unsigned int)getpid());
        be_peer(atoi(argv[2]), atoi(argv[3]), !strcmp(argv[0], "steady"));
    }
    srandom(argc > 1 ? (unsigned int)atoi(argv[1]) : 1);
    killed("1", ROUNDS / 2);
    setenv("KILLED_SLAB", "", 1); /* of the peers too */
    killed("1", ROUNDS / 2);
    unsetenv("KILLED_SLAB");
    killed("0", 5);
    return failures ? 1 : 0;
}
