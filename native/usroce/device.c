/* The device: the list that it is alone in, open and close, what it and its port say of themselves, GIDs.
 *
 * There is one device, "usroce0", whether or not it can be opened with the present settings. Opening it binds one
 * UDP socket for each address, all to the same port: 4791, or where that is taken, any. The port is published as
 * the LID, since applications exchange LIDs anyway (see ah.c).
 *
 * fork(): a child gets copies of all objects and none of the threads, and the sockets of its parent. Nothing good
 * comes of touching those, so the functions refuse; the child may open the device anew. */
#define _GNU_SOURCE /* getrandom */
#include "usroce.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    PORT = 1,
    COMP_VECTORS = 2,
    PORT_ATTEMPTS = 64,       /* to find a port that is free on every address */
    WINDOW_MIN = 32 << 10,    /* bytes */
    WINDOW_MAX = 1 << 20,
    MTU_HEADERS = 96,         /* IPv6, UDP, every header of a packet, and the ICRC */
    MTU_UNKNOWN = 1500,       /* bytes, of an interface that is not found */
    PHYS_STATE_LINK_UP = 5,
    WIDTH_4X = 2,
    SPEED_25G = 32,
    CLOCK_KHZ = 1000 * 1000,  /* the completion clock counts nanoseconds */
};

/* --- the process: time, chance, fork() ----------------------------------------------------------------------- */

pthread_mutex_t process_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_uint generation; /* forks behind this process */
static atomic_bool has_complained;

/* What is left of the last numbers that the kernel gave this thread. */
static __thread struct {
    uint32_t words[32];
    unsigned int left;
    unsigned int generation;
} chance;

static void before_fork(void)
{
    pthread_mutex_lock(&process_lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&process_lock);
}

static void after_fork_in_child(void)
{
    pthread_mutex_unlock(&process_lock);
    atomic_fetch_add(&generation, 1);
    atomic_store(&has_complained, false);
    memory_forget_locked();
}

__attribute__((constructor)) static void watch_forks(void)
{
    if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child))
        fputs("usroce: out of memory: fork() will not be noticed\n", stderr);
}

bool context_is_foreign(const struct context *ctx)
{
    if (ctx->generation == atomic_load_explicit(&generation, memory_order_relaxed))
        return false;
    if (!atomic_exchange(&has_complained, true))
        fputs("usroce: the device was opened before fork() and cannot be used in the child\n", stderr);
    return true;
}

uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint32_t random_u32(void)
{
    unsigned int now = atomic_load_explicit(&generation, memory_order_relaxed);

    if (!chance.left || chance.generation != now) {
        /* Without randomness keys could be guessed. It has not happened on any kernel with getrandom(), where up
         * to 256 bytes come whole. */
        if (getrandom(chance.words, sizeof(chance.words), 0) != (ssize_t)sizeof(chance.words)) {
            perror("usroce: getrandom");
            abort();
        }
        chance.left = sizeof(chance.words) / sizeof(chance.words[0]);
        chance.generation = now;
    }
    return chance.words[--chance.left];
}

/* --- the list ------------------------------------------------------------------------------------------------ */

/* Lives as long as the library, so that nobody has to count who still points to it. */
static struct ibv_device the_device = {
    .node_type = IBV_NODE_CA,
    .transport_type = IBV_TRANSPORT_IB,
    .name = "usroce0",
    .dev_name = "usroce0",
};

/* Network byte order; another one in each process. */
static uint64_t device_guid(void)
{
    static uint64_t guid;
    static unsigned int made_in;
    unsigned int now = atomic_load_explicit(&generation, memory_order_relaxed);
    uint64_t result;

    pthread_mutex_lock(&process_lock);
    if (!guid || made_in != now) {
        guid = (uint64_t)random_u32() << 32 | random_u32();
        /* An EUI-64 that nobody assigned: local, and of one device. */
        guid = htobe64((guid & ~(UINT64_C(1) << 56)) | UINT64_C(1) << 57);
        made_in = now;
    }
    result = guid;
    pthread_mutex_unlock(&process_lock);
    return result;
}

EXPORT struct ibv_device **ibv_get_device_list(int *num_devices)
{
    struct ibv_device **list;
    struct settings settings;
    int rc = settings_read(&settings); /* wrong ones are better known early */

    if (num_devices)
        *num_devices = 0;
    if (rc) {
        errno = rc;
        return NULL;
    }
    list = calloc(2, sizeof(*list));
    if (!list)
        return NULL;
    list[0] = &the_device;
    if (num_devices)
        *num_devices = 1;
    return list;
}

EXPORT void ibv_free_device_list(struct ibv_device **list)
{
    free(list);
}

EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

EXPORT int ibv_get_device_index(struct ibv_device *device)
{
    (void)device; /* the kernel does not count it */
    return -1;
}

EXPORT __be64 ibv_get_device_guid(struct ibv_device *device)
{
    (void)device;
    return device_guid();
}

/* --- interfaces ---------------------------------------------------------------------------------------------- */

static bool gid_of_sockaddr(const struct sockaddr *sa, union ibv_gid *gid)
{
    memset(gid, 0, sizeof(*gid));
    if (sa->sa_family == AF_INET6) {
        memcpy(gid->raw, &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr, sizeof(gid->raw));
        return true;
    }
    if (sa->sa_family != AF_INET)
        return false;
    gid->raw[10] = gid->raw[11] = 0xff;
    memcpy(gid->raw + 12, &((const struct sockaddr_in *)(const void *)sa)->sin_addr, 4);
    return true;
}

static bool is_v4(const union ibv_gid *gid)
{
    static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

    return memcmp(gid->raw, prefix, sizeof(prefix)) == 0;
}

/* All of 127/8 belongs to the loopback interface, which lists one address of it. */
static bool has_address(const struct ifaddrs *ifa, const union ibv_gid *gid)
{
    union ibv_gid other;

    if (!ifa->ifa_addr || !gid_of_sockaddr(ifa->ifa_addr, &other))
        return false;
    if (ifa->ifa_flags & IFF_LOOPBACK && is_v4(gid) && gid->raw[12] == 127)
        return is_v4(&other);
    return memcmp(&other, gid, sizeof(other)) == 0;
}

static int interface_mtu(const char *name)
{
    struct ifreq request;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), mtu = MTU_UNKNOWN;

    if (fd < 0)
        return mtu;
    memset(&request, 0, sizeof(request));
    snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
    if (ioctl(fd, SIOCGIFMTU, &request) == 0)
        mtu = request.ifr_mtu;
    close(fd);
    return mtu;
}

static enum ibv_mtu largest_mtu(int interface)
{
    enum ibv_mtu mtu = IBV_MTU_4096;

    while (mtu > IBV_MTU_256 && (128 << mtu) + MTU_HEADERS > interface)
        mtu--;
    return mtu;
}

/* Interface and MTU of the slot's address; one that is not in the list could be bound all the same (ip(7),
 * net.ipv4.ip_nonlocal_bind), and gets no interface. */
static void find_interface(struct gid_slot *slot, const struct ifaddrs *addresses)
{
    const struct ifaddrs *ifa;

    slot->ifindex = 0;
    slot->mtu = largest_mtu(MTU_UNKNOWN);
    for (ifa = addresses; ifa; ifa = ifa->ifa_next)
        if (has_address(ifa, &slot->gid)) {
            slot->ifindex = if_nametoindex(ifa->ifa_name);
            slot->mtu = largest_mtu(interface_mtu(ifa->ifa_name));
            return;
        }
}

static int find_interfaces(struct context *ctx)
{
    struct ifaddrs *addresses;

    if (getifaddrs(&addresses))
        return errno;
    for (int i = 0; i < ctx->num_gids; i++)
        find_interface(&ctx->gids[i], addresses);
    freeifaddrs(addresses);
    return 0;
}

/* --- links --------------------------------------------------------------------------------------------------- */

/* Peers on this host are reached through memory where that can be had; where not, UDP reaches them as well. */
static void add_shared_memory(const struct context *ctx, struct gid_slot *slot)
{
    int rc = link_shm_open(&slot->link, slot->link, ctx->table);

    (void)rc;
}

static void close_links(struct context *ctx)
{
    for (int i = 0; i < ctx->num_gids; i++)
        ctx->gids[i].link->ops->close(ctx->gids[i].link);
    ctx->num_gids = 0;
}

static void complain_of_address(const union ibv_gid *gid, int rc)
{
    char text[INET6_ADDRSTRLEN];

    if (is_v4(gid))
        inet_ntop(AF_INET, gid->raw + 12, text, sizeof(text));
    else
        inet_ntop(AF_INET6, gid->raw, text, sizeof(text));
    fprintf(stderr, "usroce: address %s: %s\n", text, strerror(rc));
}

/* The machine has no such address. */
static bool is_absent(int rc)
{
    return rc == EADDRNOTAVAIL || rc == EAFNOSUPPORT || rc == EPROTONOSUPPORT;
}

/* Binds every address to `port`, or with 0 to one that is free for the first. 0 or an errno with no link open;
 * EADDRINUSE if one is taken. */
static int open_links(struct context *ctx, const struct settings *settings, uint16_t port, uint32_t *buffer)
{
    struct link_udp_options options = {.socket_buffer = settings->socket_buffer, .gso = settings->gso};

    *buffer = UINT32_MAX;
    for (int i = 0; i < settings->num_addresses; i++) {
        struct endpoint local = {.gid = settings->addresses[i], .port = port};
        struct gid_slot *slot = &ctx->gids[ctx->num_gids];
        uint32_t granted;
        int rc = link_udp_open(&slot->link, &local, &options, &ctx->counters, &granted);

        if (rc && is_absent(rc) && settings->default_addresses && i > 0)
            continue;
        if (rc) {
            if (rc != EADDRINUSE)
                complain_of_address(&local.gid, rc);
            close_links(ctx);
            return rc;
        }
        if (settings->shm)
            add_shared_memory(ctx, slot);
        slot->gid = local.gid;
        port = slot->link->local.port;
        *buffer = granted < *buffer ? granted : *buffer;
        ctx->num_gids++;
    }
    ctx->udp_port = port;
    return 0;
}

static int find_port(struct context *ctx, const struct settings *settings)
{
    uint32_t buffer;
    int rc = open_links(ctx, settings, ROCE_UDP_PORT, &buffer);

    for (int i = 0; rc == EADDRINUSE && i < PORT_ATTEMPTS; i++)
        rc = open_links(ctx, settings, 0, &buffer);
    if (rc)
        return rc;
    ctx->window_bytes = buffer / 2 < WINDOW_MAX ? buffer / 2 : WINDOW_MAX;
    if (ctx->window_bytes < WINDOW_MIN)
        ctx->window_bytes = WINDOW_MIN;
    return 0;
}

/* The fault link is on top: a capture shows what was really sent. */
static struct link **capture_place(struct gid_slot *slot)
{
    return link_is_fault(slot->link) ? &slot->link->below : &slot->link;
}

static void remove_faults(struct context *ctx)
{
    for (int i = 0; i < ctx->num_gids; i++)
        if (link_is_fault(ctx->gids[i].link))
            ctx->gids[i].link = link_unwrap(ctx->gids[i].link);
}

/* NULL: none. Where it fails, there are none either. */
static int set_faults(struct context *ctx, const struct usroce_fault *fault)
{
    int rc = 0;

    for (int i = 0; fault && i < ctx->num_gids && !rc; i++) {
        struct link **top = &ctx->gids[i].link;

        rc = link_is_fault(*top) ? link_fault_set(*top, fault) : link_fault_open(top, *top, fault);
    }
    if (rc || !fault)
        remove_faults(ctx);
    return rc;
}

static void remove_capture(struct context *ctx)
{
    for (int i = 0; i < ctx->num_gids; i++) {
        struct link **place = capture_place(&ctx->gids[i]);

        if (link_is_pcap(*place))
            *place = link_unwrap(*place);
    }
}

/* Puts the process id for "%p", so that several processes do not write to one file. False: too long. */
static bool expand_path(const char *path, char *out, size_t size)
{
    while (*path) {
        int length = path[0] == '%' && path[1] == 'p' ? snprintf(out, size, "%ld", (long)getpid())
                                                      : snprintf(out, size, "%c", *path);

        if (length < 0 || (size_t)length >= size)
            return false;
        path += path[0] == '%' && path[1] == 'p' ? 2 : 1;
        out += length;
        size -= (size_t)length;
    }
    *out = '\0';
    return true;
}

/* Replaces a capture that is under way once the new file is open. */
static int set_capture(struct context *ctx, const char *path, bool append)
{
    struct capture *capture;
    char expanded[512];
    int rc;

    if (!expand_path(path, expanded, sizeof(expanded)))
        return ENAMETOOLONG;
    rc = capture_open(&capture, expanded, append);
    if (rc)
        return rc;
    remove_capture(ctx);
    for (int i = 0; i < ctx->num_gids && !rc; i++) {
        struct link **place = capture_place(&ctx->gids[i]);

        rc = link_pcap_open(place, *place, capture);
    }
    if (rc)
        remove_capture(ctx);
    capture_release(capture); /* the links hold it */
    return rc;
}

static int set_wrappers(struct context *ctx, const struct settings *settings)
{
    int rc = 0;

    if (settings->capture[0]) {
        rc = set_capture(ctx, settings->capture, true); /* every device of the process, and of others */
        if (rc)
            fprintf(stderr, "usroce: capture to %s: %s\n", settings->capture, strerror(rc));
    }
    if (!rc && settings->has_fault)
        rc = set_faults(ctx, &settings->fault);
    return rc;
}

static bool is_probability(double value)
{
    return value >= 0 && value <= 1;
}

static bool is_valid(const struct usroce_fault *fault)
{
    return is_probability(fault->drop) && is_probability(fault->duplicate) && is_probability(fault->reorder) &&
           is_probability(fault->corrupt) && is_probability(fault->delay);
}

int context_check_ours(const struct ibv_context *context)
{
    if (context->device != &the_device)
        return ENOTSUP;
    return context_is_foreign(context_of((struct ibv_context *)context)) ? ENODEV : 0;
}

EXPORT int usroce_set_fault(struct ibv_context *context, const struct usroce_fault *fault)
{
    struct context *ctx;
    int rc = context_check_ours(context);

    if (rc)
        return rc;
    if (fault && !is_valid(fault))
        return EINVAL;
    ctx = context_of(context);
    pthread_mutex_lock(&ctx->lock);
    rc = set_faults(ctx, fault);
    table_set_open(ctx);
    sleep_links_changed(ctx);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT int usroce_capture(struct ibv_context *context, const char *path)
{
    struct context *ctx;
    int rc = context_check_ours(context);

    if (rc)
        return rc;
    ctx = context_of(context);
    pthread_mutex_lock(&ctx->lock);
    if (path)
        rc = set_capture(ctx, path, false);
    else
        remove_capture(ctx);
    table_set_open(ctx);
    sleep_links_changed(ctx);
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

EXPORT int usroce_query_counters(struct ibv_context *context, struct usroce_counters *counters, size_t size)
{
    struct context *ctx;
    int rc = context_check_ours(context);

    if (rc)
        return rc;
    ctx = context_of(context);
    memset(counters, 0, size);
    pthread_mutex_lock(&ctx->lock);
    memcpy(counters, &ctx->counters, size < sizeof(*counters) ? size : sizeof(*counters));
    pthread_mutex_unlock(&ctx->lock);
    return 0;
}

/* --- attributes ---------------------------------------------------------------------------------------------- */

static void fill_device_attr(const struct context *ctx, struct ibv_device_attr *attr)
{
    memset(attr, 0, sizeof(*attr));
    strcpy(attr->fw_ver, "usroce");
    attr->node_guid = attr->sys_image_guid = ctx->node_guid;
    attr->max_mr_size = INT64_MAX;
    attr->page_size_cap = ~(uint64_t)0xfff;
    attr->max_qp = MAX_QP;
    attr->max_qp_wr = MAX_QP_WR;
    attr->device_cap_flags = IBV_DEVICE_CURR_QP_STATE_MOD | IBV_DEVICE_SYS_IMAGE_GUID | IBV_DEVICE_RC_RNR_NAK_GEN |
                             IBV_DEVICE_SRQ_RESIZE | IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    attr->max_sge = attr->max_sge_rd = attr->max_srq_sge = MAX_SGE;
    attr->max_cq = attr->max_pd = attr->max_ah = attr->max_srq = 65536;
    attr->max_cqe = MAX_CQE;
    attr->max_mr = attr->max_mw = 1 << 20;
    attr->max_qp_rd_atom = attr->max_qp_init_rd_atom = MAX_RD_ATOMIC;
    attr->max_res_rd_atom = MAX_QP * MAX_RD_ATOMIC;
    attr->atomic_cap = IBV_ATOMIC_GLOB; /* they are the processor's */
    attr->max_srq_wr = MAX_QP_WR;
    attr->max_pkeys = 1;
    attr->local_ca_ack_delay = 15;
    attr->phys_port_cnt = 1;
}

EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
    const struct context *ctx = context_of(context);

    if (context_is_foreign(ctx))
        return ENODEV;
    fill_device_attr(ctx, attr);
    return 0;
}

/* `size` is that of the caller's struct, which may be older or newer than ours. */
static int query_device_ex(struct ibv_context *context, const struct ibv_query_device_ex_input *input,
                           struct ibv_device_attr_ex *attr, size_t size)
{
    const struct context *ctx = context_of(context);
    struct ibv_device_attr_ex all;

    if (context_is_foreign(ctx))
        return ENODEV;
    if ((input && input->comp_mask) || size < sizeof(attr->orig_attr))
        return EINVAL;
    memset(&all, 0, sizeof(all));
    fill_device_attr(ctx, &all.orig_attr);
    all.completion_timestamp_mask = UINT64_MAX;
    all.hca_core_clock = CLOCK_KHZ;
    all.device_cap_flags_ex = all.orig_attr.device_cap_flags;
    all.phys_port_cnt_ex = 1;
    memset(attr, 0, size);
    memcpy(attr, &all, size < sizeof(all) ? size : sizeof(all));
    return 0;
}

static int query_rt_values(struct ibv_context *context, struct ibv_values_ex *values)
{
    uint32_t asked = values->comp_mask;

    if (context_is_foreign(context_of(context)))
        return ENODEV;
    values->comp_mask = asked & IBV_VALUES_MASK_RAW_CLOCK;
    if (values->comp_mask) {
        uint64_t now = now_ns();

        values->raw_clock.tv_sec = 0; /* ticks of the completion clock, as hardware has them here */
        values->raw_clock.tv_nsec = (long)now;
    }
    return 0;
}

static void fill_port_attr(const struct context *ctx, struct ibv_port_attr *attr)
{
    memset(attr, 0, sizeof(*attr));
    attr->state = IBV_PORT_ACTIVE;
    attr->max_mtu = IBV_MTU_4096;
    attr->active_mtu = IBV_MTU_256;
    for (int i = 0; i < ctx->num_gids; i++)
        if (ctx->gids[i].mtu > attr->active_mtu)
            attr->active_mtu = ctx->gids[i].mtu;
    attr->gid_tbl_len = ctx->num_gids;
    attr->port_cap_flags = IBV_PORT_IP_BASED_GIDS;
    attr->max_msg_sz = (uint32_t)MAX_MSG;
    attr->pkey_tbl_len = 1;
    attr->lid = ctx->udp_port;
    attr->max_vl_num = 1;
    attr->active_width = WIDTH_4X;
    attr->active_speed = SPEED_25G;
    attr->phys_state = PHYS_STATE_LINK_UP;
    attr->link_layer = IBV_LINK_LAYER_ETHERNET;
    attr->flags = IBV_QPF_GRH_REQUIRED;
}

static int query_port(struct ibv_context *context, uint8_t port_num, struct ibv_port_attr *attr, size_t size)
{
    const struct context *ctx = context_of(context);
    struct ibv_port_attr all;

    if (context_is_foreign(ctx))
        return ENODEV;
    if (port_num != PORT)
        return EINVAL;
    fill_port_attr(ctx, &all);
    memset(attr, 0, size);
    memcpy(attr, &all, size < sizeof(all) ? size : sizeof(all));
    return 0;
}

/* For programs from before the attributes grew: port_cap_flags2 is not in theirs. */
EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port_num, struct _compat_ibv_port_attr *attr)
{
    return query_port(context, port_num, (struct ibv_port_attr *)(void *)attr,
                      offsetof(struct ibv_port_attr, port_cap_flags2));
}

/* --- GIDs and P_Keys ----------------------------------------------------------------------------------------- */

/* NULL and errno EINVAL: no such port or index. The table is fixed while the device is open, so nothing here
 * locks. */
static const struct gid_slot *slot_at(struct ibv_context *context, uint32_t port_num, uint32_t index)
{
    const struct context *ctx = context_of(context);

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return NULL;
    }
    if (port_num != PORT || index >= (uint32_t)ctx->num_gids) {
        errno = EINVAL;
        return NULL;
    }
    return &ctx->gids[index];
}

EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port_num, int index, union ibv_gid *gid)
{
    const struct gid_slot *slot = slot_at(context, port_num, (uint32_t)index);

    if (!slot)
        return -1;
    *gid = slot->gid;
    return 0;
}

/* `size` is that of the caller's struct. */
static void fill_entry(const struct gid_slot *slot, uint32_t index, void *entry, size_t size)
{
    struct ibv_gid_entry all = {
        .gid = slot->gid,
        .gid_index = index,
        .port_num = PORT,
        .gid_type = IBV_GID_TYPE_ROCE_V2,
        .ndev_ifindex = slot->ifindex,
    };

    memset(entry, 0, size);
    memcpy(entry, &all, size < sizeof(all) ? size : sizeof(all));
}

EXPORT int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port_num, uint32_t gid_index,
                             struct ibv_gid_entry *entry, uint32_t flags, size_t entry_size)
{
    const struct gid_slot *slot;

    if (flags)
        return EOPNOTSUPP;
    slot = slot_at(context, port_num, gid_index);
    if (!slot)
        return errno;
    fill_entry(slot, gid_index, entry, entry_size);
    return 0;
}

EXPORT ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries, size_t max_entries,
                                    uint32_t flags, size_t entry_size)
{
    const struct context *ctx = context_of(context);

    if (context_is_foreign(ctx))
        return -ENODEV;
    if (flags)
        return -EOPNOTSUPP;
    if (max_entries < (size_t)ctx->num_gids)
        return -EINVAL;
    for (int i = 0; i < ctx->num_gids; i++)
        fill_entry(&ctx->gids[i], (uint32_t)i, (char *)entries + (size_t)i * entry_size, entry_size);
    return ctx->num_gids;
}

/* Of the library's private interface, for programs of its own package. */
enum sysfs_gid_type { SYSFS_GID_IB_ROCE_V1, SYSFS_GID_ROCE_V2 };

int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num, unsigned int index,
                       enum sysfs_gid_type *type);

EXPORT int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num, unsigned int index,
                              enum sysfs_gid_type *type)
{
    if (!slot_at(context, port_num, index))
        return -1;
    *type = SYSFS_GID_ROCE_V2;
    return 0;
}

EXPORT int ibv_query_pkey(struct ibv_context *context, uint8_t port_num, int index, __be16 *pkey)
{
    if (context_is_foreign(context_of(context)) || port_num != PORT || index != 0) {
        errno = EINVAL;
        return -1;
    }
    *pkey = htobe16(WIRE_PKEY);
    return 0;
}

EXPORT int ibv_get_pkey_index(struct ibv_context *context, uint8_t port_num, __be16 pkey)
{
    if (context_is_foreign(context_of(context)) || port_num != PORT || pkey != htobe16(WIRE_PKEY)) {
        errno = EINVAL;
        return -1;
    }
    return 0;
}

/* --- open and close ------------------------------------------------------------------------------------------ */

static void set_operations(struct verbs_context *verbs)
{
    struct ibv_context_ops *ops = &verbs->context.ops;

    verbs->sz = sizeof(*verbs);
    verbs->context.abi_compat = __VERBS_ABI_IS_EXTENDED;
    verbs->query_port = query_port;
    verbs->query_device_ex = query_device_ex;
    verbs->query_rt_values = query_rt_values;
    verbs->create_cq_ex = cq_create_ex;
    verbs->create_qp_ex = qp_create_ex;
    verbs->create_srq_ex = srq_create_ex;
    verbs->get_srq_num = srq_get_num;
    ops->poll_cq = cq_poll;
    ops->req_notify_cq = cq_arm;
    ops->post_send = qp_post_send;
    ops->post_recv = qp_post_recv;
    ops->post_srq_recv = srq_post;
    ops->alloc_mw = mw_alloc;
    ops->dealloc_mw = mw_dealloc;
    ops->bind_mw = qp_bind_mw;
}

/* What needs nothing from outside. */
static void init_context(struct context *ctx, const struct settings *settings)
{
    struct ibv_context *base = &ctx->verbs.context;

    set_operations(&ctx->verbs);
    base->device = &the_device;
    base->cmd_fd = -1;
    base->num_comp_vectors = COMP_VECTORS;
    pthread_mutex_init(&base->mutex, NULL);
    pthread_mutex_init(&ctx->lock, NULL);
    ctx->generation = atomic_load(&generation);
    ctx->node_guid = device_guid();
    ctx->count_locked = settings->count_locked;
    idmap_init(&ctx->qps);
    idmap_init(&ctx->keys);
    list_init(&ctx->all_qps);
    list_init(&ctx->bound_windows);
    list_init(&ctx->async_ready);
}

static void free_context(struct context *ctx)
{
    idmap_free(&ctx->keys);
    idmap_free(&ctx->qps);
    pthread_mutex_destroy(&ctx->lock);
    pthread_mutex_destroy(&ctx->verbs.context.mutex);
    free(ctx);
}

/* 0 or an errno with everything undone. */
static int open_parts(struct context *ctx, const struct settings *settings)
{
    int rc;

    if (settings->shm && settings->direct)
        ctx->table = table_create(); /* without it packets do the same */
    rc = find_port(ctx, settings);
    if (rc)
        goto fail_table;
    rc = find_interfaces(ctx);
    if (rc)
        goto fail_links;
    rc = set_wrappers(ctx, settings);
    if (rc)
        goto fail_links;
    table_set_open(ctx);
    ctx->verbs.context.async_fd = eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC);
    if (ctx->verbs.context.async_fd < 0) {
        rc = errno;
        goto fail_links;
    }
    rc = tx_init(ctx);
    if (rc)
        goto fail_fd;
    rc = sleep_init(ctx);
    if (rc)
        goto fail_tx;
    rc = progress_init(ctx);
    if (rc)
        goto fail_sleep;
    return 0;

fail_sleep:
    sleep_free(ctx);
fail_tx:
    tx_free(ctx);
fail_fd:
    close(ctx->verbs.context.async_fd);
fail_links:
    close_links(ctx);
fail_table:
    table_free(ctx->table);
    return rc;
}

EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    struct settings settings;
    struct context *ctx;
    int rc = device == &the_device ? settings_read(&settings) : ENODEV;

    if (rc) {
        errno = rc;
        return NULL;
    }
    ctx = calloc(1, sizeof(*ctx));
    if (!ctx)
        return NULL;
    init_context(ctx, &settings);
    rc = open_parts(ctx, &settings);
    if (rc) {
        free_context(ctx);
        errno = rc;
        return NULL;
    }
    return &ctx->verbs.context;
}

static bool has_objects(const struct context *ctx)
{
    return ctx->num_pds || ctx->num_cqs || ctx->num_channels;
}

void context_unlock(struct context *ctx)
{
    bool is_last = ctx->closed && !has_objects(ctx);

    pthread_mutex_unlock(&ctx->lock);
    if (is_last) {
        tx_free(ctx);
        free_context(ctx);
    }
}

/* Nothing is sent or received any more by objects that the application forgot to destroy. */
static void silence(struct context *ctx)
{
    for (struct list *entry = ctx->all_qps.next; entry != &ctx->all_qps; entry = entry->next)
        qp_to_error(ctx, list_entry(entry, struct qp, in_all), NO_EVENT);
}

/* As with a kernel device, what is left is dead from now on, and that is no error: perftest leaves a completion
 * queue. The context stays in memory as long as objects point to it. */
EXPORT int ibv_close_device(struct ibv_context *context)
{
    struct context *ctx = context_of(context);

    if (context_is_foreign(ctx))
        return ENODEV;
    thread_stop(ctx);
    pthread_mutex_lock(&ctx->lock);
    silence(ctx);
    async_forget_all(ctx);
    sleep_free(ctx);
    progress_free(ctx);
    close(context->async_fd);
    context->async_fd = -1;
    table_close(ctx);
    close_links(ctx);
    table_free(ctx->table);
    ctx->table = NULL;
    ctx->closed = true;
    context_unlock(ctx);
    return 0;
}
