/* The map from numbers to objects: against a plain array, through growth and many removals, with full ranges. */
#include "idmap.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int failures;

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        failures++;
    }
}

/* What the device provides; here the same numbers in each run. */
uint32_t random_u32(void);
uint32_t random_u32(void)
{
    static uint64_t state = 7;

    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static char objects[1 << 20];

static void empty(void)
{
    struct idmap map;

    idmap_init(&map);
    check(!idmap_find(&map, 0) && !idmap_find(&map, 5), "nothing in an empty map");
    idmap_remove(&map, 5);
    check(map.count == 0, "removing what is not there");
    idmap_free(&map);
    idmap_free(&map);
}

static void add_find_remove(void)
{
    struct idmap map;

    idmap_init(&map);
    check(!idmap_add(&map, 0, &objects[0]) && !idmap_add(&map, 0xffffff, &objects[1]), "add");
    check(idmap_add(&map, 0, &objects[2]) == EEXIST, "EEXIST");
    check(idmap_find(&map, 0) == &objects[0], "the first one stays");
    check(idmap_find(&map, 0xffffff) == &objects[1], "the largest number");
    check(!idmap_find(&map, 1), "a number that was not added");
    idmap_remove(&map, 0);
    idmap_remove(&map, 0);
    check(!idmap_find(&map, 0) && map.count == 1, "removed");
    check(!idmap_add(&map, 0, &objects[2]) && idmap_find(&map, 0) == &objects[2], "added again");
    idmap_free(&map);
    check(!idmap_find(&map, 0xffffff), "nothing after free");
}

/* Random operations on few numbers, so that they meet often, compared with an array. */
static void against_an_array(void)
{
    enum { IDS = 3000, STEPS = 300000 };
    static void *model[IDS];
    struct idmap map;
    uint32_t count = 0;

    idmap_init(&map);
    for (int step = 0; step < STEPS; step++) {
        uint32_t n = random_u32() % IDS, id = n << 8; /* as keys with a tag */
        bool growing = step / 30000 % 2 == 0;

        if (random_u32() % 8 < (growing ? 6 : 2)) {
            int rc = idmap_add(&map, id, &objects[step]);

            check(rc == (model[n] ? EEXIST : 0), "the result of add");
            count += !model[n];
            if (!model[n])
                model[n] = &objects[step];
        } else {
            idmap_remove(&map, id);
            count -= model[n] != NULL;
            model[n] = NULL;
        }
        n = random_u32() % IDS;
        check(idmap_find(&map, n << 8) == model[n], "the same as the array");
        check(map.count == count, "the count");
    }
    for (uint32_t n = 0; n < IDS; n++)
        check(idmap_find(&map, n << 8) == model[n], "the same as the array in the end");
    idmap_free(&map);
}

/* A map that objects pass through stays as small as what is in it at a time. */
static void removed_entries_are_reused(void)
{
    enum { LIVE = 100 };
    struct idmap map;

    idmap_init(&map);
    for (uint32_t i = 0; i < 1000000; i++) {
        check(!idmap_add(&map, i, &objects[i % sizeof(objects)]), "add");
        if (i >= LIVE)
            idmap_remove(&map, i - LIVE);
    }
    check(map.count == LIVE, "what is live");
    check(map.capacity <= 4 * LIVE, "the table does not grow without need");
    check(map.count + map.removed < map.capacity, "there is always an unused entry");
    idmap_free(&map);
}

static void many(void)
{
    enum { MANY = 1 << 18 };
    struct idmap map;
    int found = 1;

    idmap_init(&map);
    for (uint32_t i = 0; i < MANY; i++)
        check(!idmap_add(&map, i * 63, &objects[i]), "add");
    for (uint32_t i = 0; i < MANY; i++)
        found &= idmap_find(&map, i * 63) == &objects[i] && !idmap_find(&map, i * 63 + 1);
    check(found, "each one of many is found");
    idmap_free(&map);
}

static void random_numbers(void)
{
    enum { LOW = 0x10, HIGH = 0x40f };
    static bool used[HIGH + 1];
    struct idmap map;
    uint32_t id, first = 0, ordered = 0;

    idmap_init(&map);
    for (uint32_t i = LOW; i <= HIGH; i++) {
        check(!idmap_add_random(&map, LOW, HIGH, &objects[i], &id), "a free number");
        check(id >= LOW && id <= HIGH && !used[id], "in the range, and free");
        used[id] = true;
        check(idmap_find(&map, id) == &objects[i], "the object is there");
        ordered += i > LOW && id == first + 1;
        first = id;
    }
    check(ordered < 100, "they do not come one after the other");
    check(idmap_add_random(&map, LOW, HIGH, objects, &id) == ENOMEM, "no free number is left");
    idmap_remove(&map, 0x123);
    check(!idmap_add_random(&map, LOW, HIGH, objects, &id) && id == 0x123, "the only free number is found");
    check(!idmap_add_random(&map, 7, 7, objects, &id) && id == 7, "a range of one");
    check(!idmap_add_random(&map, 0, 0xffffff, objects, &id) && id <= 0xffffff, "the widest range");
    idmap_free(&map);
}

static void measure(void)
{
    enum { LIVE = 1000, ROUNDS = 10000000 };
    static uint32_t ids[LIVE];
    struct timespec start, end;
    struct idmap map;
    uintptr_t sink = 0;
    double elapsed;

    idmap_init(&map);
    for (int i = 0; i < LIVE; i++)
        check(!idmap_add_random(&map, 0, 0xffffff, objects, &ids[i]), "add");
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < ROUNDS; i++)
        sink += (uintptr_t)idmap_find(&map, ids[i % LIVE]);
    clock_gettime(CLOCK_MONOTONIC, &end);
    elapsed = (double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec);
    printf("find among %d: %.1f ns (%d)\n", LIVE, elapsed / ROUNDS, sink != 0);
    idmap_free(&map);
}

int main(int argc, char **argv)
{
    (void)argv;
    if (argc > 1) {
        measure();
        return failures != 0;
    }
    empty();
    add_find_remove();
    against_an_array();
    removed_entries_are_reused();
    many();
    random_numbers();
    return failures != 0;
}
