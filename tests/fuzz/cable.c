/* The cable: a link that keeps what the device sends to itself, and hands over what the fuzzer gives. Everything
 * that is sent is looked at: it must parse, have the right ICRC, and nothing in it that the peer must not read. */
#include <stdlib.h>
#include <string.h>

#include "icrc.h"
#include "world.h"

enum { SECRET_RUN = 32 }; /* bytes: so many in a row are no accident */

struct frame_copy {
    uint32_t size;
    uint8_t data[LINK_MAX_FRAME];
};

static struct {
    struct frame_copy frames[CABLE_FRAMES]; /* sent by the device to itself, oldest first */
    uint32_t count;
    struct view arrived[LINK_MAX_VIEWS], taken[LINK_MAX_VIEWS];
    int num_arrived, num_taken;
} cable;

/* Nothing may go out that came from memory which the peer has no right to. */
static void check_secrecy(const struct packet *packet)
{
    uint32_t run = 0;

    if (!(packet->traits & WIRE_IS_READ_RESPONSE))
        return;
    for (uint32_t i = 0; i < packet->length; i++) {
        run = packet->payload[i] == SECRET ? run + 1 : 0;
        must(run < SECRET_RUN);
    }
}

static void check_sent(uint8_t *data, uint32_t size, const struct endpoint *to)
{
    struct endpoint from = world_endpoint();
    struct view view = {.from = from, .data = data, .size = size};
    struct packet packet;

    must(wire_parse(data, size, &packet));
    must(packet.length <= 4096);
    must(icrc_check(&view, to, false));
    check_secrecy(&packet);
}

static void cable_send(struct link *link, const struct frame *frame)
{
    struct frame_copy *copy = &cable.frames[cable.count < CABLE_FRAMES ? cable.count : CABLE_FRAMES - 1];

    must(frame->size <= LINK_MAX_FRAME);
    copy->size = 0;
    icrc_seal(&link->local, frame);
    for (int i = 0; i < frame->niov; i++) {
        must(copy->size + frame->iov[i].iov_len <= frame->size);
        memcpy(copy->data + copy->size, frame->iov[i].iov_base, frame->iov[i].iov_len);
        copy->size += (uint32_t)frame->iov[i].iov_len;
    }
    must(copy->size == frame->size);
    check_sent(copy->data, copy->size, frame->to);
    link->counters->sent++;
    if (frame->to->port == link->local.port && cable.count < CABLE_FRAMES)
        cable.count++; /* else it is lost */
}

static void cable_flush(struct link *link)
{
    (void)link;
}

static int cable_receive(struct link *link, struct view *views, int max)
{
    (void)link;
    for (; cable.num_taken; cable.num_taken--)
        free(cable.taken[cable.num_taken - 1].data);
    must(cable.num_arrived <= max);
    memcpy(views, cable.arrived, (size_t)cable.num_arrived * sizeof(*views));
    memcpy(cable.taken, cable.arrived, (size_t)cable.num_arrived * sizeof(*views));
    cable.num_taken = cable.num_arrived;
    cable.num_arrived = 0;
    return cable.num_taken;
}

static uint64_t cable_deadline(const struct link *link)
{
    (void)link;
    return NEVER;
}

static void cable_close(struct link *link)
{
    (void)link;
}

static const struct link_ops cable_ops = {
    .send = cable_send,
    .flush = cable_flush,
    .receive = cable_receive,
    .deadline = cable_deadline,
    .close = cable_close,
};

static struct link cable_link = {.ops = &cable_ops};

void cable_attach(struct context *ctx)
{
    must(ctx->num_gids == 1);
    cable_link.local = ctx->gids[0].link->local;
    cable_link.local.port = ROCE_UDP_PORT; /* whichever was free */
    cable_link.counters = &ctx->counters;
    cable_link.fd = -1;
    ctx->gids[0].link->ops->close(ctx->gids[0].link);
    ctx->gids[0].link = &cable_link;
    ctx->udp_port = ROCE_UDP_PORT;
}

/* Where the frame would come from, had the peer sent it. */
static struct endpoint peer_of(const uint8_t *frame, uint32_t size)
{
    struct endpoint peer = world_endpoint();

    for (int i = 0; i < QPS && size >= WIRE_BTH; i++)
        if ((frame[5] << 16 | frame[6] << 8 | frame[7]) == (int)world.qps[i]->qp_num && world_qp(i)->slot)
            peer = world_qp(i)->remote;
    return peer;
}

void cable_give(const uint8_t *frame, uint32_t size, enum sender sender, uint16_t ip_id, uint32_t damage)
{
    struct view *view = &cable.arrived[cable.num_arrived];
    struct endpoint to = world_endpoint();
    struct iovec iov;
    uint32_t icrc;

    if (cable.num_arrived == LINK_MAX_VIEWS)
        return;
    view->from = peer_of(frame, size);
    if (sender == OTHER_ADDRESS)
        view->from.gid.raw[15] ^= 2;
    if (sender == OTHER_PORT)
        view->from.port++;
    view->data = malloc(size ? size : 1); /* of its own, so that reading beyond it is seen */
    must(view->data);
    view->size = size;
    view->ip_id = ip_id;
    view->traffic_class = 0;
    memcpy(view->data, frame, size);
    if (size >= WIRE_BTH + WIRE_ICRC) {
        iov = (struct iovec){view->data, size};
        icrc = icrc_frame(&view->from, &to, &iov, 1, size) ^ icrc_adjustment(size, ip_id) ^ damage;
        memcpy(view->data + size - WIRE_ICRC, &icrc, sizeof(icrc));
    }
    cable.num_arrived++;
}

void cable_progress(bool rest)
{
    pthread_mutex_lock(&world.ctx->lock);
    progress_poll(world.ctx, !rest);
    if (rest)
        sleep_armed(world.ctx, NULL);
    pthread_mutex_unlock(&world.ctx->lock);
}

uint32_t cable_count(void)
{
    return cable.count;
}

uint8_t *cable_frame(uint32_t k, uint32_t *size)
{
    *size = cable.frames[k].size;
    return cable.frames[k].data;
}

void cable_drop(uint32_t k)
{
    cable.count--;
    for (; k < cable.count; k++) {
        cable.frames[k].size = cable.frames[k + 1].size;
        memcpy(cable.frames[k].data, cable.frames[k + 1].data, cable.frames[k + 1].size);
    }
}

void cable_clear(void)
{
    for (; cable.num_arrived; cable.num_arrived--)
        free(cable.arrived[cable.num_arrived - 1].data);
    cable.count = 0;
}

void cable_deliver_all(void)
{
    for (uint32_t i = 0; i < cable.count; i++)
        cable_give(cable.frames[i].data, cable.frames[i].size, PEER, 0, 0);
    cable.count = 0;
}

bool cable_is_idle(void)
{
    return !cable.count && !cable.num_arrived;
}
