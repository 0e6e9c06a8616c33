/* Opens a verbs library at run time and fills the function table from it.
 *
 * Nothing is linked against libibverbs: a machine without it can import the package and is told what is
 * missing when a device is asked for, and any library with the same symbols (and the same struct layouts,
 * which the headers fix) can stand in its place. dlsym() finds the default version of a versioned symbol. */
#include "glue.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

struct symbol {
    const char *name;
    size_t offset; /* in struct glue_provider */
    int optional;
};

#define SYMBOL(member, symbol_name) {symbol_name, offsetof(struct glue_provider, member), 0}
#define OPTIONAL(member, symbol_name) {symbol_name, offsetof(struct glue_provider, member), 1}

static const struct symbol symbols[] = {
    SYMBOL(get_device_list, "ibv_get_device_list"),
    SYMBOL(free_device_list, "ibv_free_device_list"),
    SYMBOL(open_device, "ibv_open_device"),
    SYMBOL(close_device, "ibv_close_device"),
    SYMBOL(query_device, "ibv_query_device"),
    SYMBOL(query_port, "ibv_query_port"),
    SYMBOL(query_gid_table, "_ibv_query_gid_table"),
    SYMBOL(get_async_event, "ibv_get_async_event"),
    SYMBOL(ack_async_event, "ibv_ack_async_event"),
    SYMBOL(alloc_pd, "ibv_alloc_pd"),
    SYMBOL(dealloc_pd, "ibv_dealloc_pd"),
    SYMBOL(reg_mr, "ibv_reg_mr"),
    SYMBOL(dereg_mr, "ibv_dereg_mr"),
    SYMBOL(create_comp_channel, "ibv_create_comp_channel"),
    SYMBOL(destroy_comp_channel, "ibv_destroy_comp_channel"),
    SYMBOL(create_cq, "ibv_create_cq"),
    SYMBOL(destroy_cq, "ibv_destroy_cq"),
    SYMBOL(get_cq_event, "ibv_get_cq_event"),
    SYMBOL(ack_cq_events, "ibv_ack_cq_events"),
    SYMBOL(create_srq, "ibv_create_srq"),
    SYMBOL(modify_srq, "ibv_modify_srq"),
    SYMBOL(destroy_srq, "ibv_destroy_srq"),
    SYMBOL(create_qp, "ibv_create_qp"),
    SYMBOL(modify_qp, "ibv_modify_qp"),
    SYMBOL(query_qp, "ibv_query_qp"),
    SYMBOL(destroy_qp, "ibv_destroy_qp"),
    OPTIONAL(is_fork_initialized, "ibv_is_fork_initialized"),
    OPTIONAL(usroce_set_option, "usroce_set_option"),
    OPTIONAL(usroce_set_fault, "usroce_set_fault"),
    OPTIONAL(usroce_capture, "usroce_capture"),
    OPTIONAL(usroce_query_counters, "usroce_query_counters"),
    OPTIONAL(usroce_alloc, "usroce_alloc"),
    OPTIONAL(usroce_free, "usroce_free"),
    OPTIONAL(usroce_unshare, "usroce_unshare"),
    OPTIONAL(usroce_watch_channel, "usroce_watch_channel"),
    OPTIONAL(usroce_newest_first, "usroce_newest_first"),
};

/* Opens the library at `path`. Returns 0, ENOENT when it cannot be opened, or ENOSYS when it lacks a symbol;
 * in both cases `error` receives the loader's text. On failure the table is all zero. */
int glue_provider_open(const char *path, struct glue_provider *provider, char *error, size_t error_size)
{
    const char *text;

    memset(provider, 0, sizeof(*provider));
    provider->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!provider->handle) {
        text = dlerror();
        snprintf(error, error_size, "%s", text ? text : path);
        return ENOENT;
    }
    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
        void *address = dlsym(provider->handle, symbols[i].name);

        if (!address && !symbols[i].optional) {
            snprintf(error, error_size, "%s has no symbol %s", path, symbols[i].name);
            glue_provider_close(provider);
            return ENOSYS;
        }
        /* POSIX lets a pointer from dlsym() be stored as a function pointer; memcpy keeps ISO C quiet. */
        memcpy((char *)provider + symbols[i].offset, &address, sizeof(address));
    }
    return 0;
}

/* Forgets the library. Nothing opened through it may be alive any more. */
void glue_provider_close(struct glue_provider *provider)
{
    if (provider->handle)
        dlclose(provider->handle);
    memset(provider, 0, sizeof(*provider));
}
