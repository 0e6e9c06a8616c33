/* The ways in which opening a verbs library fails. Built with sanitizers by `make sanitize`: no leak on any path. */
#include "glue.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static int failures;

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        failures++;
    }
}

static int is_zero(const struct glue_provider *provider)
{
    static const struct glue_provider zero;

    return memcmp(provider, &zero, sizeof(zero)) == 0;
}

static void missing_library(void)
{
    struct glue_provider provider;
    char error[256] = "";

    check(glue_provider_open("libnot-there.so", &provider, error, sizeof(error)) == ENOENT, "ENOENT");
    check(strstr(error, "libnot-there.so") != NULL, "the text names the missing library");
    check(is_zero(&provider), "the table is zero without a library");
}

/* The mathematics library is everywhere, and has no verbs. */
static void missing_symbol(void)
{
    struct glue_provider provider;
    char error[256] = "";

    check(glue_provider_open("libm.so.6", &provider, error, sizeof(error)) == ENOSYS, "ENOSYS");
    check(strstr(error, "ibv_get_device_list") != NULL, "the text names the missing symbol");
    check(is_zero(&provider), "the table is zero without a symbol");
}

static void short_text(void)
{
    struct glue_provider provider;
    char error[4] = {'x', 'x', 'x', 'x'};

    check(glue_provider_open("libm.so.6", &provider, error, 3) == ENOSYS, "ENOSYS with little room");
    check(strlen(error) == 2 && error[3] == 'x', "the text is cut to its room");
}

static void closed_twice(void)
{
    struct glue_provider provider;
    char error[256];

    if (glue_provider_open("libibverbs.so.1", &provider, error, sizeof(error)))
        fprintf(stderr, "no libibverbs here: %s\n", error);
    glue_provider_close(&provider);
    check(is_zero(&provider), "the table is zero after closing");
    glue_provider_close(&provider);
}

int main(void)
{
    missing_library();
    missing_symbol();
    short_text();
    closed_twice();
    return failures != 0;
}
