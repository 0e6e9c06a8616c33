/* Numbers to objects: a hash table that grows. Not thread-safe; the device lock covers it. */
#ifndef IDMAP_H
#define IDMAP_H

#include <stdint.h>

struct idmap_entry;

struct idmap {
    struct idmap_entry *entries; /* open addressing, power of two */
    uint32_t capacity, count, removed;
};

void idmap_init(struct idmap *map);
void idmap_free(struct idmap *map);
/* 0, ENOMEM, or EEXIST. */
int idmap_add(struct idmap *map, uint32_t id, void *object);
void *idmap_find(const struct idmap *map, uint32_t id); /* NULL: none */
void idmap_remove(struct idmap *map, uint32_t id);
/* Adds under a free number from `low` to `high`, chosen by random_u32(). 0 or ENOMEM. */
int idmap_add_random(struct idmap *map, uint32_t low, uint32_t high, void *object, uint32_t *id);

#endif
