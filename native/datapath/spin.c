/* Spinning inside an await: polling in C for a bounded and learned time, so that a fast completion needs no turn of
 * the event loop.
 *
 * The first poll costs less than the turn it may save, so it is made in every mode. How long it goes on is up to a
 * Governor (adaptive), to the cap (busy), or not at all (event). Others are not starved: all spins of a turn share a
 * budget, only so many awaits in a row complete without a turn, and an await that finds the loop with other work
 * goes through the loop. Of asyncio's loop that is known, uvloop hides its queue; so a spin ends as well when it has
 * found something for somebody else, and none begins while receivers of ours have been woken and have not run, or
 * others are in line behind what was found (soon()). */
#include "datapath.h"

#include <time.h>

#define TURN_BUDGET_NS 500000 /* spinning without a turn of the loop in between, altogether */
#define TURN_AWAITS 16        /* awaits that may complete without one */
#define PROBE 64              /* one in so many is tried though it did not pay lately */

long long now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (long long)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* --- Governor ---------------------------------------------------------------------------------------- */

static long long lesser(long long a, long long b)
{
    return a < b ? a : b;
}

void governor_learn(Governor *governor, long long elapsed_ns)
{
    long long longest = governor->turn_cap_ns > governor->cap_ns ? governor->turn_cap_ns : governor->cap_ns;

    /* An outlier (a retransmission, a descheduled process) should not end spinning for long. */
    elapsed_ns = lesser(elapsed_ns, 8 * longest);
    governor->average_ns += (elapsed_ns - governor->average_ns) / 8;
}

int governor_of(PyObject *value, Governor **governor)
{
    if (value != Py_None && !PyObject_TypeCheck(value, governor_type)) {
        PyErr_SetString(PyExc_TypeError, "governor: a Governor, or None");
        return -1;
    }
    *governor = value == Py_None ? NULL : (Governor *)value;
    return 0;
}

static void governor_hit(Governor *governor, bool found)
{
    governor->hit_rate += ((found ? 1.0 : 0.0) - governor->hit_rate) / 16;
}

static long long governor_inline_ns(Governor *governor)
{
    if (governor->average_ns <= governor->cap_ns && governor->hit_rate > 0.25)
        return lesser(governor->cap_ns, 2 * governor->average_ns + 1000);
    return ++governor->attempts % PROBE ? 0 : governor->cap_ns;
}

static PyObject *learn(PyObject *self, PyObject *arg)
{
    long long elapsed_ns = PyLong_AsLongLong(arg);

    if (elapsed_ns == -1 && PyErr_Occurred())
        return NULL;
    governor_learn((Governor *)self, elapsed_ns);
    Py_RETURN_NONE;
}

static PyObject *hit(PyObject *self, PyObject *found)
{
    int truth = PyObject_IsTrue(found);

    if (truth < 0)
        return NULL;
    governor_hit((Governor *)self, truth);
    Py_RETURN_NONE;
}

static PyObject *inline_ns(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLongLong(governor_inline_ns((Governor *)self));
}

long long governor_turns_ns(const Governor *governor)
{
    return governor->average_ns > governor->turn_cap_ns ? 0 : lesser(governor->turn_cap_ns, 4 * governor->average_ns);
}

static PyObject *turns_ns(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLongLong(governor_turns_ns((Governor *)self));
}

static int governor_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cap_ns", "turn_cap_ns", NULL};
    Governor *governor = (Governor *)self;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL", names, &governor->cap_ns, &governor->turn_cap_ns))
        return -1;
    governor->average_ns = governor->cap_ns / 4;
    governor->hit_rate = 1.0;
    governor->attempts = 0;
    return 0;
}

static PyMethodDef governor_methods[] = {
    {"learn", learn, METH_O, "learn(elapsed_ns): an operation took this long from posting to completion."},
    {"hit", hit, METH_O, "hit(found): an inline spin found its completion, or not."},
    {"inline_ns", inline_ns, METH_NOARGS, "How long the next inline spin may last; 0 for not at all."},
    {"turns_ns", turns_ns, METH_NOARGS,
     "How long after the last completion polling on turns of the loop may go on."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef governor_members[] = {
    {"average_ns", T_LONGLONG, offsetof(Governor, average_ns), 0, "Moving average of the time completions take."},
    {"hit_rate", T_DOUBLE, offsetof(Governor, hit_rate), 0, "Moving average of the spins that found something."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot governor_slots[] = {
    {Py_tp_init, governor_init},
    {Py_tp_dealloc, object_free},
    {Py_tp_methods, governor_methods},
    {Py_tp_members, governor_members},
    {Py_tp_doc,
     "Governor(cap_ns, turn_cap_ns): decides how long an adaptive await may spin, from what earlier ones found.\n\n"
     "Keeps a moving average of the time completions take. Spinning inline is worth it up to cap_ns: when operations\n"
     "usually take longer, it is tried only once in PROBE times, to notice when that changes. Across turns of the\n"
     "loop the limit is four times the average, under its own cap. A run of misses stops both."},
    {0, NULL},
};

PyType_Spec governor_spec = {
    .name = "aiordma._native._datapath.Governor",
    .basicsize = sizeof(Governor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = governor_slots,
};

/* --- spinning ---------------------------------------------------------------------------------------- */

/* True when the loop has other callbacks to run than our own, as far as can be seen. */
static bool others_ready(const Table *table)
{
    Py_ssize_t ready;

    if (table->woken || table->to_wake.count)
        return true;
    if (!table->ready)
        return false;
    ready = PyObject_Size(table->ready);
    return ready > table->polling + table->turn_due;
}

/* 1: this await may complete without a turn of the loop; 0: not; -1 and an exception. */
static int may_stay(Table *table)
{
    if (table_mark_turn(table))
        return -1;
    return ++table->stays <= TURN_AWAITS && !others_ready(table);
}

static void spin_on(Table *table, const struct spin *spin)
{
    Governor *governor = spin->governor;
    long long budget = table->inline_cap_ns, handed_out = table->handed_out, start, now;

    if (governor) /* with several operations under way, the loop resolves them in batches: cheaper than one by one */
        budget = table->waiting <= 1 ? governor_inline_ns(governor) : 0;
    if (!budget || table->turn_spent_ns >= TURN_BUDGET_NS)
        return;
    start = now = now_ns();
    while (!spin->done(spin->what) && now - start < budget && !table->closed && table->handed_out == handed_out) {
        int got = table_poll(table, spin->cq, (uint64_t)(budget - (now - start)));

        now = got > 0 ? table->last_hit_ns : now_ns();
        if (got < 0)
            break;
    }
    if (governor)
        governor_hit(governor, spin->done(spin->what));
    table->turn_spent_ns += now - start;
    table->spin_ns += now - start;
}

int table_spin(Table *table, const struct spin *spin)
{
    int stay;
    bool done;

    if (table->spinning || table->dispatching || table->closed || !table_here(table))
        return 0;
    stay = may_stay(table);
    if (stay <= 0)
        return stay;
    table->spinning = 1;
    if (table_poll(table, spin->cq, 0) >= 0 && !spin->done(spin->what) && !spin->once)
        spin_on(table, spin);
    table->spinning = 0;
    done = spin->done(spin->what);
    table->inline_polls++;
    table->inline_hits += done;
    return spin->governor && !done ? table_poll_on_turns(table) : 0;
}
