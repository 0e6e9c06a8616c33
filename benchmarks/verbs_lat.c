/* What one awaited operation costs without Python: the C row of benchmarks/core.py.
 *
 * A client times, one at a time, what `await conn.write`, `await conn.read` and an echo do on the wire: post
 * one signaled work request (inline where aiordma would), wait for its completion. Unlike perftest's
 * ib_write_lat, which waits for the peer's answering write and halves the round trip, the end of a write is its
 * local completion. Waiting is done in three ways: polling without pause at both ends (where the target's device is
 * driven by whoever polls, as usroce is, this matters to writes and reads too); polling while the target sleeps; and
 * blocking in ibv_get_cq_event with the queue armed beforehand.
 *
 *     verbs_lat DEVICE GID_INDEX SIZE ITERATIONS                   server; prints its TCP port
 *     verbs_lat DEVICE GID_INDEX SIZE ITERATIONS HOST PORT         client; prints a line for each operation:
 *                                                                  operation, wait (polled, asleep, event),
 *                                                                  minimum, median, p99 (ns)
 */
#include "bench.h"
#include "verbs_lab.h"

#define SENDS 16
#define RECEIVES 16
#define PAGE 4096UL
enum { SEND_ID = 1, RECV_ID = 2, LOOK_EVERY = 1 << 10 /* polls */ };

/* The buffer has three parts of `area` bytes: what is sent (or read into), what arrives, what the peer may touch. */
struct session {
    struct lab lab;
    size_t area;
    uint32_t size;
    int events; /* wait by blocking, not by polling */
    unsigned long sent, received;
};

/* --- posting and waiting ---------------------------------------------------------------------------- */

static void post_receive(struct session *session)
{
    struct ibv_sge sge = {(uintptr_t)(session->lab.buffer + session->area), session->size, session->lab.mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = RECV_ID, .sg_list = &sge, .num_sge = 1}, *bad;

    require(ibv_post_recv(session->lab.qp, &wr, &bad) == 0, "ibv_post_recv");
}

static void post(struct session *session, enum ibv_wr_opcode opcode)
{
    struct ibv_sge sge = {(uintptr_t)session->lab.buffer, session->size, session->lab.mr->lkey};
    struct ibv_send_wr wr = {.wr_id = SEND_ID, .sg_list = &sge, .num_sge = 1, .opcode = opcode}, *bad;

    wr.send_flags = IBV_SEND_SIGNALED;
    if (opcode != IBV_WR_RDMA_READ && session->size <= session->lab.max_inline)
        wr.send_flags |= IBV_SEND_INLINE;
    wr.wr.rdma.remote_addr = session->lab.remote.addr + 2 * session->area;
    wr.wr.rdma.rkey = session->lab.remote.rkey;
    require(ibv_post_send(session->lab.qp, &wr, &bad) == 0, "ibv_post_send");
}

static void take_completions(struct session *session)
{
    struct ibv_wc wcs[8];
    int count;

    while ((count = ibv_poll_cq(session->lab.cq, 8, wcs)) > 0)
        for (int i = 0; i < count; i++) {
            if (wcs[i].status != IBV_WC_SUCCESS) {
                fprintf(stderr, "completion: %s\n", ibv_wc_status_str(wcs[i].status));
                exit(1);
            }
            if (wcs[i].wr_id == RECV_ID) {
                session->received++;
                post_receive(session);
            } else {
                session->sent++;
            }
        }
    require(count == 0, "ibv_poll_cq");
}

static void wait_for(struct session *session, unsigned long sent, unsigned long received)
{
    while (session->sent < sent || session->received < received) {
        if (session->events)
            lab_sleep(&session->lab);
        take_completions(session);
    }
}

/* --- the operations --------------------------------------------------------------------------------- */

static void one_sided(struct session *session, enum ibv_wr_opcode opcode)
{
    unsigned long sent = session->sent;

    post(session, opcode);
    wait_for(session, sent + 1, 0);
}

static void do_write(struct session *session)
{
    one_sided(session, IBV_WR_RDMA_WRITE);
}

static void do_read(struct session *session)
{
    one_sided(session, IBV_WR_RDMA_READ);
}

static void do_echo(struct session *session)
{
    unsigned long sent = session->sent, received = session->received;

    post(session, IBV_WR_SEND);
    wait_for(session, sent + 1, received + 1);
}

static void answer(struct session *session, int count)
{
    unsigned long received = session->received;

    while (count--) {
        wait_for(session, 0, ++received);
        one_sided(session, IBV_WR_SEND);
    }
}

/* The target of writes and reads polls until the client has come to the barrier. */
static void be_target(struct session *session)
{
    char token;

    do
        for (int i = 0; i < LOOK_EVERY; i++)
            take_completions(session);
    while (recv(session->lab.sock, &token, 1, MSG_PEEK | MSG_DONTWAIT) < 0);
}

static const struct operation {
    const char *name;
    void (*run)(struct session *session);
    int answered; /* the peer takes part */
} operations[] = {{"write", do_write, 0}, {"read", do_read, 0}, {"echo", do_echo, 1}};

/* An end that answers cannot sleep while the other polls. */
static const struct wait {
    const char *name;
    int events, target_sleeps;
} waits[] = {{"polled", 0, 0}, {"asleep", 0, 1}, {"event", 1, 1}};

static int compare(const void *a, const void *b)
{
    const int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;

    return (left > right) - (left < right);
}

static void measure(struct session *session, const struct operation *operation, const char *wait, int warmup,
                    int iterations)
{
    int64_t *samples = calloc((size_t)iterations, sizeof(*samples)), before, now;

    require(samples != NULL, "calloc");
    for (int i = 0; i < warmup; i++)
        operation->run(session);
    before = now_ns();
    for (int i = 0; i < iterations; i++) {
        operation->run(session);
        now = now_ns();
        samples[i] = now - before;
        before = now;
    }
    qsort(samples, (size_t)iterations, sizeof(*samples), compare);
    printf("%s %s %lld %lld %lld\n", operation->name, wait, (long long)samples[0], (long long)samples[iterations / 2],
           (long long)samples[(int)(iterations * 0.99)]);
    fflush(stdout);
    free(samples);
}

static void run_operation(struct session *session, const struct operation *operation, const struct wait *wait,
                          int iterations, int client)
{
    const int warmup = iterations / 10 + 10;

    lab_barrier(&session->lab);
    if (client)
        measure(session, operation, wait->name, warmup, iterations);
    else if (operation->answered)
        answer(session, warmup + iterations);
    else if (!wait->target_sleeps)
        be_target(session);
}

static void run(struct session *session, int iterations, int client)
{
    for (size_t w = 0; w < sizeof(waits) / sizeof(*waits); w++) {
        session->events = waits[w].events;
        if (session->events)
            lab_arm(&session->lab);
        for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++)
            if (!operations[i].answered || waits[w].events == waits[w].target_sleeps)
                run_operation(session, &operations[i], &waits[w], iterations, client);
    }
    lab_barrier(&session->lab);
}

int main(int argc, char **argv)
{
    struct session session = {.lab = {.sends = SENDS, .receives = RECEIVES}};
    int iterations;

    if (argc != 5 && argc != 7) {
        fprintf(stderr, "usage: verbs_lat DEVICE GID_INDEX SIZE ITERATIONS [HOST PORT]\n");
        return 2;
    }
    alarm(DEADLINE_S);
    session.lab.gid_index = atoi(argv[2]);
    session.size = (uint32_t)atoi(argv[3]);
    session.area = (session.size + PAGE - 1) / PAGE * PAGE;
    session.lab.size = 3 * session.area;
    iterations = atoi(argv[4]);
    lab_open(&session.lab, argv[1]);
    lab_connect(&session.lab, argc == 7 ? argv[5] : NULL, argc == 7 ? argv[6] : NULL);
    for (int i = 0; i < RECEIVES; i++)
        post_receive(&session);
    run(&session, iterations, argc == 7);
    lab_close(&session.lab);
    return 0;
}
