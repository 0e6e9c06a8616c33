/* Settings: what the environment says when a device is listed or opened, unless usroce_set_option() said
 * otherwise.
 *
 * Each setting is one row of a table: its name, and a parser that fills its part of struct settings or says what
 * is wrong. A value is checked when it is set and read when it is used, by the same parser. */
#define _GNU_SOURCE /* strtod_l */
#include "usroce.h"

#include <arpa/inet.h>
#include <errno.h>
#include <locale.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SOCKET_BUFFER = 8 << 20 }; /* asked for, where nobody says; the kernel grants less without a raised limit */

/* NULL, or what is wrong with the text. */
typedef const char *parser(struct settings *settings, const char *text);

/* --- parsers ------------------------------------------------------------------------------------------------- */

static bool parse_address(const char *text, union ibv_gid *gid)
{
    memset(gid, 0, sizeof(*gid));
    if (inet_pton(AF_INET6, text, gid->raw) == 1)
        return true;
    gid->raw[10] = gid->raw[11] = 0xff;
    return inet_pton(AF_INET, text, gid->raw + 12) == 1;
}

static bool is_listed(const struct settings *settings, const union ibv_gid *gid)
{
    for (int i = 0; i < settings->num_addresses; i++)
        if (memcmp(&settings->addresses[i], gid, sizeof(*gid)) == 0)
            return true;
    return false;
}

/* Takes the next item of a comma-separated list, without blanks around it. False at the end. An item that does not
 * fit is cut: `size` is beyond anything that has a meaning. */
static bool next_item(const char **text, char *item, size_t size)
{
    size_t length;

    if (!*text)
        return false;
    *text += strspn(*text, " ");
    length = strcspn(*text, ",");
    snprintf(item, size, "%.*s", (int)length, *text);
    *text = (*text)[length] ? *text + length + 1 : NULL;
    for (length = strlen(item); length && item[length - 1] == ' '; length--)
        item[length - 1] = '\0';
    return true;
}

static const char *parse_addresses(struct settings *settings, const char *text)
{
    char item[INET6_ADDRSTRLEN + 1];

    settings->num_addresses = 0;
    settings->default_addresses = false;
    while (next_item(&text, item, sizeof(item))) {
        union ibv_gid gid;

        if (!parse_address(item, &gid))
            return "a comma-separated list of IPv4 and IPv6 addresses is needed";
        if (is_listed(settings, &gid))
            return "an address is there twice";
        if (settings->num_addresses == MAX_GIDS)
            return "too many addresses (16 are taken)";
        settings->addresses[settings->num_addresses++] = gid;
    }
    return NULL;
}

static const char *parse_capture(struct settings *settings, const char *text)
{
    if (strlen(text) >= sizeof(settings->capture))
        return "the path is too long";
    strcpy(settings->capture, text);
    return NULL;
}

/* With a point, whatever the application's locale has there. */
static bool parse_probability(const char *text, double *value)
{
    locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    char *end;

    if (!plain)
        return false;
    *value = strtod_l(text, &end, plain);
    freelocale(plain);
    return end != text && !*end && *value >= 0 && *value <= 1;
}

static bool parse_number(const char *text, uint64_t max, uint64_t *value)
{
    char *end;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return !errno && !*end && *value <= max;
}

/* One `key=value` of the fault setting. */
static const char *parse_fault_item(struct usroce_fault *fault, const char *key, const char *text)
{
    struct {
        const char *key;
        double *value;
    } probabilities[] = {
        {"drop", &fault->drop},       {"duplicate", &fault->duplicate}, {"reorder", &fault->reorder},
        {"corrupt", &fault->corrupt}, {"delay", &fault->delay},
    };
    uint64_t number;

    for (size_t i = 0; i < sizeof(probabilities) / sizeof(probabilities[0]); i++)
        if (strcmp(key, probabilities[i].key) == 0)
            return parse_probability(text, probabilities[i].value) ? NULL : "a probability is not from 0 to 1";
    if (strcmp(key, "seed") == 0)
        return parse_number(text, UINT64_MAX, &fault->seed) ? NULL : "seed is not a number";
    if (strcmp(key, "delay_us") && strcmp(key, "reorder_gap"))
        return "known are drop, duplicate, reorder, corrupt, delay, delay_us, reorder_gap and seed";
    if (!parse_number(text, UINT32_MAX, &number))
        return "delay_us or reorder_gap is not a number of 32 bits";
    *(key[0] == 'd' ? &fault->delay_us : &fault->reorder_gap) = (uint32_t)number;
    return NULL;
}

static const char *parse_fault(struct settings *settings, const char *text)
{
    char item[64];

    memset(&settings->fault, 0, sizeof(settings->fault));
    while (next_item(&text, item, sizeof(item))) {
        char *value = strchr(item, '=');
        const char *wrong;

        if (!value)
            return "a comma-separated list of name=value is needed";
        *value = '\0';
        wrong = parse_fault_item(&settings->fault, item, value + 1);
        if (wrong)
            return wrong;
    }
    settings->has_fault = true;
    return NULL;
}

static const char *parse_socket_buffer(struct settings *settings, const char *text)
{
    uint64_t number;

    if (!parse_number(text, INT32_MAX, &number) || !number)
        return "a number of bytes is needed";
    settings->socket_buffer = (uint32_t)number;
    return NULL;
}

static const char *parse_switch(bool *on, const char *text)
{
    if (strcmp(text, "0") && strcmp(text, "1"))
        return "0 or 1 is needed";
    *on = text[0] == '1';
    return NULL;
}

static const char *parse_gso(struct settings *settings, const char *text)
{
    return parse_switch(&settings->gso, text);
}

static const char *parse_shm(struct settings *settings, const char *text)
{
    return parse_switch(&settings->shm, text);
}

static const char *parse_direct(struct settings *settings, const char *text)
{
    return parse_switch(&settings->direct, text);
}

static const char *parse_memlock(struct settings *settings, const char *text)
{
    return parse_switch(&settings->count_locked, text);
}

/* --- the table ----------------------------------------------------------------------------------------------- */

static struct setting {
    const char *name, *variable;
    parser *parse;
    char *value; /* set by usroce_set_option(), else NULL; process_lock covers it */
} table[] = {
    {"address", "AIORDMA_USROCE_ADDRESS", parse_addresses, NULL},
    {"pcap", "AIORDMA_USROCE_PCAP", parse_capture, NULL},
    {"fault", "AIORDMA_USROCE_FAULT", parse_fault, NULL},
    {"socket_buffer", "AIORDMA_USROCE_SOCKET_BUFFER", parse_socket_buffer, NULL},
    {"gso", "AIORDMA_USROCE_GSO", parse_gso, NULL},
    {"shm", "AIORDMA_USROCE_SHM", parse_shm, NULL},
    {"direct", "AIORDMA_USROCE_DIRECT", parse_direct, NULL},
    {"memlock", "AIORDMA_USROCE_MEMLOCK", parse_memlock, NULL},
};

enum { SETTINGS = sizeof(table) / sizeof(table[0]) };

/* The process ends, or the library is unloaded. */
__attribute__((destructor)) static void forget_values(void)
{
    for (int i = 0; i < SETTINGS; i++) {
        free(table[i].value);
        table[i].value = NULL;
    }
}

static void set_defaults(struct settings *settings)
{
    memset(settings, 0, sizeof(*settings));
    parse_addresses(settings, "127.0.0.1,::1");
    settings->default_addresses = true;
    settings->socket_buffer = SOCKET_BUFFER;
    settings->gso = true;
    settings->shm = settings->direct = true;
}

/* An empty variable is one that is not set. */
static int read_setting(struct settings *settings, const struct setting *setting)
{
    const char *text = setting->value ? setting->value : getenv(setting->variable), *wrong;

    if (!text || !*text)
        return 0;
    wrong = setting->parse(settings, text);
    if (!wrong)
        return 0;
    fprintf(stderr, "usroce: %s=%s: %s\n", setting->value ? setting->name : setting->variable, text, wrong);
    return EINVAL;
}

int settings_read(struct settings *settings)
{
    int rc = 0;

    set_defaults(settings);
    pthread_mutex_lock(&process_lock);
    for (int i = 0; i < SETTINGS && !rc; i++)
        rc = read_setting(settings, &table[i]);
    pthread_mutex_unlock(&process_lock);
    return rc;
}

EXPORT int usroce_set_option(const char *name, const char *value)
{
    struct setting *setting = NULL;
    struct settings scratch;
    char *copy = NULL, *old;

    for (int i = 0; i < SETTINGS; i++)
        if (name && strcmp(name, table[i].name) == 0)
            setting = &table[i];
    if (!setting)
        return ENOENT;
    set_defaults(&scratch);
    if (value && *value && setting->parse(&scratch, value))
        return EINVAL;
    if (value) {
        copy = strdup(value);
        if (!copy)
            return ENOMEM;
    }
    pthread_mutex_lock(&process_lock);
    old = setting->value;
    setting->value = copy;
    pthread_mutex_unlock(&process_lock);
    free(old);
    return 0;
}
