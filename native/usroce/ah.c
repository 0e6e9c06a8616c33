/* Address handles, and the way from an address vector to an endpoint.
 *
 * In RoCE v2 an address is an IP address, in a GID. What InfiniBand calls a LID is here the peer's UDP port where
 * it is not the standard one: the port publishes it, applications exchange it as they always did, and it comes
 * back as `dlid`. */
#include "usroce.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    PORT = 1,
    HOPS = 64,
    IPV4_AT = 20, /* in the 40 bytes before a datagram: the GRH, or nothing and an IPv4 header */
};

static const uint8_t v4_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static bool is_v4(const union ibv_gid *gid)
{
    return memcmp(gid->raw, v4_prefix, sizeof(v4_prefix)) == 0;
}

/* Of one host: neither unspecified nor a group. */
static bool is_unicast(const union ibv_gid *gid)
{
    static const union ibv_gid none;

    if (is_v4(gid))
        return gid->raw[12] != 0 && gid->raw[12] < 224;
    return gid->raw[0] != 0xff && memcmp(gid, &none, sizeof(none)) != 0;
}

int address_resolve(struct context *ctx, const struct ibv_ah_attr *attr, struct endpoint *to,
                    struct gid_slot **slot)
{
    struct gid_slot *from;

    if (!attr->is_global || attr->port_num != PORT || attr->grh.sgid_index >= ctx->num_gids)
        return EINVAL;
    from = &ctx->gids[attr->grh.sgid_index];
    if (!is_unicast(&attr->grh.dgid) || is_v4(&attr->grh.dgid) != is_v4(&from->gid))
        return EINVAL;
    to->gid = attr->grh.dgid;
    to->port = attr->dlid ? attr->dlid : ROCE_UDP_PORT;
    *slot = from;
    return 0;
}

EXPORT struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
    struct context *ctx = context_of(pd->context);
    struct ah *ah;
    int rc;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return NULL;
    }
    ah = calloc(1, sizeof(*ah));
    if (!ah)
        return NULL;
    ah->base.context = pd->context;
    ah->base.pd = pd;
    ah->attr = *attr;
    pthread_mutex_lock(&ctx->lock);
    rc = address_resolve(ctx, attr, &ah->to, &ah->slot);
    if (!rc) {
        ((struct pd *)(void *)pd)->children++;
        link_prepare(ah->slot->link, &ah->to);
    }
    pthread_mutex_unlock(&ctx->lock);
    if (rc) {
        free(ah);
        errno = rc;
        return NULL;
    }
    return &ah->base;
}

EXPORT int ibv_destroy_ah(struct ibv_ah *base)
{
    struct context *ctx = context_of(base->context);

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    ((struct pd *)(void *)base->pd)->children--;
    pthread_mutex_unlock(&ctx->lock);
    free((struct ah *)(void *)base);
    return 0;
}

/* --- from a completion back to its sender -------------------------------------------------------------------- */

/* What the network header before a datagram says. */
struct route {
    union ibv_gid from, to;
    uint32_t flow_label;
    uint8_t traffic_class;
};

static void map_v4(union ibv_gid *gid, const uint8_t *address)
{
    memcpy(gid->raw, v4_prefix, sizeof(v4_prefix));
    memcpy(gid->raw + sizeof(v4_prefix), address, 4);
}

/* False: neither an IPv6 header nor an IPv4 header without options. */
static bool read_route(const struct ibv_grh *grh, struct route *route)
{
    const uint8_t *v4 = (const uint8_t *)grh + IPV4_AT;
    uint32_t first = ntohl(grh->version_tclass_flow);

    memset(route, 0, sizeof(*route));
    if (first >> 28 == 6) {
        route->from = grh->sgid;
        route->to = grh->dgid;
        route->flow_label = first & 0xfffff;
        route->traffic_class = first >> 20 & 0xff;
        return true;
    }
    if (v4[0] != 0x45)
        return false;
    map_v4(&route->from, v4 + 12);
    map_v4(&route->to, v4 + 16);
    route->traffic_class = v4[1];
    return true;
}

static int slot_of(const struct context *ctx, const union ibv_gid *gid)
{
    for (int i = 0; i < ctx->num_gids; i++)
        if (memcmp(&ctx->gids[i].gid, gid, sizeof(*gid)) == 0)
            return i;
    return -1;
}

EXPORT int ibv_init_ah_from_wc(struct ibv_context *context, uint8_t port_num, struct ibv_wc *wc,
                               struct ibv_grh *grh, struct ibv_ah_attr *attr)
{
    struct context *ctx = context_of(context);
    struct route route;
    int slot = -1, rc = context_is_foreign(ctx) ? ENODEV : 0;

    if (!rc && (port_num != PORT || !(wc->wc_flags & IBV_WC_GRH) || !read_route(grh, &route)))
        rc = EINVAL;
    if (!rc) {
        slot = slot_of(ctx, &route.to); /* fixed as long as the device is open: no lock */
        rc = slot < 0 ? EINVAL : 0;
    }
    if (rc) {
        errno = rc;
        return -1;
    }
    memset(attr, 0, sizeof(*attr));
    attr->dlid = wc->slid;
    attr->sl = wc->sl;
    attr->src_path_bits = wc->dlid_path_bits;
    attr->port_num = PORT;
    attr->is_global = 1;
    attr->grh.dgid = route.from;
    attr->grh.sgid_index = (uint8_t)slot;
    attr->grh.flow_label = route.flow_label;
    attr->grh.traffic_class = route.traffic_class;
    attr->grh.hop_limit = HOPS;
    return 0;
}

EXPORT struct ibv_ah *ibv_create_ah_from_wc(struct ibv_pd *pd, struct ibv_wc *wc, struct ibv_grh *grh,
                                            uint8_t port_num)
{
    struct ibv_ah_attr attr;

    if (ibv_init_ah_from_wc(pd->context, port_num, wc, grh, &attr))
        return NULL;
    return ibv_create_ah(pd, &attr);
}

/* The kernel finds the way to a link-layer address when it sends. */
EXPORT int ibv_resolve_eth_l2_from_gid(struct ibv_context *context, struct ibv_ah_attr *attr,
                                       uint8_t eth_mac[ETHERNET_LL_SIZE], uint16_t *vid)
{
    (void)attr;
    if (context_is_foreign(context_of(context)))
        return ENODEV;
    memset(eth_mac, 0, ETHERNET_LL_SIZE);
    if (vid)
        *vid = 0xffff; /* no VLAN */
    return 0;
}
