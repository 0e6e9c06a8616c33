/* Two devices of one user on one host: what they do through the memory they share. */
#include "verbs_objects.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum {
    BURST = 6000,       /* datagrams, ... */
    BURST_BYTES = 4096, /* ... of so many bytes: several times what a ring holds */
    QKEY = 0x1234,
    GRH = 40,
    AREA = 1 << 20, /* bytes of each end, for one-sided operations */
    DEPTH = 64,
    REMOTE = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
};

/* A device with what one queue pair needs. */
struct end {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    uint8_t *data;
    size_t size;
    bool slab;
};

/* `slab`: memory that a peer can map. */
static void open_end(struct end *end, enum ibv_qp_type type, uint32_t depth, size_t size, bool slab)
{
    struct ibv_qp_init_attr init = {
        .cap = {.max_send_wr = depth, .max_recv_wr = depth, .max_send_sge = 1, .max_recv_sge = 1},
        .qp_type = type,
        .sq_sig_all = 1,
    };

    memset(end, 0, sizeof(*end));
    end->context = open_device();
    end->pd = ibv_alloc_pd(end->context);
    REQUIRE(end->pd);
    end->cq = ibv_create_cq(end->context, 2 * (int)depth, NULL, NULL, 0);
    REQUIRE(end->cq);
    init.send_cq = init.recv_cq = end->cq;
    end->qp = ibv_create_qp(end->pd, &init);
    end->size = size;
    end->slab = slab;
    end->data = slab ? usroce_alloc(size) : aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    REQUIRE(end->qp && end->data);
    memset(end->data, 0, size);
    end->mr = ibv_reg_mr(end->pd, end->data, size, ALL_RIGHTS);
    REQUIRE(end->mr);
}

static void close_end(struct end *end)
{
    ack_everything(end->context);
    CHECK(!ibv_destroy_qp(end->qp));
    CHECK(!ibv_destroy_cq(end->cq));
    CHECK(!ibv_dereg_mr(end->mr));
    CHECK(!ibv_dealloc_pd(end->pd));
    CHECK(!ibv_close_device(end->context));
    if (end->slab)
        CHECK(!usroce_free(end->data));
    else
        free(end->data);
}

static struct usroce_counters counters_of(const struct end *end)
{
    struct usroce_counters counters;

    REQUIRE(!usroce_query_counters(end->context, &counters, sizeof(counters)));
    return counters;
}

static struct ibv_ah_attr address_of(const struct end *end)
{
    struct ibv_ah_attr attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 64}};
    struct ibv_port_attr port;

    REQUIRE(!ibv_query_port(end->context, 1, &port));
    REQUIRE(!ibv_query_gid(end->context, 1, 0, &attr.grh.dgid));
    attr.dlid = port.lid;
    return attr;
}

/* Of the connections made last: what is left of one before must not look like a packet of the next. */
static uint32_t first_psn = FIRST_PSN;

static void connect_end(const struct end *end, const struct end *peer, enum ibv_qp_type type)
{
    bool reliable = type == IBV_QPT_RC;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_4096,
        .dest_qp_num = peer->qp->qp_num,
        .rq_psn = first_psn,
        .max_dest_rd_atomic = 16,
        .min_rnr_timer = 1,
        .ah_attr = address_of(peer),
    };

    REQUIRE(!ibv_modify_qp(end->qp, &attr,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               (reliable ? IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER : 0)));
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .sq_psn = first_psn, .timeout = 17, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 16};
    REQUIRE(!ibv_modify_qp(end->qp, &attr,
                           IBV_QP_STATE | IBV_QP_SQ_PSN |
                               (reliable ? IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                               IBV_QP_MAX_QP_RD_ATOMIC
                                         : 0)));
}

static void to_ready(const struct end *end)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY};

    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY));
    attr.qp_state = IBV_QPS_RTR;
    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE));
    attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS, .sq_psn = 1};
    REQUIRE(!ibv_modify_qp(end->qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

static void post_receive_of(const struct end *end, uint32_t length)
{
    struct ibv_sge sge = {.addr = (uintptr_t)end->data, .length = length, .lkey = end->mr->lkey};
    struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

    REQUIRE(!ibv_post_recv(end->qp, &wr, &bad));
}

/* Whether the way between the two is memory; polls both until it is. `ah` is NULL for connected ones. */
static bool share_memory(const struct end *a, const struct end *b)
{
    time_t deadline = now() + PATIENCE;
    struct ibv_wc wc;

    while (!counters_of(a).shm_peers && now() < deadline) {
        CHECK(!ibv_poll_cq(a->cq, 1, &wc));
        CHECK(!ibv_poll_cq(b->cq, 1, &wc));
    }
    return counters_of(a).shm_peers == 1;
}

/* A burst that is far more than a ring holds, all posted before anybody looks. */
static void burst(enum ibv_qp_type type)
{
    struct end a, b;
    struct ibv_ah *ah = NULL;
    int received = 0, sent = 0;
    time_t deadline = now() + PATIENCE;

    open_end(&a, type, BURST + 1, BURST_BYTES + GRH, false);
    open_end(&b, type, BURST + 1, BURST_BYTES + GRH, false);
    if (type == IBV_QPT_UD) {
        struct ibv_ah_attr attr = address_of(&b);

        to_ready(&a);
        to_ready(&b);
        ah = ibv_create_ah(a.pd, &attr);
        REQUIRE(ah);
    } else {
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
        const int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;

        REQUIRE(!ibv_modify_qp(a.qp, &attr, mask) && !ibv_modify_qp(b.qp, &attr, mask));
        connect_end(&a, &b, type);
        connect_end(&b, &a, type);
    }
    REQUIRE(share_memory(&a, &b));
    for (int i = 0; i < BURST; i++)
        post_receive_of(&b, BURST_BYTES + GRH);
    for (int i = 0; i < BURST; i++) {
        struct ibv_sge sge = {.addr = (uintptr_t)a.data, .length = BURST_BYTES, .lkey = a.mr->lkey};
        struct ibv_send_wr wr = {.opcode = IBV_WR_SEND, .sg_list = &sge, .num_sge = 1}, *bad;

        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = b.qp->qp_num;
        wr.wr.ud.remote_qkey = QKEY;
        REQUIRE(!ibv_post_send(a.qp, &wr, &bad));
    }
    while ((sent < BURST || received < BURST) && now() < deadline) {
        struct ibv_wc wc;

        sent += ibv_poll_cq(a.cq, 1, &wc) == 1 && wc.status == IBV_WC_SUCCESS;
        received += ibv_poll_cq(b.cq, 1, &wc) == 1 && wc.status == IBV_WC_SUCCESS;
    }
    CHECK(sent == BURST && received == BURST);
    CHECK(!counters_of(&a).send_errors && counters_of(&a).shm_sent >= BURST);
    if (ah)
        CHECK(!ibv_destroy_ah(ah));
    close_end(&a);
    close_end(&b);
}

/* --- one-sided operations ------------------------------------------------------------------------------------ */

static void connect_ends(struct end *a, struct end *b, int access_of_b)
{
    const int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};

    first_psn = (first_psn + (1 << 20)) & 0xffffff;
    REQUIRE(!ibv_modify_qp(a->qp, &attr, IBV_QP_STATE) && !ibv_modify_qp(b->qp, &attr, IBV_QP_STATE));
    attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = REMOTE};
    REQUIRE(!ibv_modify_qp(a->qp, &attr, mask));
    attr.qp_access_flags = (unsigned int)access_of_b;
    REQUIRE(!ibv_modify_qp(b->qp, &attr, mask));
    connect_end(a, b, IBV_QPT_RC);
    connect_end(b, a, IBV_QPT_RC);
}

static void open_pair_of(struct end *a, struct end *b, size_t size, bool slab)
{
    open_end(a, IBV_QPT_RC, DEPTH, size, slab);
    open_end(b, IBV_QPT_RC, DEPTH, size, slab);
    connect_ends(a, b, REMOTE);
    REQUIRE(share_memory(a, b));
}

static void open_pair(struct end *a, struct end *b, bool slab)
{
    open_pair_of(a, b, AREA, slab);
}

/* An operation on `length` bytes at `at`, the same place in both areas. */
static struct ibv_send_wr *request(struct ibv_send_wr *wr, struct ibv_sge *sge, const struct end *a,
                                   const struct end *b, enum ibv_wr_opcode opcode, uint32_t at, uint32_t length)
{
    *sge = (struct ibv_sge){.addr = (uintptr_t)a->data + at, .length = length, .lkey = a->mr->lkey};
    *wr = (struct ibv_send_wr){.opcode = opcode, .sg_list = sge, .num_sge = 1};
    wr->wr.rdma.remote_addr = (uintptr_t)b->data + at;
    wr->wr.rdma.rkey = b->mr->rkey;
    return wr;
}

static enum ibv_wc_status run_on(const struct end *a, const struct end *b, enum ibv_wr_opcode opcode, uint32_t at,
                                 uint32_t length)
{
    struct ibv_send_wr wr;
    struct ibv_sge sge;

    REQUIRE(!post(a->qp, request(&wr, &sge, a, b, opcode, at, length)));
    return next_completion(a->cq).status;
}

static uint64_t fetch_add(const struct end *a, const struct end *b, uint64_t add)
{
    struct ibv_send_wr wr;
    struct ibv_sge sge;
    uint64_t original;

    request(&wr, &sge, a, b, IBV_WR_ATOMIC_FETCH_AND_ADD, 0, sizeof(original));
    wr.wr.atomic.remote_addr = (uintptr_t)b->data;
    wr.wr.atomic.rkey = b->mr->rkey;
    wr.wr.atomic.compare_add = add;
    REQUIRE(!post(a->qp, &wr));
    CHECK(next_completion(a->cq).status == IBV_WC_SUCCESS);
    memcpy(&original, a->data, sizeof(original));
    return original;
}

static void fill(uint8_t *at, size_t length, uint8_t seed)
{
    for (size_t i = 0; i < length; i++)
        at[i] = (uint8_t)(seed + i * 7 + i / 256);
}

/* Of all sizes, in the peer's memory and without it. */
static void directly(bool slab)
{
    static const uint32_t sizes[] = {1, 8, 64, 4096, 5000, 100001, AREA};
    static uint8_t expected[AREA];
    struct end a, b;
    uint64_t before;

    open_pair(&a, &b, slab);
    before = counters_of(&a).sent + counters_of(&b).sent;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint32_t at = AREA - sizes[i];

        fill(expected, sizes[i], (uint8_t)i);
        memcpy(a.data + at, expected, sizes[i]);
        CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, at, sizes[i]) == IBV_WC_SUCCESS);
        CHECK(!memcmp(b.data + at, expected, sizes[i]));
        memset(a.data + at, 0, sizes[i]);
        CHECK(run_on(&a, &b, IBV_WR_RDMA_READ, at, sizes[i]) == IBV_WC_SUCCESS);
        CHECK(!memcmp(a.data + at, expected, sizes[i]));
    }
    CHECK(counters_of(&a).direct == 2 * sizeof(sizes) / sizeof(sizes[0]));
    CHECK(counters_of(&a).sent + counters_of(&b).sent == before);
    memset(b.data, 0, sizeof(uint64_t));
    CHECK(fetch_add(&a, &b, 5) == 0 && fetch_add(&a, &b, 7) == 5 && b.data[0] == 12);
    CHECK((counters_of(&a).sent == before) == slab); /* without a common mapping nothing is atomic */
    close_end(&a);
    close_end(&b);
}

/* What the responder refuses is refused here as well, and by it: the statuses are the same. */
static void not_allowed(bool slab)
{
    struct ibv_mr *weak;
    struct ibv_send_wr wr;
    struct ibv_sge sge;
    struct end a, b;

    open_pair(&a, &b, slab);
    request(&wr, &sge, &a, &b, IBV_WR_RDMA_WRITE, 0, 64);
    memset(a.data, 1, 64);
    wr.wr.rdma.rkey ^= 1;
    REQUIRE(!post(a.qp, &wr));
    CHECK(next_completion(a.cq).status == IBV_WC_REM_ACCESS_ERR); /* another tag */
    connect_ends(&a, &b, REMOTE);
    wr.wr.rdma.rkey ^= 1;
    wr.wr.rdma.remote_addr = (uintptr_t)b.data + AREA - 63;
    REQUIRE(!post(a.qp, &wr));
    CHECK(next_completion(a.cq).status == IBV_WC_REM_ACCESS_ERR); /* beyond the end */
    connect_ends(&a, &b, REMOTE);
    wr.wr.rdma.remote_addr = (uintptr_t)b.data - 1;
    REQUIRE(!post(a.qp, &wr));
    CHECK(next_completion(a.cq).status == IBV_WC_REM_ACCESS_ERR); /* before the start */
    connect_ends(&a, &b, REMOTE & ~IBV_ACCESS_REMOTE_WRITE);
    CHECK(run_on(&a, &b, IBV_WR_RDMA_READ, 64, 64) == IBV_WC_SUCCESS);
    CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, 0, 64) == IBV_WC_REM_ACCESS_ERR); /* not on this queue pair */
    connect_ends(&a, &b, REMOTE);
    weak = ibv_reg_mr(b.pd, b.data, AREA, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
    REQUIRE(weak);
    wr.wr.rdma.remote_addr = (uintptr_t)b.data;
    wr.wr.rdma.rkey = weak->rkey;
    REQUIRE(!post(a.qp, &wr));
    CHECK(next_completion(a.cq).status == IBV_WC_REM_ACCESS_ERR); /* not with this key */
    CHECK(!ibv_dereg_mr(weak));
    CHECK(b.data[0] == 0 && b.data[63] == 0);
    close_end(&a);
    close_end(&b);
}

/* A WRITE is there before the SEND behind it is received, whatever is on its way; a READ sees the WRITE before it. */
static void in_order(bool slab)
{
    enum { ROUNDS = 1000, PAIRS = 8 };
    const uint32_t size = slab ? 256 : 8192; /* what goes between processes is worth it */
    struct ibv_send_wr wrs[2 * PAIRS], read;
    struct ibv_sge sges[2 * PAIRS], into;
    struct end a, b;

    open_pair(&a, &b, slab);
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        for (uint32_t i = 0; i < PAIRS; i++) {
            post_receive_of(&b, 0);
            memset(a.data + i * size, (uint8_t)(round + i), size);
            request(&wrs[2 * i], &sges[2 * i], &a, &b, IBV_WR_RDMA_WRITE, i * size, size);
            request(&wrs[2 * i + 1], &sges[2 * i + 1], &a, &b, IBV_WR_SEND, 0, 0);
            wrs[2 * i].next = &wrs[2 * i + 1];
            wrs[2 * i + 1].next = i + 1 < PAIRS ? &wrs[2 * i + 2] : NULL;
        }
        REQUIRE(!post(a.qp, wrs));
        for (uint32_t i = 0; i < PAIRS; i++) {
            CHECK(next_completion(b.cq).status == IBV_WC_SUCCESS);
            CHECK(b.data[i * size] == (uint8_t)(round + i) && b.data[i * size + size - 1] == (uint8_t)(round + i));
        }
        request(&read, &into, &a, &b, IBV_WR_RDMA_READ, (PAIRS - 1) * size, size);
        into.addr = (uintptr_t)a.data + AREA / 2;
        REQUIRE(!post(a.qp, &read));
        for (int i = 0; i < 2 * PAIRS + 1; i++)
            CHECK(next_completion(a.cq).status == IBV_WC_SUCCESS);
        CHECK(a.data[AREA / 2 + size - 1] == (uint8_t)(round + PAIRS - 1));
    }
    CHECK(counters_of(&a).direct >= ROUNDS && counters_of(&a).shm_sent >= ROUNDS * PAIRS);
    close_end(&a);
    close_end(&b);
}

/* --- revocation ---------------------------------------------------------------------------------------------- */

struct writer {
    const struct end *a, *b;
    uint32_t rkey, bytes;
    _Atomic uint32_t written;
};

/* Writes until it may not any more. */
static void *write_on(void *argument)
{
    struct writer *writer = argument;
    enum ibv_wc_status status;

    do {
        struct ibv_send_wr wr;
        struct ibv_sge sge;

        request(&wr, &sge, writer->a, writer->b, IBV_WR_RDMA_WRITE, 0, writer->bytes);
        wr.wr.rdma.rkey = writer->rkey;
        REQUIRE(!post(writer->a->qp, &wr));
        status = next_completion(writer->a->cq).status;
        atomic_fetch_add(&writer->written, 1);
    } while (status == IBV_WC_SUCCESS);
    CHECK(status == IBV_WC_REM_ACCESS_ERR);
    return NULL;
}

static bool is_zero(const uint8_t *at, size_t size)
{
    return !at[0] && !memcmp(at, at + 1, size - 1);
}

/* From the moment at which a key was revoked nothing lands, though a peer is at it all the time. */
static void revoked(bool slab)
{
    struct end a, b;

    open_pair(&a, &b, slab);
    memset(a.data, 0xff, AREA);
    for (int round = 0; round < 150; round++) {
        struct writer writer = {.a = &a, .b = &b, .bytes = round % 2 ? AREA : 4096};
        struct ibv_mr *mr = ibv_reg_mr(b.pd, b.data, AREA, ALL_RIGHTS);
        time_t deadline = now() + PATIENCE;
        pthread_t thread;

        REQUIRE(mr);
        writer.rkey = mr->rkey;
        REQUIRE(!pthread_create(&thread, NULL, write_on, &writer));
        while (atomic_load(&writer.written) < (uint32_t)round % 7 && now() < deadline)
            sched_yield();
        CHECK(!ibv_dereg_mr(mr));
        memset(b.data, 0, AREA);
        CHECK(!pthread_join(thread, NULL));
        CHECK(is_zero(b.data, AREA));
        connect_ends(&a, &b, REMOTE);
    }
    CHECK(counters_of(&a).direct > 150);
    close_end(&a);
    close_end(&b);
}

/* Who looks at the packets sees them: none goes another way then. */
static void watched(void)
{
    struct usroce_fault fault = {.seed = 1};
    struct end a, b;
    uint64_t before;

    open_pair(&a, &b, true);
    CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, 0, 64) == IBV_WC_SUCCESS && counters_of(&a).direct == 1);
    for (int i = 0; i < 2; i++) {
        const struct end *watching = i ? &b : &a;

        REQUIRE(!usroce_set_fault(watching->context, &fault));
        before = counters_of(&b).received;
        CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, 0, 64) == IBV_WC_SUCCESS);
        CHECK(counters_of(&a).direct == 1 && counters_of(&b).received > before);
        REQUIRE(!usroce_set_fault(watching->context, NULL));
    }
    CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, 0, 64) == IBV_WC_SUCCESS && counters_of(&a).direct == 2);
    close_end(&a);
    close_end(&b);
}

static void slabs(void)
{
    uint8_t *slab = usroce_alloc(3 * PAGE);

    REQUIRE(slab);
    CHECK(is_zero(slab, 3 * PAGE));
    slab[3 * PAGE - 1] = 1;
    CHECK(usroce_free(slab + PAGE) == EINVAL && usroce_free(NULL) == EINVAL);
    CHECK(!usroce_unshare(slab) && !usroce_unshare(slab) && slab[3 * PAGE - 1] == 1);
    CHECK(!usroce_free(slab) && usroce_free(slab) == EINVAL && usroce_unshare(slab) == EINVAL);
    REQUIRE(!usroce_set_option("direct", "0"));
    CHECK(!usroce_alloc(PAGE) && errno == ENOTSUP);
    REQUIRE(!usroce_set_option("direct", NULL));
    CHECK(!usroce_alloc(0) && errno == EINVAL);
    CHECK(!usroce_alloc(SIZE_MAX / 2) && errno);
}

static size_t mapped_bytes(void)
{
    FILE *file = fopen("/proc/self/statm", "r");
    size_t pages = 0;

    REQUIRE(file && fscanf(file, "%zu", &pages) == 1);
    fclose(file);
    return pages * PAGE;
}

/* Around the size of a huge page, whose mappings are cut out of larger ones: all of it is there and zero, nothing is
 * left, and a peer reaches its end. */
static void large_slabs(void)
{
    static const size_t huge = 2 << 20;
    const size_t sizes[] = {huge - 1, huge, huge + 1, 2 * huge + PAGE, 5 * huge - 7};
    struct end a, b;
    size_t before;

    CHECK(!usroce_free(usroce_alloc(huge))); /* what is allocated once, by stdio and the library, is there now */
    mapped_bytes();
    before = mapped_bytes();
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint8_t *slab = usroce_alloc(sizes[i]);

        REQUIRE(slab);
        CHECK(mapped_bytes() == before + (sizes[i] + PAGE - 1) / PAGE * PAGE);
        CHECK(sizes[i] < huge || (uintptr_t)slab % huge == 0);
        CHECK(is_zero(slab, sizes[i]));
        memset(slab, 1, sizes[i]);
        CHECK(!usroce_free(slab));
        CHECK(mapped_bytes() == before);
    }
    open_pair_of(&a, &b, sizes[4], true);
    memset(a.data, 3, a.size);
    CHECK(run_on(&a, &b, IBV_WR_RDMA_WRITE, 0, (uint32_t)a.size) == IBV_WC_SUCCESS);
    CHECK(counters_of(&a).direct == 1 && !memcmp(a.data, b.data, a.size));
    close_end(&a);
    close_end(&b);
}

int main(void)
{
    slabs();
    large_slabs();
    for (int slab = 0; slab < 2; slab++) {
        directly(slab);
        not_allowed(slab);
        in_order(slab);
        revoked(slab);
    }
    watched();
    burst(IBV_QPT_UC);
    burst(IBV_QPT_UD);
    return failures ? 1 : 0;
}
