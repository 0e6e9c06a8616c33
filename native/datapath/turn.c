/* Turns of the event loop: seeing one end, and polling on each (busy and adaptive mode).
 *
 * Polling is a callback of the loop that asks for itself again, so everybody else gets their turn in between. It looks
 * at every queue, or spins on the only one while nobody else wants the loop, hands out what is there, and ends when
 * nothing has come for as long as completions usually take; the loop sleeps then. */
#include "datapath.h"

#define TURN_SPIN_NS 10000 /* on uvloop only when the loop was back as soon as ... */
#define EMPTY_TURN_NS 5000 /* ... this, with nothing to do for others */

static int call_soon(Table *table, PyObject *method)
{
    PyObject *callback = PyObject_GetAttr((PyObject *)table, method), *result = NULL;

    if (callback)
        result = PyObject_CallMethodObjArgs(table->loop, name_call_soon, callback, NULL);
    Py_XDECREF(callback);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int table_ask(Table *table, char *asked, PyObject *method)
{
    if (*asked)
        return 0;
    *asked = 1; /* before the loop is asked, for that may run anything */
    if (!call_soon(table, method))
        return 0;
    *asked = 0;
    return -1;
}

/* --- the end of a turn ------------------------------------------------------------------------------- */

/* Who polls in the next turn sees this one end; else the loop is asked to say so. */
int table_mark_turn(Table *table)
{
    if (!table->polling && table_ask(table, &table->turn_due, name_turned))
        return -1;
    table->turn_marked = 1;
    return 0;
}

static void end_turn(Table *table)
{
    table->turn++;
    table->turn_marked = 0;
    table->stays = 0;
    table->turn_spent_ns = 0;
    table_flush(table);
}

void table_turned(Table *table)
{
    table->turn_due = 0;
    end_turn(table);
}

/* --- polling ----------------------------------------------------------------------------------------- */

int table_add_queue(Table *table, struct ibv_cq *cq)
{
    struct ibv_cq **queues = PyMem_Realloc(table->queues, (table->queue_count + 1) * sizeof(*queues));

    if (!queues) {
        PyErr_NoMemory();
        return -1;
    }
    table->queues = queues;
    table->queues[table->queue_count++] = cq;
    return 0;
}

/* How long it goes on when it finds nothing: for what we have posted, or for what comes. */
static long long turns_ns(const Table *table)
{
    long long posted, comes;

    if (!table->governor)
        return 0; /* __init__() was not called */
    posted = governor_turns_ns(table->governor);
    comes = governor_turns_ns(table->arrivals);
    return posted > comes ? posted : comes;
}

int table_poll_on_turns(Table *table)
{
    if (table->polling || table->closed || !(table->busy || (table->adaptive && turns_ns(table))))
        return 0;
    table->asked_ns = now_ns();
    return table_ask(table, &table->polling, name_poll_turn);
}

static bool goes_on(const Table *table)
{
    long long since = table->last_hit_ns > table->asked_ns ? table->last_hit_ns : table->asked_ns;

    return table->busy || (table->adaptive && table->left_ns - since < turns_ns(table));
}

/* How long to poll in C in this turn. Not when others want theirs: uvloop does not tell, but then the turn before took
 * long. */
static long long turn_spin_ns(const Table *table, long long now)
{
    bool alone = table->ready ? PyObject_Size(table->ready) <= table->turn_due : now - table->left_ns < EMPTY_TURN_NS;

    return alone && table->queue_count == 1 ? TURN_SPIN_NS : 0;
}

static void poll_queues(Table *table)
{
    long long before = table->last_hit_ns, start = now_ns(), spin_ns = turn_spin_ns(table, start);
    int budget = TURN_LIMIT;

    for (size_t i = 0; i < table->queue_count; i++) {
        struct ibv_cq *cq = table->queues[(table->first_queue + i) % table->queue_count];
        int got = POLL_BATCH;

        while (budget > 0 && got == POLL_BATCH && !table->closed) {
            got = table_serve(table, cq, (uint64_t)spin_ns);
            budget -= got;
        }
    }
    if (budget <= 0)
        table->first_queue++; /* the next in line starts */
    table_learn_gap(table, before);
}

/* The loop is asked for what polling saw to. -1 and an exception. */
static int end_polling(Table *table)
{
    table->polling = 0;
    if (table->turn_marked && table_mark_turn(table))
        table_unraisable(table);
    return call_none((PyObject *)table, name_sleep);
}

/* -1 and an exception: that of a signal's handler comes out of call_soon(), mostly before it has done anything. So the
 * loop is asked again, and polling ends if that fails too. */
static int ask_for_turn(Table *table)
{
    PyObject *type, *value, *traceback;

    if (!call_soon(table, name_poll_turn))
        return 0;
    PyErr_Fetch(&type, &value, &traceback);
    if (call_soon(table, name_poll_turn)) {
        PyErr_Clear();
        if (end_polling(table))
            table_unraisable(table);
    }
    PyErr_Restore(type, value, traceback);
    return -1;
}

int table_poll_turn(Table *table)
{
    if (!table->polling)
        return 0;
    if (table->turn_marked && !table->turn_due)
        end_turn(table);
    table->turns++;
    if (!table->closed)
        poll_queues(table);
    table->left_ns = now_ns();
    return !table->closed && goes_on(table) ? ask_for_turn(table) : end_polling(table);
}
