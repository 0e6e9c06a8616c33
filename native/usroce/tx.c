/* Packets on their way out: a buffer for the headers and small payload of each, room for the seal, and the batch that
 * a flush hands to the kernel. Packets lie one behind the other in it, so that small ones to one peer are one piece
 * of memory to the link.
 *
 * Payload that is not small is not copied: the link sends it from registered memory. So everything queued is
 * flushed before the device lock is given back, while the memory still is what it was when it was looked up. */
#include "usroce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    TX_PACKETS = 256, /* queued before a flush */
    TX_COPY = 512,    /* payload up to this size is copied behind the headers: one piece is cheaper than three */
    TX_TRAILER = 8,   /* pad and ICRC */
    TX_SLOT = WIRE_MAX_HEADERS + TX_COPY + TX_TRAILER,
};

struct tx {
    bool dirty[MAX_GIDS];             /* links with queued frames, by GID slot */
    struct iovec iov[LINK_MAX_PIECES]; /* of the packet being built */
    int niov;
    uint32_t outside;                 /* bytes of it that are not in the buffer */
    uint32_t used;                    /* bytes of the buffer */
    uint8_t buffer[TX_PACKETS * TX_SLOT];
};

int tx_init(struct context *ctx)
{
    ctx->tx = calloc(1, sizeof(*ctx->tx));
    return ctx->tx ? 0 : ENOMEM;
}

void tx_free(struct context *ctx)
{
    free(ctx->tx);
    ctx->tx = NULL;
}

void tx_begin(struct context *ctx, struct tx_packet *packet, struct gid_slot *slot, const struct endpoint *to)
{
    struct tx *tx = ctx->tx;

    if (tx->used > sizeof(tx->buffer) - TX_SLOT)
        tx_flush(ctx);
    packet->ctx = ctx;
    packet->slot = slot;
    packet->to = to;
    packet->head = tx->buffer + tx->used;
    packet->head_size = 0;
    packet->payload = 0;
    packet->traffic_class = 0;
    tx->niov = 1; /* what is in the buffer comes first */
    tx->outside = 0;
}

void tx_payload(struct tx_packet *packet, const void *data, uint32_t size)
{
    struct tx *tx = packet->ctx->tx;

    if (!size)
        return;
    if (tx->niov == 1 && packet->payload + size <= TX_COPY) {
        memcpy(packet->head + packet->head_size + packet->payload, data, size);
    } else {
        tx->iov[tx->niov].iov_base = (void *)(uintptr_t)data;
        tx->iov[tx->niov].iov_len = size;
        tx->niov++;
        tx->outside += size;
    }
    packet->payload += size;
}

void tx_end(struct tx_packet *packet)
{
    struct tx *tx = packet->ctx->tx;
    uint32_t inside = packet->head_size + packet->payload - tx->outside;
    uint32_t pad = -packet->payload & 3;
    uint8_t *trailer = packet->head + inside;
    struct frame frame;

    wire_set_pad(packet->head, pad);
    memset(trailer, 0, pad + WIRE_ICRC);
    tx->iov[0].iov_base = packet->head;
    tx->iov[0].iov_len = inside;
    if (tx->niov == 1) {
        tx->iov[0].iov_len += pad + WIRE_ICRC;
    } else {
        tx->iov[tx->niov].iov_base = trailer;
        tx->iov[tx->niov].iov_len = pad + WIRE_ICRC;
        tx->niov++;
    }
    frame.to = packet->to;
    frame.iov = tx->iov;
    frame.niov = tx->niov;
    frame.size = packet->head_size + packet->payload + pad + WIRE_ICRC;
    frame.traffic_class = packet->traffic_class;
    frame.sealed = false; /* by the link, if it needs to be */
    packet->slot->link->ops->send(packet->slot->link, &frame);
    tx->dirty[packet->slot - packet->ctx->gids] = true;
    tx->used += inside + pad + WIRE_ICRC;
}

bool tx_has_room(const struct gid_slot *slot, const struct endpoint *to, uint32_t payload)
{
    struct link *ground = link_ground(slot->link);

    return !ground->ops->has_room || ground->ops->has_room(ground, to, WIRE_MAX_HEADERS + payload + TX_TRAILER);
}

void tx_flush(struct context *ctx)
{
    struct tx *tx = ctx->tx;

    if (!tx->used)
        return;
    for (int i = 0; i < ctx->num_gids; i++) {
        if (tx->dirty[i])
            ctx->gids[i].link->ops->flush(ctx->gids[i].link);
        tx->dirty[i] = false;
    }
    tx->used = 0;
}
