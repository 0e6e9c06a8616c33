/* Who gets what arrives for a queue pair: receivers by its number, in a table with linear probing that is at most half
 * full. So what a message of another one than the last needs to know is one line of memory, nearly always. */
#include "datapath.h"

#include <string.h>

#define FIRST_SIZE 2

static uint32_t first_place(const struct users *users, uint32_t qp_num)
{
    return qp_num * 0x9e3779b1u >> 8 & (users->size - 1);
}

static uint32_t next_place(const struct users *users, uint32_t at)
{
    return (at + 1) & (users->size - 1);
}

struct user *users_find(const struct users *users, uint32_t qp_num)
{
    if (!users->size)
        return NULL;
    for (uint32_t at = first_place(users, qp_num); users->at[at].receiver; at = next_place(users, at))
        if (users->at[at].qp_num == qp_num)
            return &users->at[at];
    return NULL;
}

static void insert(struct users *users, const struct user *user)
{
    uint32_t at = first_place(users, user->qp_num);

    while (users->at[at].receiver)
        at = next_place(users, at);
    users->at[at] = *user;
    users->count++;
}

static int grow(struct users *users)
{
    struct users to = {.size = users->size ? 2 * users->size : FIRST_SIZE};

    to.at = PyMem_Calloc(to.size, sizeof(*to.at));
    if (!to.at) {
        PyErr_NoMemory();
        return -1;
    }
    for (uint32_t i = 0; i < users->size; i++)
        if (users->at[i].receiver)
            insert(&to, &users->at[i]);
    PyMem_Free(users->at);
    *users = to;
    return 0;
}

int users_enter(struct users *users, uint32_t qp_num, Receiver *receiver)
{
    struct user user = {
        .receiver = receiver, .messages = receiver->messages, .sender = receiver->sender, .qp_num = qp_num};

    users_forget(users, qp_num);
    if (2 * (users->count + 1) > users->size && grow(users))
        return -1;
    Py_INCREF((PyObject *)receiver);
    insert(users, &user);
    return 0;
}

/* Those behind it that a probe would not find any more are inserted anew. */
void users_forget(struct users *users, uint32_t qp_num)
{
    struct user *user = users_find(users, qp_num), moved;
    Receiver *receiver;

    if (!user)
        return;
    receiver = user->receiver;
    user->receiver = NULL;
    users->count--;
    for (uint32_t at = next_place(users, (uint32_t)(user - users->at)); users->at[at].receiver;
         at = next_place(users, at)) {
        moved = users->at[at];
        users->at[at].receiver = NULL;
        users->count--;
        insert(users, &moved);
    }
    Py_DECREF((PyObject *)receiver);
}

int users_visit(const struct users *users, visitproc visit, void *arg)
{
    for (uint32_t i = 0; i < users->size; i++)
        Py_VISIT((PyObject *)users->at[i].receiver);
    return 0;
}

void users_clear(struct users *users)
{
    struct users old = *users;

    memset(users, 0, sizeof(*users));
    for (uint32_t i = 0; i < old.size; i++)
        Py_XDECREF((PyObject *)old.at[i].receiver);
    PyMem_Free(old.at);
}
