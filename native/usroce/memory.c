/* Protection domains, memory regions, memory windows, and the check that every access goes through.
 *
 * A key's upper 24 bits say which key it is, the lower 8 are a tag: both are unpredictable for regions, and the
 * tag of a window changes with each binding. Local and remote key of a region are the same number. Windows have
 * keys of their own that are valid only while bound; key_local() does not take them, as no device does.
 *
 * Nothing is pinned, but registering makes sure that the memory is there: see present.c. */
#define _GNU_SOURCE /* syscall */
#include "usroce.h"

#include <errno.h>
#include <linux/capability.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    KEY_TAG_BITS = 8,
    KEY_MIN = 1,
    KEY_MAX = 0xffffff,
    CHANGING_RIGHTS = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
    MR_ACCESS = IBV_ACCESS_LOCAL_WRITE | REMOTE_RIGHTS | IBV_ACCESS_MW_BIND | IBV_ACCESS_ZERO_BASED |
                IBV_ACCESS_HUGETLB,
};

/* Stands for memory of length 0, which no key is needed for and nobody reads. */
static uint8_t nowhere;

static struct pd *pd_of(struct ibv_pd *base)
{
    return (struct pd *)(void *)base;
}

static struct mr *mr_of(struct ibv_mr *base)
{
    return (struct mr *)(void *)base;
}

static struct mw *mw_of(struct ibv_mw *base)
{
    return (struct mw *)(void *)base;
}

/* --- protection domains -------------------------------------------------------------------------------------- */

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct context *ctx = context_of(context);
    struct pd *pd;

    if (context_is_foreign(ctx)) {
        errno = ENODEV;
        return NULL;
    }
    pd = calloc(1, sizeof(*pd));
    if (!pd)
        return NULL;
    pd->base.context = context;
    pthread_mutex_lock(&ctx->lock);
    pd->number = ++ctx->last_pd;
    ctx->num_pds++;
    pthread_mutex_unlock(&ctx->lock);
    return &pd->base;
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *base)
{
    struct context *ctx = context_of(base->context);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = pd_of(base)->children > 0;
    if (!busy)
        ctx->num_pds--;
    context_unlock(ctx);
    if (busy)
        return EBUSY;
    free(pd_of(base));
    return 0;
}

/* --- keys ---------------------------------------------------------------------------------------------------- */

/* Gives the key a number. 0 or ENOMEM. */
static int key_add(struct context *ctx, struct key *key)
{
    uint32_t index;
    int rc = idmap_add_random(&ctx->keys, KEY_MIN, KEY_MAX, key, &index);

    if (!rc)
        key->value = index << KEY_TAG_BITS | (random_u32() & 0xff);
    return rc;
}

static void key_remove(struct context *ctx, const struct key *key)
{
    idmap_remove(&ctx->keys, key->value >> KEY_TAG_BITS);
}

/* The valid key of that number, tag and all, or NULL. */
static struct key *key_find(const struct context *ctx, uint32_t value)
{
    struct key *key = idmap_find(&ctx->keys, value >> KEY_TAG_BITS);

    return key && key->valid && key->value == value ? key : NULL;
}

/* Where `addr` is, if `length` bytes from there are within the key's range; no sum here can overflow. */
static uint8_t *key_host(const struct key *key, uint64_t addr, uint64_t length)
{
    uint64_t offset = addr - key->iova;

    if (addr < key->iova || length > key->length || offset > key->length - length)
        return NULL;
    return key->host + offset;
}

uint8_t *key_local(struct context *ctx, struct ibv_pd *pd, uint32_t lkey, uint64_t addr, uint64_t length,
                   int access)
{
    const struct key *key;

    if (!length)
        return &nowhere;
    key = key_find(ctx, lkey);
    if (!key || key->kind != KEY_MR || key->pd != pd || (key->access & access) != access)
        return NULL;
    return key_host(key, addr, length);
}

uint8_t *key_remote(struct context *ctx, struct qp *qp, uint32_t rkey, uint64_t addr, uint64_t length, int access)
{
    const struct key *key;

    if (!length)
        return &nowhere;
    key = key_find(ctx, rkey);
    if (!key || key->pd != qp->base.pd || (key->access & access) != access)
        return NULL;
    if (key->kind == KEY_MW_TYPE_2 && key->qp_num != qp->base.qp_num)
        return NULL;
    return key_host(key, addr, length);
}

/* --- RLIMIT_MEMLOCK, where it is to be kept ------------------------------------------------------------------ */

static _Atomic uint64_t locked; /* bytes in whole pages, of all regions of the process */

void memory_forget_locked(void)
{
    atomic_store(&locked, 0);
}

static bool may_lock_everything(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

    memset(data, 0, sizeof(data));
    if (syscall(SYS_capget, &header, data))
        return false;
    return data[CAP_TO_INDEX(CAP_IPC_LOCK)].effective & CAP_TO_MASK(CAP_IPC_LOCK);
}

/* 0, or ENOMEM beyond the limit. */
static int count_locked(const void *addr, size_t length)
{
    struct rlimit limit;
    uintptr_t start;
    size_t size;
    uint64_t total;

    memory_pages(addr, length, &start, &size);
    total = atomic_fetch_add(&locked, size) + size;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) || limit.rlim_cur == RLIM_INFINITY || total <= limit.rlim_cur)
        return 0;
    if (may_lock_everything())
        return 0;
    atomic_fetch_sub(&locked, size);
    return ENOMEM;
}

static void uncount_locked(const void *addr, size_t length)
{
    uintptr_t start;
    size_t size;

    memory_pages(addr, length, &start, &size);
    atomic_fetch_sub(&locked, size);
}

/* --- regions ------------------------------------------------------------------------------------------------- */

static int check_access(int access)
{
    if (access & IBV_ACCESS_ON_DEMAND)
        return EOPNOTSUPP;
    if (access & ~(int)MR_ACCESS)
        return EINVAL;
    /* What the peer may change, the owner may (ibv_reg_mr(3)). */
    if (access & CHANGING_RIGHTS && !(access & IBV_ACCESS_LOCAL_WRITE))
        return EINVAL;
    return 0;
}

static int check_range(const void *addr, size_t length)
{
    uintptr_t mask = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;

    if (!length || length > (size_t)INT64_MAX)
        return EINVAL;
    /* The last page must not be the end of the address space either: memory_pages() could not say where it ends. */
    if ((uintptr_t)addr > UINTPTR_MAX - mask - length)
        return EINVAL;
    return 0;
}

/* Checks a region that is to be, makes its memory present and counts it. */
static int claim_memory(const struct context *ctx, const void *addr, size_t length, int access)
{
    int rc = check_access(access);

    if (!rc)
        rc = check_range(addr, length);
    if (!rc && ctx->count_locked)
        rc = count_locked(addr, length);
    if (rc)
        return rc;
    rc = memory_make_present(addr, length, access & IBV_ACCESS_LOCAL_WRITE);
    if (rc && ctx->count_locked)
        uncount_locked(addr, length);
    return rc;
}

static void release_memory(const struct context *ctx, const void *addr, size_t length)
{
    if (ctx->count_locked)
        uncount_locked(addr, length);
}

static void set_region(struct mr *mr, struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, int access)
{
    mr->base.pd = pd;
    mr->base.addr = addr;
    mr->base.length = length;
    mr->key.pd = pd;
    mr->key.host = addr;
    mr->key.length = length;
    mr->key.iova = access & IBV_ACCESS_ZERO_BASED ? 0 : iova;
    mr->key.access = access;
}

static int publish_region(struct context *ctx, struct mr *mr)
{
    int rc;

    pthread_mutex_lock(&ctx->lock);
    rc = key_add(ctx, &mr->key);
    if (!rc) {
        mr->base.lkey = mr->base.rkey = mr->key.value;
        mr->base.handle = mr->key.value >> KEY_TAG_BITS;
        mr->key.valid = true;
        table_publish_key(ctx, &mr->key);
        pd_of(mr->base.pd)->children++;
    }
    pthread_mutex_unlock(&ctx->lock);
    return rc;
}

static struct ibv_mr *register_memory(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
                                      unsigned int flags)
{
    struct context *ctx = context_of(pd->context);
    int access = (int)(flags & ~(unsigned int)IBV_ACCESS_OPTIONAL_RANGE), rc;
    struct mr *mr;

    rc = context_is_foreign(ctx) ? ENODEV : 0;
    if (!rc && iova > UINT64_MAX - length)
        rc = EINVAL;
    if (!rc)
        rc = claim_memory(ctx, addr, length, access);
    if (rc)
        goto fail;
    mr = calloc(1, sizeof(*mr));
    if (!mr) {
        rc = ENOMEM;
        goto fail_memory;
    }
    mr->base.context = pd->context;
    mr->key.kind = KEY_MR;
    set_region(mr, pd, addr, length, iova, access);
    rc = publish_region(ctx, mr);
    if (rc)
        goto fail_mr;
    return &mr->base;

fail_mr:
    free(mr);
fail_memory:
    release_memory(ctx, addr, length);
fail:
    errno = rc;
    return NULL;
}

EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
    return register_memory(pd, addr, length, (uintptr_t)addr, (unsigned int)access);
}

EXPORT struct ibv_mr *ibv_reg_mr_iova(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, int access)
{
    return register_memory(pd, addr, length, iova, (unsigned int)access);
}

EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
                                       unsigned int access)
{
    return register_memory(pd, addr, length, iova, access);
}

EXPORT int ibv_dereg_mr(struct ibv_mr *base)
{
    struct context *ctx = context_of(base->context);
    struct mr *mr = mr_of(base);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = mr->windows > 0 || mr->posted > 0 || !table_revoke_key(ctx, &mr->key);
    if (!busy) {
        key_remove(ctx, &mr->key);
        pd_of(base->pd)->children--;
    }
    pthread_mutex_unlock(&ctx->lock);
    if (busy)
        return EBUSY;
    release_memory(ctx, base->addr, base->length);
    free(mr);
    return 0;
}

/* What a region becomes, from what it is and what is to change. The keys stay. */
struct change {
    struct ibv_pd *pd;
    void *addr;
    size_t length;
    int access;
};

static struct change changed(const struct mr *mr, int flags, struct ibv_pd *pd, void *addr, size_t length,
                             int access)
{
    struct change to = {mr->base.pd, mr->base.addr, mr->base.length, mr->key.access};

    if (flags & IBV_REREG_MR_CHANGE_PD)
        to.pd = pd;
    if (flags & IBV_REREG_MR_CHANGE_TRANSLATION) {
        to.addr = addr;
        to.length = length;
    }
    if (flags & IBV_REREG_MR_CHANGE_ACCESS)
        to.access = access & ~IBV_ACCESS_OPTIONAL_RANGE;
    return to;
}

/* False: there are windows over it. */
static bool change_region(struct context *ctx, struct mr *mr, int flags, const struct change *to)
{
    uint64_t iova = flags & IBV_REREG_MR_CHANGE_TRANSLATION ? (uintptr_t)to->addr : mr->key.iova;
    bool free_to_change;

    pthread_mutex_lock(&ctx->lock);
    free_to_change = mr->windows == 0 && table_revoke_key(ctx, &mr->key);
    if (free_to_change) {
        pd_of(mr->base.pd)->children--;
        set_region(mr, to->pd, to->addr, to->length, iova, to->access);
        pd_of(to->pd)->children++;
        table_publish_key(ctx, &mr->key);
    }
    pthread_mutex_unlock(&ctx->lock);
    return free_to_change;
}

EXPORT int ibv_rereg_mr(struct ibv_mr *base, int flags, struct ibv_pd *pd, void *addr, size_t length, int access)
{
    struct context *ctx = context_of(base->context);
    struct mr *mr = mr_of(base);
    struct change from, to;
    int rc = context_is_foreign(ctx) ? ENODEV : 0;

    if (!rc && (!flags || flags & ~IBV_REREG_MR_FLAGS_SUPPORTED))
        rc = EINVAL;
    if (!rc && flags & IBV_REREG_MR_CHANGE_PD && (!pd || pd->context != base->context))
        rc = EINVAL;
    if (!rc) {
        from = changed(mr, 0, NULL, NULL, 0, 0);
        to = changed(mr, flags, pd, addr, length, access);
        rc = claim_memory(ctx, to.addr, to.length, to.access);
    }
    if (!rc && !change_region(ctx, mr, flags, &to)) {
        release_memory(ctx, to.addr, to.length);
        rc = EBUSY;
    }
    if (rc) {
        errno = rc;
        return IBV_REREG_MR_ERR_INPUT; /* the region is what it was */
    }
    release_memory(ctx, from.addr, from.length);
    return 0;
}

/* --- windows ------------------------------------------------------------------------------------------------- */

struct ibv_mw *mw_alloc(struct ibv_pd *pd, enum ibv_mw_type type)
{
    struct context *ctx = context_of(pd->context);
    struct mw *mw;
    int rc = context_is_foreign(ctx) ? ENODEV : 0;

    if (!rc && type != IBV_MW_TYPE_1 && type != IBV_MW_TYPE_2)
        rc = EINVAL;
    mw = rc ? NULL : calloc(1, sizeof(*mw));
    if (!mw) {
        errno = rc ? rc : ENOMEM;
        return NULL;
    }
    mw->base.context = pd->context;
    mw->base.pd = mw->key.pd = pd;
    mw->base.type = type;
    mw->key.kind = type == IBV_MW_TYPE_1 ? KEY_MW_TYPE_1 : KEY_MW_TYPE_2;
    list_init(&mw->in_bound);
    pthread_mutex_lock(&ctx->lock);
    rc = key_add(ctx, &mw->key);
    if (!rc)
        pd_of(pd)->children++;
    pthread_mutex_unlock(&ctx->lock);
    if (rc) {
        free(mw);
        errno = rc;
        return NULL;
    }
    mw->base.rkey = mw->key.value;
    mw->base.handle = mw->key.value >> KEY_TAG_BITS;
    return &mw->base;
}

static void forget_binding(struct mw *mw)
{
    mw->key.valid = false;
    mw->key.region->windows--;
    mw->key.region = NULL;
    list_del(&mw->in_bound);
}

/* False: a peer on this host is stopped in the middle of an access, and the window stays as it is. */
static bool unbind(struct context *ctx, struct mw *mw)
{
    if (!mw->key.valid)
        return true;
    if (!table_revoke_key(ctx, &mw->key))
        return false;
    forget_binding(mw);
    return true;
}

int mw_dealloc(struct ibv_mw *base)
{
    struct context *ctx = context_of(base->context);
    struct mw *mw = mw_of(base);
    bool busy;

    if (context_is_foreign(ctx))
        return ENODEV;
    pthread_mutex_lock(&ctx->lock);
    busy = mw->posted > 0 || !unbind(ctx, mw);
    if (!busy) {
        key_remove(ctx, &mw->key);
        pd_of(base->pd)->children--;
    }
    pthread_mutex_unlock(&ctx->lock);
    if (busy)
        return EBUSY;
    free(mw);
    return 0;
}

void mw_count_posted(struct ibv_mw *mw, struct ibv_mr *mr, int change)
{
    mw_of(mw)->posted += (unsigned int)change;
    if (mr)
        mr_of(mr)->posted += (unsigned int)change;
}

/* Whether the window may become what is asked for (IBA 10.6.7.2.2); `info->mr` is there. */
static bool may_bind(const struct qp *qp, const struct mw *mw, const struct ibv_mw_bind_info *info)
{
    const struct mr *mr = mr_of(info->mr);
    int access = (int)info->mw_access_flags, allowed = REMOTE_RIGHTS;

    if (mw->key.kind == KEY_MW_TYPE_2)
        allowed |= IBV_ACCESS_ZERO_BASED;
    if (access & ~allowed || !info->length)
        return false;
    if (mr->key.pd != mw->key.pd || mr->key.pd != qp->base.pd)
        return false;
    if (!(mr->key.access & IBV_ACCESS_MW_BIND))
        return false;
    if (access & CHANGING_RIGHTS && !(mr->key.access & IBV_ACCESS_LOCAL_WRITE))
        return false;
    return key_host(&mr->key, info->addr, info->length) != NULL;
}

static void bind(struct context *ctx, const struct qp *qp, struct mw *mw, const struct ibv_mw_bind_info *info)
{
    struct mr *mr = mr_of(info->mr);

    mw->key.valid = true;
    mw->key.region = mr;
    mw->key.host = key_host(&mr->key, info->addr, info->length);
    mw->key.iova = info->mw_access_flags & IBV_ACCESS_ZERO_BASED ? 0 : info->addr;
    mw->key.length = info->length;
    mw->key.access = (int)info->mw_access_flags;
    mw->key.qp_num = qp->base.qp_num;
    mr->windows++;
    list_add_tail(&ctx->bound_windows, &mw->in_bound);
    table_publish_key(ctx, &mw->key);
}

/* A window of type 1 is bound anew over what it had, or with length 0 to nothing. One of type 2 must be unbound,
 * its key is chosen by the application up to the number, and it serves the queue pair that bound it. */
enum ibv_wc_status mw_bind(struct context *ctx, struct qp *qp, struct ibv_mw *base, uint32_t new_rkey,
                           const struct ibv_mw_bind_info *info)
{
    struct mw *mw = mw_of(base);
    bool to_nothing = mw->key.kind == KEY_MW_TYPE_1 && !info->length;

    if (new_rkey >> KEY_TAG_BITS != mw->key.value >> KEY_TAG_BITS)
        return IBV_WC_MW_BIND_ERR;
    if (mw->key.kind == KEY_MW_TYPE_2 && mw->key.valid)
        return IBV_WC_MW_BIND_ERR;
    if (to_nothing ? mw->key.pd != qp->base.pd : !info->mr || !may_bind(qp, mw, info))
        return IBV_WC_MW_BIND_ERR;
    if (!unbind(ctx, mw))
        return IBV_WC_MW_BIND_ERR;
    mw->key.value = new_rkey;
    if (!to_nothing)
        bind(ctx, qp, mw, info);
    if (mw->key.kind == KEY_MW_TYPE_1)
        base->rkey = new_rkey;
    return IBV_WC_SUCCESS;
}

static struct mw *mw_of_key(struct key *key)
{
    return list_entry(key, struct mw, key);
}

bool key_invalidate(struct context *ctx, struct qp *qp, uint32_t rkey)
{
    struct key *key = key_find(ctx, rkey);

    if (!key || key->kind != KEY_MW_TYPE_2 || key->pd != qp->base.pd || key->qp_num != qp->base.qp_num)
        return false;
    return unbind(ctx, mw_of_key(key));
}

void mw_unbind_all(struct context *ctx, uint32_t qp_num)
{
    struct list *entry = ctx->bound_windows.next;

    while (entry != &ctx->bound_windows) {
        struct mw *mw = list_entry(entry, struct mw, in_bound);

        entry = entry->next;
        if (mw->key.kind != KEY_MW_TYPE_2 || mw->key.qp_num != qp_num || unbind(ctx, mw))
            continue;
        table_abandon_key(&mw->key); /* the queue pair is unknown to peers by now */
        forget_binding(mw);
    }
}
