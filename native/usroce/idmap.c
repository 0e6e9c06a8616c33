/* Numbers to objects. Linear probing: a lookup, which each packet needs, is nearly always one cache line. */
#include "idmap.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "usroce.h"

enum {
    FIRST_CAPACITY = 16,
    RANDOM_ATTEMPTS = 32,
};

struct idmap_entry {
    void *object; /* NULL: never used; REMOVED: a probe goes on behind it */
    uint32_t id;
};

#define REMOVED ((void *)&tombstone)
static char tombstone;

static bool is_live(const struct idmap_entry *entry)
{
    return entry->object && entry->object != REMOVED;
}

/* Numbers that differ in any bit, so also counted ones and ones with a tag in the low bits, spread evenly. */
static uint32_t mix(uint32_t id)
{
    id *= 0x9e3779b1u;
    id ^= id >> 15;
    id *= 0x85ebca6bu;
    return id ^ id >> 13;
}

void idmap_init(struct idmap *map)
{
    *map = (struct idmap){0};
}

void idmap_free(struct idmap *map)
{
    free(map->entries);
    idmap_init(map);
}

/* The entry of `id`, or NULL. Ends, for there is always an entry that was never used. */
static struct idmap_entry *look_up(const struct idmap *map, uint32_t id)
{
    uint32_t mask = map->capacity - 1;

    if (!map->capacity)
        return NULL;
    for (uint32_t at = mix(id) & mask; map->entries[at].object; at = (at + 1) & mask) {
        if (map->entries[at].id == id && map->entries[at].object != REMOVED)
            return &map->entries[at];
    }
    return NULL;
}

/* Into the first entry without an object; `id` is not in the map. */
static void insert(struct idmap *map, uint32_t id, void *object)
{
    uint32_t mask = map->capacity - 1, at = mix(id) & mask;

    while (is_live(&map->entries[at]))
        at = (at + 1) & mask;
    map->removed -= map->entries[at].object == REMOVED;
    map->entries[at] = (struct idmap_entry){.object = object, .id = id};
    map->count++;
}

/* Moves what is live to a new table. 0 or ENOMEM. */
static int rehash(struct idmap *map, uint32_t capacity)
{
    struct idmap old = *map;
    struct idmap_entry *entries = calloc(capacity, sizeof(*entries));

    if (!entries)
        return ENOMEM;
    *map = (struct idmap){.entries = entries, .capacity = capacity};
    for (uint32_t i = 0; i < old.capacity; i++) {
        if (is_live(&old.entries[i]))
            insert(map, old.entries[i].id, old.entries[i].object);
    }
    free(old.entries);
    return 0;
}

/* Room for one more: at most three quarters are in use, removed ones included. Where those are many, it is enough
 * to leave them behind. */
static int reserve(struct idmap *map)
{
    uint32_t capacity = map->capacity;

    if (!capacity)
        return rehash(map, FIRST_CAPACITY);
    if (map->count + map->removed < capacity / 4 * 3)
        return 0;
    return rehash(map, map->count < capacity / 2 ? capacity : 2 * capacity);
}

int idmap_add(struct idmap *map, uint32_t id, void *object)
{
    int rc;

    if (look_up(map, id))
        return EEXIST;
    rc = reserve(map);
    if (rc)
        return rc;
    insert(map, id, object);
    return 0;
}

void *idmap_find(const struct idmap *map, uint32_t id)
{
    struct idmap_entry *entry = look_up(map, id);

    return entry ? entry->object : NULL;
}

void idmap_remove(struct idmap *map, uint32_t id)
{
    struct idmap_entry *entry = look_up(map, id);
    struct idmap_entry *next;

    if (!entry)
        return;
    next = &map->entries[(uint32_t)(entry - map->entries + 1) & (map->capacity - 1)];
    entry->object = next->object ? REMOVED : NULL; /* at the end of its run no probe goes on behind it */
    map->removed += entry->object == REMOVED;
    map->count--;
}

/* Random numbers first. Where most are taken, the first free one after a random one: it always ends. */
static bool find_free(const struct idmap *map, uint32_t low, uint32_t high, uint32_t *id)
{
    uint64_t span = (uint64_t)high - low + 1;
    uint64_t start = 0;

    for (int i = 0; i < RANDOM_ATTEMPTS; i++) {
        start = random_u32() * span >> 32;
        *id = low + (uint32_t)start;
        if (!look_up(map, *id))
            return true;
    }
    for (uint64_t i = 1; i < span; i++) {
        *id = low + (uint32_t)((start + i) % span);
        if (!look_up(map, *id))
            return true;
    }
    return false;
}

int idmap_add_random(struct idmap *map, uint32_t low, uint32_t high, void *object, uint32_t *id)
{
    if (!find_free(map, low, high, id))
        return ENOMEM;
    return idmap_add(map, *id, object);
}
