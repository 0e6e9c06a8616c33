/* What a verbs program gets from an RC queue pair, pattern by pattern; udp_pingpong.c does the same without RDMA.
 *
 *     verbs_pingpong DEVICE GID_INDEX PATTERN WAIT SECONDS                 server; prints its TCP port
 *     verbs_pingpong DEVICE GID_INDEX PATTERN WAIT SECONDS HOST PORT       client; prints a line for each figure
 *
 * WAIT is `busy` (polling without pause) or `blocking` (on the completion channel). Patterns:
 *
 *     latency     one message of 64 bytes goes there and back at a time (SEND and receive)
 *     rate        64 messages are kept outstanding; each is echoed. Whatever one poll found is answered by one list of
 *                 work requests
 *     bandwidth   one way: RDMA WRITEs of 1 MiB, 8 of them outstanding, from one buffer to one buffer. Counted is what
 *                 completed. The target polls (busy) or sleeps in read() on its TCP connection (blocking)
 *     batch       lists of 64 RDMA WRITEs of 64 bytes, inline, one list after the other; the last of a list is signaled.
 *                 Counted are writes. The target does as with bandwidth
 *
 * Messages are sent inline, and one in 16 is signaled.
 */
#include <infiniband/verbs.h>

#include "bench.h"
#include "verbs_lab.h"

enum {
    SLOTS = 3 * OUTSTANDING, /* the last third is free at first */
    SENDS = 8 * OUTSTANDING,
    SIGNAL_EVERY = 16,
    WRITES = 8,
    LIST = OUTSTANDING, /* completions taken, work requests posted at a time */
    LOOK_EVERY = 1 << 10, /* polls */
    WRITTEN = 0x5a,
};
#define SEND_ID UINT64_MAX /* of a receive, its slot */

/* What arrives lies in slots of the buffer, and is echoed from there before the slot is posted again. */
struct session {
    struct lab lab;
    int events;
    double seconds;
    uint64_t posted, completed; /* sends */
    struct ibv_wc wcs[LIST];
    struct ibv_sge send_sges[LIST], receive_sges[LIST];
    struct ibv_send_wr sends[LIST];
    struct ibv_recv_wr receives[LIST];
};

/* --- work requests ------------------------------------------------------------------------------------------- */

static char *slot_at(const struct session *session, uint64_t slot)
{
    return session->lab.buffer + slot * MESSAGE;
}

static struct ibv_sge sge_of(const struct session *session, uint64_t slot)
{
    return (struct ibv_sge){(uintptr_t)slot_at(session, slot), MESSAGE, session->lab.mr->lkey};
}

/* Posts the first `count` of the list that receives[] is. */
static void post_receives(struct session *session, int count)
{
    struct ibv_recv_wr *bad;

    session->receives[count - 1].next = NULL;
    require(ibv_post_recv(session->lab.qp, session->receives, &bad) == 0, "ibv_post_recv");
    session->receives[count - 1].next = &session->receives[count];
}

static void prepare_receive(struct session *session, int i, uint64_t slot)
{
    session->receive_sges[i] = sge_of(session, slot);
    session->receives[i].wr_id = slot;
}

static void prepare_send(struct session *session, int i, uint64_t slot)
{
    struct ibv_send_wr *wr = &session->sends[i];

    session->send_sges[i] = sge_of(session, slot);
    wr->send_flags = IBV_SEND_INLINE; /* the slot is free once it is posted */
    if (++session->posted % SIGNAL_EVERY == 0)
        wr->send_flags |= IBV_SEND_SIGNALED;
}

static void post_sends(struct session *session, int count)
{
    struct ibv_send_wr *bad;

    session->sends[count - 1].next = NULL;
    require(ibv_post_send(session->lab.qp, session->sends, &bad) == 0, "ibv_post_send");
    session->sends[count - 1].next = &session->sends[count];
}

/* The lists, and receives in two thirds of the slots. */
static void prepare(struct session *session)
{
    for (int i = 0; i < LIST; i++) {
        session->sends[i] = (struct ibv_send_wr){.wr_id = SEND_ID,
                                                 .next = &session->sends[i + 1],
                                                 .sg_list = &session->send_sges[i],
                                                 .num_sge = 1,
                                                 .opcode = IBV_WR_SEND};
        session->receives[i] = (struct ibv_recv_wr){
            .wr_id = SLOTS - LIST + (uint64_t)i, .next = &session->receives[i + 1], .sg_list = &session->receive_sges[i], .num_sge = 1};
    }
    for (uint64_t slot = 0; slot < SLOTS - LIST; slot += LIST) {
        for (int i = 0; i < LIST; i++)
            prepare_receive(session, i, slot + (uint64_t)i);
        post_receives(session, LIST);
    }
}

/* --- completions ----------------------------------------------------------------------------------------------- */

static int poll_completions(struct session *session)
{
    int count = ibv_poll_cq(session->lab.cq, LIST, session->wcs);

    require(count >= 0, "ibv_poll_cq");
    for (int i = 0; i < count; i++)
        if (session->wcs[i].status != IBV_WC_SUCCESS) {
            fprintf(stderr, "completion: %s\n", ibv_wc_status_str(session->wcs[i].status));
            exit(1);
        }
    return count;
}

/* At least one. The queue is armed whenever it is found empty. */
static int wait_for_completions(struct session *session)
{
    int count;

    while (!(count = poll_completions(session)))
        if (session->events)
            lab_sleep(&session->lab);
    return count;
}

/* Waits for messages and returns how many came; their slots are receives[].wr_id. */
static int take_messages(struct session *session)
{
    int messages = 0;

    while (!messages) {
        int count = wait_for_completions(session);

        for (int i = 0; i < count; i++)
            if (session->wcs[i].wr_id == SEND_ID)
                session->completed += SIGNAL_EVERY;
            else
                prepare_receive(session, messages++, session->wcs[i].wr_id);
    }
    return messages;
}

/* --- latency and rate --------------------------------------------------------------------------------------- */

/* The last messages taken go back, as they are now, and their slots are posted again. */
static void answer(struct session *session, int messages)
{
    for (int i = 0; i < messages; i++)
        prepare_send(session, i, session->receives[i].wr_id);
    require(session->posted - session->completed <= SENDS, "room in the send queue");
    post_sends(session, messages);
    post_receives(session, messages);
}

static void echo(struct session *session)
{
    for (;;) {
        int messages = take_messages(session);

        if (sequence_of(slot_at(session, session->receives[0].wr_id)) == LAST)
            return;
        answer(session, messages);
    }
}

/* Stamps and sends `count` messages from the slots of the last messages taken. */
static void ask(struct session *session, uint64_t *next, int count)
{
    for (int i = 0; i < count; i++)
        stamp(slot_at(session, session->receives[i].wr_id), (*next)++);
    answer(session, count);
}

/* Returns how many answers came, all of which must be the next ones. */
static int take_answers(struct session *session, uint64_t *answered)
{
    int count = take_messages(session);

    for (int i = 0; i < count; i++)
        if (sequence_of(slot_at(session, session->receives[i].wr_id)) != (*answered)++) {
            fprintf(stderr, "the answers are not in order\n");
            exit(1);
        }
    return count;
}

static void ping(struct session *session, int outstanding)
{
    uint64_t next = 0, answered = 0;
    struct timed timed;
    int count;

    for (int i = 0; i < outstanding; i++)
        prepare_receive(session, i, SLOTS - OUTSTANDING + (uint64_t)i);
    timed_begin(&timed, session->seconds);
    ask(session, &next, outstanding);
    for (;;) {
        count = take_answers(session, &answered);
        if (!timed_tick(&timed, answered))
            break;
        ask(session, &next, count);
    }
    while (answered < next)
        take_answers(session, &answered);
    next = LAST;
    ask(session, &next, 1);
    timed_report(&timed);
}

/* --- bandwidth ------------------------------------------------------------------------------------------------ */

static void post_write(struct session *session)
{
    struct ibv_sge sge = {(uintptr_t)session->lab.buffer, BLOCK, session->lab.mr->lkey};
    struct ibv_send_wr wr = {.wr_id = SEND_ID,
                             .sg_list = &sge,
                             .num_sge = 1,
                             .opcode = IBV_WR_RDMA_WRITE,
                             .send_flags = IBV_SEND_SIGNALED},
                       *bad;

    wr.wr.rdma.remote_addr = session->lab.remote.addr;
    wr.wr.rdma.rkey = session->lab.remote.rkey;
    require(ibv_post_send(session->lab.qp, &wr, &bad) == 0, "ibv_post_send");
}

static void pour(struct session *session)
{
    uint64_t posted = 0, completed = 0;
    struct timed timed;

    timed_begin(&timed, session->seconds);
    do {
        for (; posted - completed < WRITES; posted++)
            post_write(session);
        completed += (uint64_t)wait_for_completions(session);
    } while (timed_tick(&timed, completed * BLOCK));
    while (completed < posted)
        completed += (uint64_t)wait_for_completions(session);
    timed_report(&timed);
}

/* --- batch ----------------------------------------------------------------------------------------------------- */

static void prepare_batch(struct session *session)
{
    for (int i = 0; i < LIST; i++) {
        struct ibv_send_wr *wr = &session->sends[i];

        session->send_sges[i] = sge_of(session, (uint64_t)i);
        *wr = (struct ibv_send_wr){.wr_id = SEND_ID,
                                   .next = &session->sends[i + 1],
                                   .sg_list = &session->send_sges[i],
                                   .num_sge = 1,
                                   .opcode = IBV_WR_RDMA_WRITE,
                                   .send_flags = IBV_SEND_INLINE};
        wr->wr.rdma.remote_addr = session->lab.remote.addr + (uint64_t)i * MESSAGE;
        wr->wr.rdma.rkey = session->lab.remote.rkey;
    }
    session->sends[LIST - 1].send_flags |= IBV_SEND_SIGNALED;
}

static void batches(struct session *session)
{
    uint64_t completed = 0;
    struct timed timed;

    prepare_batch(session);
    timed_begin(&timed, session->seconds);
    do {
        post_sends(session, LIST);
        completed += LIST * (uint64_t)wait_for_completions(session);
    } while (timed_tick(&timed, completed));
    timed_report(&timed);
}

/* --- the target of writes ---------------------------------------------------------------------------------------- */

/* Until the client has come to the barrier. */
static void be_target(struct session *session)
{
    char token;

    if (session->events)
        return;
    do
        for (int i = 0; i < LOOK_EVERY; i++)
            poll_completions(session);
    while (recv(session->lab.sock, &token, 1, MSG_PEEK | MSG_DONTWAIT) < 0);
}

static void check_written(const struct session *session, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (session->lab.buffer[i] != WRITTEN) {
            fprintf(stderr, "the target does not have what was written\n");
            exit(1);
        }
}

/* --- the program ----------------------------------------------------------------------------------------------- */

static void run_messages(struct session *session, int outstanding, int client)
{
    require(session->lab.max_inline >= MESSAGE, "64 bytes inline");
    prepare(session);
    if (session->events)
        lab_arm(&session->lab);
    lab_barrier(&session->lab);
    client ? ping(session, outstanding) : echo(session);
    lab_barrier(&session->lab);
}

static void run_writes(struct session *session, size_t size, void (*write)(struct session *session), int client)
{
    memset(session->lab.buffer, client ? WRITTEN : 0, BLOCK);
    if (session->events)
        lab_arm(&session->lab);
    lab_barrier(&session->lab);
    client ? write(session) : be_target(session);
    lab_barrier(&session->lab);
    if (!client)
        check_written(session, size);
}

static void run(struct session *session, const char *pattern, int client)
{
    if (!strcmp(pattern, "latency"))
        run_messages(session, 1, client);
    else if (!strcmp(pattern, "rate"))
        run_messages(session, OUTSTANDING, client);
    else if (!strcmp(pattern, "bandwidth"))
        run_writes(session, BLOCK, pour, client);
    else if (!strcmp(pattern, "batch"))
        run_writes(session, LIST * MESSAGE, batches, client);
    else
        fprintf(stderr, "no pattern %s\n", pattern);
}

int main(int argc, char **argv)
{
    static struct session session = {.lab = {.sends = SENDS, .receives = SLOTS, .size = BLOCK}};
    int client = argc == 8;

    if (argc != 6 && argc != 8) {
        fprintf(stderr, "usage: verbs_pingpong DEVICE GID_INDEX PATTERN WAIT SECONDS [HOST PORT]\n");
        return 2;
    }
    session.lab.gid_index = atoi(argv[2]);
    session.events = strcmp(argv[4], "busy") != 0;
    session.seconds = atof(argv[5]);
    alarm(DEADLINE_S);
    lab_open(&session.lab, argv[1]);
    lab_connect(&session.lab, client ? argv[6] : NULL, client ? argv[7] : NULL);
    run(&session, argv[3], client);
    lab_close(&session.lab);
    return 0;
}
